"""Sums over ranks and BatchNorm over the whole batch: against torch's own, closed forms and one process.

Shapes: R rows, H encoder's output, D latent dimensions.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT, start_command
from torch import nn

from vae_dist.config.model_schema import GaussianConfig, ModelConfig
from vae_dist.model.posterior import GaussianPosterior, build_posterior
from vae_dist.model.whole_batch import WholeBatchNorm, sum_over_ranks
from vae_kernels import philox_normal

GAMMA, FREE_BITS, SEED = 0.6, 2.5, [5, 2]
H, D = 4, 3


def rows(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values_gradients_and_averages_are_torchs_batch_norm_in_fp64() -> None:
    ours, theirs = WholeBatchNorm(D, GAMMA).double(), nn.BatchNorm1d(D, eps=1e-30).double()
    nn.init.constant_(theirs.weight, GAMMA)
    x_RD, upstream_RD, results = 3.0 + 2.0 * rows(9, D), rows(9, D, seed=1), []
    for module, arguments in ((ours, (torch.ones(9),)), (theirs, ())):
        for step in range(3):
            leaf_RD = (x_RD * (step + 1)).requires_grad_()
            y_RD = module(leaf_RD, *arguments)
        (y_RD * upstream_RD).sum().backward()
        module.eval()
        bias = ours.shift if module is ours else theirs.bias
        results.append(
            (y_RD, leaf_RD.grad, bias.grad, module.running_mean, module.running_var, module(x_RD, *arguments))
        )
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_mean_kl_is_bounded_exactly_in_training() -> None:
    # Whatever the encoder does with its means: their squares average to gamma^2 + shift^2.
    torch.manual_seed(0)
    posterior = GaussianPosterior(H, D, batch_norm_gamma=GAMMA).double()
    with torch.no_grad():
        posterior.batch_norm.shift.copy_(torch.tensor([0.0, 0.5, -0.25]))
        # Variances of 1, so that the KL is the bound itself.
        posterior.weight[D:], posterior.bias[D:] = 0.0, 0.0
    ids = torch.tensor([0, 1, 2, 3, 4, -1])
    for scale in (1e-4, 1.0, 1e4):
        mean_RD, logvar_RD = posterior(scale * rows(6, H), (ids >= 0).double())
        kl_R = posterior.draw(mean_RD, logvar_RD, torch.tensor(SEED), ids).kl
        bound = 0.5 * (D * GAMMA**2 + 0.5**2 + 0.25**2)
        assert kl_R.sum().item() / 5 == pytest.approx(bound, rel=1e-10)


def test_large_means_do_not_cost_the_variance_its_digits() -> None:
    x_RD = rows(64, D)
    exact = WholeBatchNorm(D, GAMMA).double()(x_RD + 4096.0, torch.ones(64))
    found = WholeBatchNorm(D, GAMMA)((x_RD + 4096.0).float(), torch.ones(64))
    # The inputs themselves are rounded to 2^-12 of their spread.
    torch.testing.assert_close(found.double(), exact, rtol=0.0, atol=1e-3)


def test_padding_changes_nothing_whatever_it_holds() -> None:
    x_RD, results = rows(5, D), []
    for padded in (False, True):
        module = WholeBatchNorm(D, GAMMA).double()
        leaf_RD = torch.cat([x_RD, torch.full((2, D), torch.nan)])[: 7 if padded else 5].clone().requires_grad_()
        weight_R = torch.tensor([1.0] * 5 + [0.0] * 2)[: len(leaf_RD)]
        y_RD = module(leaf_RD, weight_R)
        assert y_RD.isfinite().all()
        (y_RD[:5] * rows(5, D, seed=1)).sum().backward()
        assert (leaf_RD.grad[5:] == 0.0).all()
        results.append((y_RD[:5], leaf_RD.grad[:5], module.shift.grad, module.running_mean, module.running_var))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("real", [0, 1])
def test_a_batch_of_one_real_row_or_none_is_finite_and_teaches_nothing(real: int) -> None:
    module = WholeBatchNorm(D, GAMMA).double()
    with torch.no_grad():
        module.shift.copy_(torch.tensor([0.1, 0.2, 0.3]))
    leaf_RD = (100.0 * rows(2, D)).requires_grad_()
    y_RD = module(leaf_RD, torch.tensor([1.0, 0.0]) * real)
    if real:
        assert torch.equal(y_RD[0], module.shift)
    (y_RD[:real].square().sum() + 0.0 * y_RD.sum()).backward()
    assert y_RD.isfinite().all() and (leaf_RD.grad == 0.0).all() and module.shift.grad.isfinite().all()
    assert torch.equal(module.running_mean, torch.zeros(D).double())
    assert torch.equal(module.running_var, torch.ones(D).double())


def test_averages_move_in_training_and_under_grad_only() -> None:
    module = WholeBatchNorm(D, GAMMA).double()
    with torch.no_grad():
        from_batch = module(5.0 + rows(8, D), torch.ones(8))
    assert float(from_batch.mean()) == pytest.approx(0.0, abs=1e-12)
    module.eval()
    x_RD = 5.0 + rows(8, D)
    torch.testing.assert_close(module(x_RD, torch.ones(8)), GAMMA * x_RD, rtol=1e-12, atol=0.0)
    assert torch.equal(module.running_mean, torch.zeros(D).double())
    module.train()
    module(x_RD, torch.ones(8))
    torch.testing.assert_close(module.running_mean, 0.1 * x_RD.mean(0), rtol=1e-12, atol=0.0)


def test_a_constant_dimension_is_not_blown_up() -> None:
    x_RD = rows(8, D).index_fill(1, torch.tensor([1]), 2.0).requires_grad_()
    y_RD = WholeBatchNorm(D, GAMMA).double()(x_RD, torch.ones(8))
    y_RD.square().sum().backward()
    assert (y_RD[:, 1] == 0.0).all() and (x_RD.grad[:, 1] == 0.0).all() and x_RD.grad.isfinite().all()


def test_a_sum_in_a_single_process_is_the_value_itself() -> None:
    x = rows(2, 2)
    assert sum_over_ranks(x) is x


# Rows of each rank: unequal shares, and a rank with nothing but padding.
SPLITS = {"ragged": [[0, 1, 2], [3]], "padding": [[0, 1, 2, 3], [4]]}


@pytest.fixture(scope="module")
def problem() -> dict[str, torch.Tensor]:
    """Four real rows and one of padding, and a posterior's parameters."""
    return {
        "h_RH": rows(5, H),
        "upstream_RD": rows(5, D, seed=1),
        "sample_id_R": torch.tensor([7, 3, 12, 4, -1]),
        "weight": 0.5 * rows(2 * D, H, seed=2),
        "bias": rows(1, 2 * D, seed=3)[0],
        "batch_norm.shift": rows(1, D, seed=4)[0],
    }


@pytest.fixture(scope="module")
def by_ranks(problem: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make of it, a file for each split and rank."""
    out = tmp_path_factory.mktemp("ranks")
    save_file(problem, out / "problem.safetensors")
    settings = {"gamma": GAMMA, "free_bits": FREE_BITS, "seed": SEED, "splits": SPLITS}
    (out / "settings.json").write_text(json.dumps(settings))
    script = str(ROOT / "tests/unit/whole_batch_worker.py")
    environment = {
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    ranks = [start_command([sys.executable, script, str(out)], {**environment, "RANK": str(r)}) for r in range(2)]
    for process in ranks:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, f"{output}\n{errors}"
    return out


@pytest.fixture(scope="module")
def in_one_process(problem: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The four real rows in fp64, the loss written out: mean over rows, free bits over their mean KL, squared."""
    weight, bias, shift = (problem[x].clone().requires_grad_() for x in ("weight", "bias", "batch_norm.shift"))
    ids = problem["sample_id_R"][:4]
    # Means are normalised, so a bias of theirs would be lost: there is none.
    is_logvar = torch.arange(len(bias)) >= len(bias) // 2
    raw_RD, logvar_RD = (problem["h_RH"][:4] @ weight.T + bias * is_logvar).chunk(2, dim=-1)
    std_D = (raw_RD - raw_RD.mean(0)).square().mean(0).sqrt()
    mean_RD = GAMMA * (raw_RD - raw_RD.mean(0)) / std_D + shift
    z_RD = mean_RD + (0.5 * logvar_RD).exp() * philox_normal(torch.tensor(SEED), ids, D, num_samples=1, stream=0)[0]
    kl_R = 0.5 * (mean_RD.square() + logvar_RD.exp() - logvar_RD - 1.0).sum(-1)
    assert kl_R.mean().item() > FREE_BITS, "the free bits must not hide the gradient"
    loss = ((z_RD * problem["upstream_RD"][:4]).sum() + kl_R.sum()) / 4
    loss = loss + kl_R.mean().clamp(min=FREE_BITS).square()
    loss.backward()
    return {
        "loss": loss.detach(),
        "z": z_RD.detach(),
        "kl": kl_R.detach(),
        "running_mean": 0.1 * raw_RD.detach().mean(0),
        "running_var": 0.9 + 0.1 * raw_RD.detach().var(0),
        "weight.grad": weight.grad,
        "bias.grad": bias.grad,
        "batch_norm.shift.grad": shift.grad,
    }


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_give_what_one_process_gives(
    by_ranks: Path, in_one_process: dict[str, torch.Tensor], split: str
) -> None:
    for rank, numbers in enumerate(SPLITS[split]):
        found = load_file(by_ranks / f"{split}-{rank}.safetensors")
        real = [n for n in numbers if n < 4]
        expected = in_one_process | {"z": in_one_process["z"][real], "kl": in_one_process["kl"][real]}
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_of_ranks_are_averaged_over_differing_ones(by_ranks: Path) -> None:
    # Otherwise the equality above would not tell a sum over ranks from a rank's own.
    own = [load_file(by_ranks / f"ragged-{rank}.safetensors")["own.weight.grad"] for rank in range(2)]
    assert float((own[0] - own[1]).abs().max()) > 0.1


def test_the_configuration_reaches_the_normalisation() -> None:
    config = ModelConfig(latent_dim=D, posterior=GaussianConfig(batch_norm_gamma=GAMMA))
    names = set(build_posterior(config, H).state_dict())
    assert names == {f"batch_norm.{x}" for x in ("shift", "running_mean", "running_var")} | {"weight", "bias"}
