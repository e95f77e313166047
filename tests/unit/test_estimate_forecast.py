"""Forecasts: against closed forms and brute force; whether a run fits, and the nearest configuration that does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vae_dist.cli import main
from vae_dist.config.load import load_config
from vae_dist.config.schema import Config
from vae_dist.errors import ConfigError
from vae_dist.estimate.devices import GPUS, USABLE_SHARE, device_named
from vae_dist.estimate.forecast import Assumptions, Forecast, Workload, forecast, model_sizes, nearest_fitting
from vae_dist.estimate.memory import _sharded_gradients, checkpoint_bytes, model_state
from vae_dist.estimate.timing import communication_bytes
from vae_dist.estimate.trace import Shape, loss_bytes
from vae_dist.estimate.view import as_json, lines

PART = "{kind: transformer, hidden_dim: 512, num_layers: 2}"
LARGE = [
    f"model.encoder={PART}", f"model.decoder={PART}", "model.embedding_dim=512", "train.batch_sequences=512",
    "data.streams=16", "train.precision=bf16",
]  # fmt: skip
WORK = Workload(vocab_size=20_000, mean_tokens=40.0, max_tokens=64, steps=10_000, checkpoint_every=500)
TWO = Assumptions(workers=2, autocast=torch.bfloat16, mfu=0.1)


def config_of(*overrides: str) -> Config:
    return load_config(None, [*LARGE, *overrides])


def on_memory_of(total: float, *overrides: str, workers: int = 2) -> Forecast:
    """On an H100 with so many usable bytes."""
    device = replace(GPUS["h100"], memory_bytes=int(total / USABLE_SHARE))
    return forecast(config_of(*overrides), WORK, device, replace(TWO, workers=workers))


@pytest.fixture(scope="module")
def found() -> Forecast:
    return on_memory_of(80e9)


def test_the_step_is_flops_bytes_and_passes_over_what_does_them(found: Forecast) -> None:
    parameters, (forward, backward, recompute) = found.sizes.trainable, found.flops_per_token
    # Two products of each weight of a layer a token and direction; a tied embedding is one of them.
    assert forward == pytest.approx(2 * parameters, rel=0.15) and backward == pytest.approx(2 * forward, rel=0.01)
    assert recompute == 0
    step = found.step
    assert step.compute == pytest.approx((forward + backward) * 512 * 40 / 2 / (0.1 * 989.5e12))
    assert step.communication == pytest.approx(4 * parameters / 450e9)
    assert step.update == pytest.approx(28 * parameters / 3.35e12)
    assert step.total == pytest.approx(step.compute + step.communication + step.update)


def test_the_whole_run_is_its_steps_over_goodput_times_the_price() -> None:
    priced = forecast(config_of(), WORK, GPUS["h100"], replace(TWO, price=3.0, mfu=0.05, mtbf_hours=100.0))
    numbers = as_json(priced)
    assert numbers["work_hours"] == pytest.approx(10_000 * priced.step.total / 3600)
    assert numbers["wall_hours"] == pytest.approx(numbers["work_hours"] / numbers["goodput"])
    assert numbers["price"] == pytest.approx(numbers["wall_hours"] * 2 * 3.0)
    assert numbers["goodput_best"] >= numbers["goodput"]
    assert numbers["mtbf_hours"] == 50.0
    assert priced.step.compute == pytest.approx(2 * forecast(config_of(), WORK, GPUS["h100"], TWO).step.compute)


def test_a_small_model_is_bound_by_its_operators_not_by_the_peak() -> None:
    small = ["model.encoder={kind: lstm, hidden_dim: 64}", "model.decoder={kind: lstm, hidden_dim: 64}"]
    sized = [*small, "model.embedding_dim=64", "train.batch_sequences=16"]
    step = forecast(config_of(*sized), WORK, GPUS["h100"], TWO).step
    # Two LSTMs, forward and backward, of 40 positions each, and what else there is.
    assert 160 * 8e-6 < step.compute < 1000 * 8e-6
    cut = forecast(config_of(*sized, "train.micro_batch_tokens=64"), WORK, GPUS["h100"], TWO).step
    assert cut.compute == pytest.approx(8 * step.compute, rel=0.05)


def test_everything_is_said_for_people(found: Forecast) -> None:
    text = "\n".join(lines(found))
    assert "Estimates, not measurements" in text and "10 % of the peak assumed" in text
    for word in ("FLOPs per token", "ZeRO", "communication", "checkpoint", "goodput", "Daly 2006", "duration"):
        assert word in text, word


def test_what_is_offloaded_is_said_and_not_left_out(found: Forecast) -> None:
    moved = on_memory_of(80e9, "cluster.zero_stage=2", "cluster.offload_optimizer=true")
    (line,) = [line for line in lines(moved) if line.startswith("offload")]
    assert f"about {moved.memory[2].state.optimizer / 1e6:.3g} MB" in line and "does not leave them out" in line
    assert moved.memory == found.memory and not [line for line in lines(found) if line.startswith("offload")]


def test_between_nodes_the_network_is_what_counts() -> None:
    assert GPUS["h100"].bandwidth_between(8) == 450e9 and GPUS["h100"].bandwidth_between(16) == 50e9


def test_micro_batches_are_cut_as_the_stream_cuts_them() -> None:
    cut = on_memory_of(80e9, "train.micro_batch_tokens=1000")
    assert (cut.shape, cut.longest, cut.micro_batches) == (Shape(25, 40), Shape(15, 64), 11)
    whole = on_memory_of(80e9)
    assert (whole.shape, whole.longest, whole.micro_batches) == (Shape(256, 40), Shape(256, 64), 1)
    assert cut.memory[0].activations < 0.1 * whole.memory[0].activations


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 64])
def test_sharded_gradients_are_those_of_whole_parameters_in_a_part(workers: int) -> None:
    sizes = model_sizes(config_of(), 1000)
    held = [0] * workers
    for group in sizes.groups:
        length = -(-sum(group) // (2 * workers)) * 2
        start = 0
        for elements in group:
            for rank in range(workers):
                if start < (rank + 1) * length and start + elements > rank * length:
                    held[rank] += elements
            start += elements
    assert _sharded_gradients(sizes, workers) == max(held)


def test_state_shrinks_with_the_stage_and_the_workers() -> None:
    sizes, optimizer = model_sizes(config_of(), 1000), config_of().optimizer
    adam = 4 * sizes.trainable
    assert model_state(sizes, optimizer, 0, 8) == (adam, adam, 2 * adam, 0)
    many = model_state(sizes, optimizer, 3, 1024)
    assert many.optimizer == pytest.approx(2 * adam / 1024, rel=0.01)
    totals = [model_state(sizes, optimizer, stage, 16).total for stage in range(4)]
    assert totals[0] > totals[1] == totals[2] > totals[3]


def test_a_checkpoint_holds_weights_moments_and_averages_once() -> None:
    sizes = model_sizes(config_of(), 1000)
    copies = {"optimizer.kind=sgd": 1, "optimizer.kind=adamw": 3, "optimizer.average_decay=0.9": 4}
    for override, count in copies.items():
        size = checkpoint_bytes(sizes, config_of(override).optimizer)
        assert size == pytest.approx(4 * count * sizes.trainable, rel=0.01), override


def test_a_worker_that_is_alone_sends_nothing() -> None:
    sizes = model_sizes(config_of(), 1000)
    assert [communication_bytes(sizes, stage, 1, 3) for stage in range(4)] == [0, 0, 0, 0]


def test_the_unfused_loss_holds_logits_and_the_fused_one_does_not() -> None:
    shape, vocab = Shape(64, 64), 50_000
    logits = 64 * 64 * vocab
    single = loss_bytes(config_of(), vocab, shape, None, gpu=False)
    # Logits, their log-softmax and their gradient at least.
    assert single.unfused >= 3 * 4 * logits * 0.66
    heads = 4 * 512 * (vocab + 64 * 64)
    assert single.kept == pytest.approx(heads, rel=0.02) and single.workspace <= 2**28
    several = loss_bytes(
        config_of("objective.importance_samples=4", "objective.free_bits=none"), vocab, shape, None, True
    )
    # What four samples' rows would be, as far as the operator's own bound lets it keep them.
    assert several.kept == pytest.approx(min(4 * 4 * logits, 2**31), rel=0.02)


def test_a_run_without_room_is_told_the_fewest_changes(found: Forecast) -> None:
    assert found.fits
    least = found.memory[0].state.total + found.memory[0].loss
    tight = on_memory_of(1.3 * least)
    assert not tight.fits
    nearest = nearest_fitting(tight)
    assert nearest is not None
    changes, other = nearest
    assert list(changes) == ["train.micro_batch_tokens"] and other.fits
    larger = on_memory_of(1.3 * least, f"train.micro_batch_tokens={2 * changes['train.micro_batch_tokens']}")
    assert not larger.fits


def test_state_that_has_no_room_is_sharded_over_more_workers() -> None:
    """A bucket of gradients and bf16 copies of the weights stay; the state of 0.8 B parameters does not fit on two."""
    wide = [
        "model.decoder={kind: transformer, hidden_dim: 8192, num_layers: 1, num_heads: 64}",
        "model.encoder={kind: bag_of_words}",
    ]
    small = on_memory_of(12e9, *wide)
    assert not small.fits
    nearest = nearest_fitting(small)
    assert nearest is not None
    changes, other = nearest
    assert other.fits and changes["cluster.zero_stage"] in (1, 2, 3)
    assert other.memory[other.stage].total <= 12e9


def test_where_nothing_fits_nothing_is_proposed() -> None:
    assert nearest_fitting(on_memory_of(1e6)) is None


def test_workers_must_share_the_streams() -> None:
    with pytest.raises(ConfigError, match=r"3 workers cannot share data.streams = 16 evenly"):
        on_memory_of(80e9, workers=3)


def test_this_machine_is_measured_and_other_names_are_refused() -> None:
    machine = device_named("cpu", 2)
    assert 1e8 < machine.fp32_flops < 1e14 and machine.memory_bytes > 1e8 and machine.memory_bandwidth > 1e8
    with pytest.raises(ConfigError, match=r"--device h1000: the estimates know .*Did you mean h100\?"):
        device_named("h1000", 2)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, object], str]:
    status = main(["plan", *arguments])
    said = capsys.readouterr()
    last = said.out.strip().splitlines()[-1:]
    return status, json.loads(last[0]) if last else {}, said.err


def test_the_command_says_whether_it_fits_and_what_does(capsys: pytest.CaptureFixture[str], dataset_dir: Path) -> None:
    huge = [
        f"data.dir={dataset_dir}", "model.decoder={kind: transformer, hidden_dim: 16384, num_layers: 2, num_heads: 64}",
        "train.steps=1000", "data.streams=32", "cluster.workers=2", "model.encoder={kind: bag_of_words}",
    ]  # fmt: skip
    status, numbers, err = command(capsys, *huge, "--device", "a100")
    assert status == 1 and "It does not fit" in err
    fitting = numbers["estimate"]["fitting"]  # type: ignore[index]
    assert fitting and not numbers["estimate"]["fits"]  # type: ignore[index]
    overrides = [f"{key}={str(value).lower()}" for key, value in fitting.items()]
    status, numbers, err = command(capsys, *huge, *overrides, "--device", "a100")
    assert status == 0 and "It fits" in err and numbers["estimate"]["fits"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--device", "h10"], "--device h10: the estimates know"), (["--workers", "3"], "3 workers cannot share")],
)
def test_a_wrong_flag_is_one_message_and_status_two(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], dataset_dir: Path
) -> None:
    status, _, err = command(capsys, f"data.dir={dataset_dir}", *flags)
    assert status == 2 and message in err and err.count("\n") == 1
