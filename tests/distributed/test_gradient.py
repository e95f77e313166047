"""The gradient of one global batch equals a single-process fp64 computation, whatever computes it.

Gradients, not losses: Adam hides a constant factor.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, TINY, free_port, rank_environment, start_command

from vae_dist.config.load import load_config
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.stream.batch import collate
from vae_dist.data.stream.stream import Stream
from vae_dist.data.stream.training_data import order_spec
from vae_dist.data.stream.windows import EpochWindows
from vae_dist.model.vae import TextVAE
from vae_dist.objective.elbo import NegativeElbo
from vae_dist.objective.schedule import beta_at

COMMON = (
    *TINY,
    "data.prepare.max_tokens=16",
    "objective.free_bits_nats=0.05",
    "optimizer.gradient_clip_norm=0.0",
    "model.word_dropout=0.2",
)
# Token budgets that give a rank 1, 2 and up to 4 micro-batches of unequal size.
BUDGETS = {"whole": None, "halves": 110, "quarters": 60}
CASES = {
    f"zero{stage}-{name}": [*COMMON, f"cluster.zero_stage={stage}", f"train.micro_batch_tokens={budget or 'null'}"]
    for stage in range(4)
    for name, budget in BUDGETS.items()
}


@pytest.fixture(scope="module")
def gradients(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients of every case at world sizes 1 and 2, written by real DeepSpeed processes."""
    out = tmp_path_factory.mktemp("gradients")
    for world in (1, 2):
        port = free_port()
        ranks = [_start(dataset_dir, out, rank, world, port) for rank in range(world)]
        for process in ranks:
            output, errors = process.communicate(timeout=200)
            assert process.returncode == 0, f"{output}\n{errors}"
    return out


def _start(dataset_dir: Path, out: Path, rank: int, world: int, port: int):
    script = str(ROOT / "tests/distributed/gradient_worker.py")
    return start_command(
        [sys.executable, script, str(dataset_dir), str(out), json.dumps(CASES)], rank_environment(rank, world, port)
    )


@pytest.fixture(scope="module")
def reference(dataset_dir: Path) -> dict[str, torch.Tensor]:
    """fp64, one process, one padded batch, the loss written out: mean over the real sequences."""
    config = load_config(None, [*COMMON])
    dataset = Dataset.open(dataset_dir)
    split = dataset.split("train")
    spec = order_spec(config, split, dataset.manifest_hash)
    number = spec.steps_per_epoch - 1
    share = Stream([split], EpochWindows(spec), 0, 1).share(number)
    assert 0 < share.real_sequences < config.train.batch_sequences, "the last batch of the epoch must be ragged"
    torch.manual_seed(config.train.seed)
    vae = TextVAE(config.model, dataset.tokenizer.vocab_size)
    objective = NegativeElbo(vae, config.objective, None).double()
    rng = torch.tensor([config.train.seed, number])
    batch = collate(share.sequences, share.sample_id)
    output = objective.vae(batch, rng, free_bits=config.objective.free_bits_nats, weight_B=batch.weight_B)
    beta = beta_at(number, 10, config.objective)
    loss = (output.weighted_rec + beta * output.latent.kl_free.sum()) / share.real_sequences
    loss.backward()
    return {name: p.grad for name, p in objective.named_parameters()}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradient_equals_single_process_fp64(
    gradients: Path, reference: dict[str, torch.Tensor], case: str, world: int
) -> None:
    found = load_file(gradients / f"{case}-w{world}.safetensors")
    assert found.keys() == reference.keys()
    for name, expected in reference.items():
        scale = float(expected.abs().max())
        assert scale > 0, f"{name} has no gradient"
        error = float((found[name].double().reshape(expected.shape) - expected).abs().max())
        assert error < 2e-5 * scale + 1e-8, f"{name}: {error} of {scale}"


def test_micro_batches_were_many_and_unequal(gradients: Path) -> None:
    counts = {name: len(json.loads((gradients / f"zero2-{name}-w1.json").read_text())) for name in BUDGETS}
    assert counts["whole"] == 1 and counts["halves"] >= 2 and counts["quarters"] >= 4, counts
    sizes = json.loads((gradients / "zero2-quarters-w1.json").read_text())
    assert len({tuple(size) for size in sizes}) > 1, sizes
