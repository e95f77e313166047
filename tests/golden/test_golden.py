"""Golden losses: a refactor reproduces them; a deliberate change rewrites them (`make golden`) and says why.

Data, order, noise, models and objective in one process and one thread, float32, without DeepSpeed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support import TINY, corpus

from vae_dist.config.load import load_config
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.data.stream.batch import collate
from vae_dist.data.stream.stream import Stream
from vae_dist.data.stream.training_data import order_spec
from vae_dist.data.stream.windows import EpochWindows
from vae_dist.model.vae import TextVAE
from vae_dist.objective.elbo import NegativeElbo
from vae_dist.objective.schedule import beta_at

GOLDEN = Path(__file__).parent / "losses.json"
STEPS = 10
TRANSFORMER = [
    f"model.{side}={{kind: transformer, hidden_dim: 16, num_layers: 2, num_heads: 2}}"
    for side in ("encoder", "decoder")
]
CASES = {"lstm": [], "transformer": TRANSFORMER, "free-bits": ["objective.free_bits_nats=0.1"]}


def losses(folder: Path, overrides: list[str]) -> list[float]:
    """-ELBO per sequence of the first steps."""
    (folder / "corpus.txt").write_text("\n".join(corpus()), encoding="utf-8")
    options = PrepareConfig(tokenizer="word", max_tokens=16)
    dataset = prepare(str(folder / "corpus.txt"), folder / "data", options)
    config = load_config(None, [*TINY, *overrides])
    split = dataset.split("train")
    stream = Stream([split], EpochWindows(order_spec(config, split, "0" * 64)), 0, 1)
    torch.manual_seed(0)
    objective = NegativeElbo(TextVAE(config.model, dataset.tokenizer.vocab_size), config.objective, None)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.01)
    found = []
    for step in range(STEPS):
        share = stream.share(step)
        beta, scale = torch.tensor(beta_at(step, STEPS, config.objective)), torch.tensor(1 / share.real_sequences)
        batch = collate(share.sequences, share.sample_id)
        loss, _ = objective(batch, torch.tensor([0, step]), beta, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_golden_ones(case: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = losses(tmp_path, CASES[case])
    finally:
        torch.set_num_threads(threads)
    assert found == pytest.approx(json.loads(GOLDEN.read_text())[case], rel=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = {}
    for name, extra in CASES.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True)
        made[name] = losses(folder, extra)
    GOLDEN.write_text(json.dumps(made, indent=1) + "\n")
