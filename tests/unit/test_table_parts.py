"""What the table command is made of: its definition, processes, comparison and Markdown; and the PTB table itself."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest

from vae_dist.config.load import load_config
from vae_dist.errors import ConfigError, RunError
from vae_dist.table import work
from vae_dist.table.definition import Definition, Peer, Row, read_definition
from vae_dist.table.jobs import load_table
from vae_dist.table.render import markdown
from vae_dist.table.same import neutral

ROOT = Path(__file__).parents[2]


def test_places_are_left_out_of_every_part_of_a_configuration(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            "data.mixture={/mnt/a: 1.0, s3://bucket/b: 2.0}",
            "data.cache_dir=/fast/disk",
            "data.prepare.tokenizer=~/tokenizer.json",
            "model.embedding_vectors=../vectors/glove.txt",
            "run.storage=/mnt/runs",
        ],
    )
    plain = neutral(config)
    assert plain.data.mixture == {"$VAE_DIST_DATA/a": 1.0, "s3://bucket/b": 2.0} and plain.data.cache_dir is None
    assert plain.data.prepare.tokenizer == "$VAE_DIST_DATA/tokenizer.json" and plain.run.storage == "runs"
    assert plain.model.embedding_vectors == "$VAE_DIST_DATA/glove.txt"
    assert neutral(plain) == plain


def test_a_median_of_two_whole_numbers_may_be_a_half() -> None:
    definition = Definition(base="b", rows=[Row(method="m", seeds=[0, 1])])
    found = [{"method": "m", "seed": s, "elbo_ppl": 1.0 + s, "iw_ppl": None, "rec_per_seq": 1.0, "kl_per_seq": 1.0,
              "mutual_information_nats": 0.0, "active_units": 30 + s} for s in (0, 1)]  # fmt: skip
    line = markdown(definition, found).splitlines()[2]
    assert "| 1.50 (1.00 to 2.00) |  |" in line and "| 30.5 (30 to 31) |" in line


SAVES_ON_SIGNAL = """
import json, signal, sys, time
signals = []
signal.signal(signal.SIGINT, lambda *_: signals.append("INT"))
signal.signal(signal.SIGTERM, lambda *_: signals.append("TERM"))
open(sys.argv[1], "w").write("ready")
while not signals:
    time.sleep(0.01)
time.sleep(0.3)
print("saving")
print(json.dumps({"finished": False, "signals": signals}))
"""


def signal_when(ready: Path, number: int) -> threading.Thread:
    """Send this process a signal as soon as the file is there."""

    def send() -> None:
        while not (ready.exists() and ready.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "INT"), (signal.SIGTERM, "TERM")])
def test_a_signal_reaches_the_work_once_and_its_saving_is_waited_for(number: int, name: str, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    thread = signal_when(tmp_path / "ready", number)
    outcome, stopped = work._run([sys.executable, "-c", SAVES_ON_SIGNAL, str(tmp_path / "ready")], "The work")
    thread.join()
    assert stopped and outcome == {"finished": False, "signals": [name]}
    assert signal.getsignal(number) is before


def test_work_that_a_signal_ends_is_an_interruption_and_no_failure(tmp_path: Path) -> None:
    code = "import sys, time; open(sys.argv[1], 'w').write('ready'); time.sleep(60)"
    thread = signal_when(tmp_path / "ready", signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        work._run([sys.executable, "-c", code, str(tmp_path / "ready")], "The work")
    thread.join()


@pytest.mark.parametrize("code", ["import sys; print('{}'); sys.exit(3)", "pass"])
def test_work_that_fails_is_named(code: str) -> None:
    with pytest.raises(RunError, match=r"Training LM, seed 0 ended with status [03]; see above"):
        work._run([sys.executable, "-c", code], "Training LM, seed 0")


def test_the_ptb_table_holds_the_rows_of_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    table = load_table(Path("configs/results/ptb.table.yaml"))
    first = {job.row.slug: job.config for job in reversed(table.jobs)}
    assert all(c.evaluate.select == "best" and c.evaluate.max_sequences is None for c in first.values())
    assert len({config.model_copy(update={"run": None}).model_dump_json() for config in first.values()}) == len(first)
    assert first["lm"].model.latent == "none" and first["cyclical"].objective.annealing.kind == "cyclical"
    assert first["aggressive"].objective.aggressive and first["beta-0-5"].objective.beta == 0.5
    assert first["ae-pretraining-free-bits"].objective.reset_decoder
    # Free bits of 0.25 nats in 32 dimensions: the 8 nats of Li et al. 2019.
    assert first["free-bits"].objective.free_bits_nats * first["free-bits"].model.latent_dim == 8.0
    without = ("vae-linear-annealing", "beta-0-5", "cyclical", "aggressive")
    assert {first[slug].objective.free_bits for slug in without} == {"none"}
    assert [job.seed for job in table.jobs if job.row.slug == "best"] == [0, 1, 2]
    assert table.definition.evaluation.split == "test" and table.definition.evaluation.importance_samples >= 500


def test_published_perplexities_agree_with_their_nats() -> None:
    """PPL = exp(nats / (82,430 / 3,761)), for the comparable rows that give both terms of the ELBO."""
    peers = read_definition(ROOT / "configs/results/ptb.table.yaml").peers
    words = 82_430 / 3_761

    def ppl(peer: Peer) -> float:
        assert peer.rec_per_seq is not None and peer.kl_per_seq is not None
        return float(2.718281828459045 ** ((peer.rec_per_seq + peer.kl_per_seq) / words))

    both = [p for p in peers if p.elbo_ppl and p.rec_per_seq and p.kl_per_seq is not None]
    agreeing = {p.method for p in both if abs(ppl(p) / p.elbo_ppl - 1) < 0.005}
    assert {
        "AE pretraining + free bits (Li 2019)",
        "Aggressive encoder (He 2019)",
        "VAE, monotonic annealing",
    } <= agreeing
    assert all(p.method in agreeing or p.not_comparable or "do not add up" in p.source for p in both)
    assert all(p.iw_ppl is None or p.elbo_ppl is None or p.iw_ppl < p.elbo_ppl for p in peers)
    live = [p.iw_ppl for p in peers if p.iw_ppl and not p.not_comparable]
    assert statistics.median_low(live) == 96.86
    with pytest.raises(ConfigError):
        read_definition(ROOT / "configs/ptb.yaml")
