"""Metrics: one record a line, cut back to the step a run resumes from; lines that people can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from disks import disk

from vae_dist.observe.metrics import FILE, MetricsWriter, read_metrics
from vae_dist.observe.progress import format_record, format_seconds


def write(folder: Path, steps: range, resume_step: int = 0, kind: str = "train") -> None:
    writer = MetricsWriter(folder, resume_step)
    for step in steps:
        writer.write(kind, step, {"loss": step / 2})
    writer.close()


def test_records_are_lines_of_json(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    lines = (tmp_path / FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"kind": "train", "step": s, "loss": s / 2} for s in (1, 2, 3)]
    assert read_metrics(tmp_path) == [json.loads(line) for line in lines]


def test_a_record_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write("event", 0, {"message": "start"})
    assert read_metrics(tmp_path) == [{"kind": "event", "step": 0, "message": "start"}]
    writer.close()


def test_no_file_is_no_record(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_resuming_drops_what_was_written_beyond_the_step(tmp_path: Path) -> None:
    write(tmp_path, range(1, 10))
    write(tmp_path, range(6, 8), resume_step=5)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    write(tmp_path, range(1, 2), resume_step=0)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_a_torn_last_line_is_ignored_and_gone_after_a_resume(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    with open(tmp_path / FILE, "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 4, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    write(tmp_path, range(4, 6), resume_step=3)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_line_that_is_whole_but_for_its_end_is_torn_too(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 12}', encoding="utf-8")
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_records_wait_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with disk(tmp_path / "disk", 4) as storage:
        writer = MetricsWriter(storage.path, 0)
        writer.write("train", 1, {"loss": 1.0})
        writer._board.flush()
        storage.fill()
        for step in (2, 3):
            writer.write("train", step, {"loss": float(step), "long": "x" * 5000})
        assert [r["step"] for r in read_metrics(storage.path)] == [1]
        with pytest.raises(OSError, match="No space left"):
            writer._write_lines()
        storage.free()
        writer.write("train", 4, {"loss": 4.0})
        assert [r["step"] for r in read_metrics(storage.path)] == [1, 2, 3, 4]
        writer.close()
        board = EventAccumulator(str(storage.path / "tensorboard")).Reload()
        assert [e.step for e in board.Scalars("train/loss")][-1] == 4
    assert caplog.text.count("metrics wait in memory") == 1 and "No space left" in caplog.text


def test_numbers_go_to_tensorboard_under_their_kind(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, 0)
    writer.write("valid", 3, {"ppl": 12.5, "path": "x", "flag": True, "kl_per_dim": [1.0]})
    writer.write("valid", 6, {"ppl": 11, "path": "y"})
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["valid/ppl"]
    assert [(e.step, e.value) for e in board.Scalars("valid/ppl")] == [(3, 12.5), (6, 11.0)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (185, "3m 05s"),
        (3599.7, "1h 00m"),
        (7620, "2h 07m"),
        (1e6, "277h 46m"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


TRAIN = {
    "kind": "train", "step": 40, "elbo_per_seq": -81.234, "rec_per_seq": 79.0, "kl_per_seq": 2.234, "active_units": 7,
    "beta": 0.25, "tokens_per_second": 12345.6, "seconds_left": 185.0,
}  # fmt: skip
VALID = {
    "kind": "valid", "step": 50, "elbo_per_seq": -80.0, "rec_per_seq": 78.0, "kl_per_seq": 2.0, "active_units": 32,
    "ppl": 102.55, "mutual_information_nats": 1.987,
}  # fmt: skip


def test_lines_state_every_number_with_its_unit() -> None:
    assert format_record(TRAIN, 900) == (
        "step     40/900  ELBO   -81.23  rec   79.00  KL   2.23 nats/seq  active   7  beta 0.25  "
        "  12,346 tok/s  left 3m 05s"
    )
    trouble = {"data_wait_fraction": 0.124, "skipped_sequences": 1024}
    assert format_record(TRAIN | trouble, 900).endswith("left 3m 05s  waiting for data 12 %  skipped 1,024 damaged")
    assert format_record(TRAIN | {"data_wait_fraction": 0.009, "skipped_sequences": 0}, 900).endswith("left 3m 05s")
    assert format_record(VALID, 900) == (
        "valid    50/900  ELBO   -80.00  rec   78.00  KL   2.00 nats/seq  active  32  PPL 102.5  MI 1.99 nats"
    )
    checkpoint = {"kind": "checkpoint", "step": 60, "path": "runs/a/checkpoints/step-00000060"}
    times = {"seconds": 1.26, "blocked_seconds": 0.021}
    line = "saved    60/900  runs/a/checkpoints/step-00000060 (1.3 s, stall 0.02 s)"
    assert format_record(checkpoint | times, 900) == line
    assert format_record({"kind": "event", "step": 0, "message": "resumed"}, 900) == "      resumed"
    assert format_record({"kind": "else", "step": 0}, 900) is None


def test_a_diverged_run_still_gets_its_lines() -> None:
    line = format_record(VALID | {"ppl": float("inf"), "elbo_per_seq": float("nan")}, 900)
    assert line is not None
    assert "PPL inf" in line
    assert "ELBO      nan" in line
