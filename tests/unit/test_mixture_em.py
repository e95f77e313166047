"""EM against scikit-learn, its promises, and its independence of who holds which row."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from support import ROOT, start_command
from torch.distributions import Normal

from vae_dist.errors import DataError
from vae_dist.evaluate import mixture_em
from vae_dist.evaluate.mixture_em import MixtureFit, compare_fit, fit_mixture, mean_log_density
from vae_dist.model.mixture import Components
from vae_dist.model.prior import FittedMixture, StandardPrior


def blobs(rows: int = 300, seed: int = 0) -> torch.Tensor:
    """Three Gaussians of unequal weights and variances in three dimensions, in random order; float64."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.tensor([[0.0, 4.0, -2.0], [5.0, 0.0, 0.0], [-4.0, -4.0, 3.0]], dtype=torch.float64)
    deviation = torch.tensor([[0.5, 1.0, 0.3], [1.5, 0.4, 1.0], [0.8, 0.8, 2.0]], dtype=torch.float64)
    which = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), rows, replacement=True, generator=generator)
    noise = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return mean[which] + deviation[which] * noise


def fit(z: torch.Tensor, components: int = 3, **options) -> MixtureFit:
    return fit_mixture(z, torch.arange(len(z)), components, **options)


def assert_rises(found: MixtureFit) -> None:
    assert np.diff(found.log_likelihood).min() > -1e-12


def without_second(mixture: Components) -> Components:
    return Components(*(part[[0, 2]] for part in mixture))


def naive_log_density(z: torch.Tensor, mixture: Components) -> torch.Tensor:
    each = Normal(mixture.mean_CD, (mixture.logvar_CD / 2).exp()).log_prob(z[:, None]).sum(-1)
    return (each + mixture.log_weight_C).logsumexp(-1)


@pytest.mark.parametrize("iterations", [1, 2, 7, 40])
def test_em_equals_scikit_learns_from_the_same_start(iterations: int) -> None:
    peer_of = pytest.importorskip("sklearn.mixture")
    # Overlapping, so that responsibilities are soft and iterations matter.
    z = blobs() * torch.tensor([0.4, 0.4, 1.0])
    start = fit(z, 4, max_iterations=0).mixture
    peer = peer_of.GaussianMixture(
        4,
        covariance_type="diag",
        reg_covar=0.0,
        tol=0.0,
        max_iter=iterations,
        weights_init=start.log_weight_C.exp().numpy(),
        means_init=start.mean_CD.numpy(),
        precisions_init=(-start.logvar_CD).exp().numpy(),
    )
    with pytest.warns(peer_of._base.ConvergenceWarning):
        peer.fit(z.numpy())
    found = fit(z, 4, max_iterations=iterations, tolerance=0.0, variance_floor=1e-9)
    assert len(found.log_likelihood) == iterations + 1
    np.testing.assert_allclose(found.mixture.log_weight_C.exp().numpy(), peer.weights_, rtol=1e-9)
    np.testing.assert_allclose(found.mixture.mean_CD.numpy(), peer.means_, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found.mixture.logvar_CD.exp().numpy(), peer.covariances_, rtol=1e-8)
    np.testing.assert_allclose(found.log_likelihood[-1], peer.score(z.numpy()), rtol=1e-10)


def test_one_component_is_the_mean_and_the_variances_after_one_iteration() -> None:
    z = blobs() * 30.0 + 1e4
    found = fit(z, 1, max_iterations=1)
    for mixture in (found.mixture, found.gaussian):
        torch.testing.assert_close(mixture.mean_CD[0], z.mean(0), rtol=1e-12, atol=0.0)
        torch.testing.assert_close(mixture.logvar_CD[0].exp(), z.var(0, correction=0), rtol=1e-10, atol=0.0)
        assert mixture.log_weight_C.item() == 0.0


def test_well_separated_gaussians_are_found_again() -> None:
    found = fit(blobs(20_000), 3).mixture
    order = found.log_weight_C.argsort(descending=True)
    # Five standard errors of the proportions; the smallest component has 4,000 rows.
    np.testing.assert_allclose(found.log_weight_C.exp()[order], [0.5, 0.3, 0.2], atol=5 * 0.0035)
    expected = [[0.0, 4.0, -2.0], [5.0, 0.0, 0.0], [-4.0, -4.0, 3.0]]
    np.testing.assert_allclose(found.mean_CD[order], expected, atol=5 * 2.0 / 4000**0.5)
    deviations = [[0.5, 1.0, 0.3], [1.5, 0.4, 1.0], [0.8, 0.8, 2.0]]
    np.testing.assert_allclose((found.logvar_CD[order] / 2).exp(), deviations, rtol=5 / 8000**0.5)


@pytest.mark.parametrize("components", [1, 2, 5, 40])
@pytest.mark.parametrize("floor", [1e-3, 0.3])
def test_the_likelihood_never_falls_and_is_that_of_the_result(components: int, floor: float) -> None:
    for seed in range(3):
        z = blobs(120, seed)
        # Many components on few rows: variances go to the floor and components lose all their rows.
        found = fit(z, components, seed=seed, variance_floor=floor, tolerance=1e-9)
        assert_rises(found)
        expected = naive_log_density(z, found.mixture).mean().item()
        assert found.log_likelihood[-1] == pytest.approx(expected, abs=1e-10)
        assert found.mixture.log_weight_C.logsumexp(0).item() == pytest.approx(0.0, abs=1e-12)
        least = found.mixture.logvar_CD.exp() / z.var(0, correction=0)
        assert least.min() >= floor * (1 - 1e-9)


def test_a_shift_and_a_scale_of_each_dimension_change_nothing_else() -> None:
    z, scale, shift = blobs(), torch.tensor([1e-3, 1.0, 1e3]), torch.tensor([5.0, -1e3, 0.0])
    plain, moved = fit(z), fit(z * scale + shift)
    torch.testing.assert_close(moved.mixture.mean_CD, plain.mixture.mean_CD * scale + shift, rtol=1e-7, atol=1e-9)
    # Rows of -1000 and deviation 1 keep 13 of 16 digits, and their squares twice fewer.
    torch.testing.assert_close(moved.mixture.logvar_CD, plain.mixture.logvar_CD + 2 * scale.log(), atol=1e-6, rtol=0.0)
    assert moved.log_likelihood[-1] == pytest.approx(plain.log_likelihood[-1] - scale.log().sum().item(), abs=1e-7)


def test_memory_is_bounded_by_chunks_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z = blobs()
    whole = fit(z)
    monkeypatch.setattr(mixture_em, "_CHUNK_ROWS", 7)
    for found, expected in zip(fit(z).mixture, whole.mixture, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_start_is_chosen_in_proportion_to_the_weights() -> None:
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, 4.0], dtype=torch.float64)
    rows, number = torch.arange(6.0, dtype=torch.float64)[:, None], torch.tensor([3, 10**12, 7, 2**40, 0, 5])
    counts = np.zeros(6)
    for seed in range(1500):
        counts[int(mixture_em._choose_row(rows, weight, number, seed, 1))] += 1
    assert counts[0] == 0
    assert stats.chisquare(counts[1:], 1500 * weight[1:].numpy() / weight.sum().item()).pvalue > 1e-3


def test_the_start_has_the_mean_square_distance_as_variance() -> None:
    z = blobs()
    start = fit(z, 5, max_iterations=0).mixture
    unit = (z - z.mean(0)) / z.std(0, correction=0)
    means = (start.mean_CD - z.mean(0)) / z.std(0, correction=0)
    nearest = torch.cdist(unit, means).argmin(1)
    expected = (unit - means[nearest]).square().mean(0) * z.var(0, correction=0)
    torch.testing.assert_close(start.logvar_CD.exp(), expected.repeat(5, 1), rtol=1e-9, atol=0.0)
    # Every mean is a row, another one each time.
    assert torch.cdist(start.mean_CD, z).argmin(1).unique().numel() == 5
    assert torch.cdist(start.mean_CD, z).min(1).values.max() < 1e-6
    assert not torch.equal(start.mean_CD, fit(z, 5, max_iterations=0, seed=1).mixture.mean_CD)


def test_fewer_different_rows_than_components_are_fitted_without_the_rest() -> None:
    distinct = torch.tensor([[0.0, 1.0], [2.0, -1.0], [4.0, 7.0]], dtype=torch.float64)
    found = fit(distinct.repeat(50, 1), 5)
    assert_rises(found)
    assert all(part.isnan().sum() == 0 for part in found.mixture)
    nearest = torch.cdist(distinct, found.mixture.mean_CD).argmin(1)
    torch.testing.assert_close(found.mixture.mean_CD[nearest], distinct, atol=1e-6, rtol=0.0)
    held = torch.zeros(3, dtype=torch.float64).index_add_(
        0, torch.cdist(found.mixture.mean_CD, distinct).argmin(1), found.mixture.log_weight_C.exp()
    )
    torch.testing.assert_close(held, torch.full_like(held, 1 / 3), atol=1e-6, rtol=0.0)


def test_a_component_that_lost_all_rows_gets_no_weight_and_stays_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    z = blobs()
    start = mixture_em._start

    def far(*arguments) -> Components:
        mixture = start(*arguments)
        mixture.mean_CD[1] = 1e3
        return mixture

    monkeypatch.setattr(mixture_em, "_start", far)
    found = fit(z, 3)
    assert found.mixture.log_weight_C[1] == -math.inf
    assert_rises(found)
    # As if it had not been there from the first iteration on.
    monkeypatch.setattr(mixture_em, "_start", lambda x, n, components, *rest: without_second(far(x, n, 3, *rest)))
    two = fit(z, 2)
    np.testing.assert_allclose(found.log_likelihood[1:], two.log_likelihood[1:], atol=1e-9)
    stored = FittedMixture(3, 3)
    stored.store(found.mixture)
    assert stored.from_noise(torch.zeros(512, 3), torch.arange(512) / 512).abs().max() < 20


def test_a_dimension_that_does_not_vary_gets_the_floor_as_its_variance() -> None:
    z = torch.cat((blobs(), torch.full((300, 1), 1234.567, dtype=torch.float64), torch.zeros(300, 1)), dim=1)
    found, without = fit(z, 3, variance_floor=1e-2), fit(z[:, :3], 3, variance_floor=1e-2)
    assert_rises(found)
    for mixture in (found.mixture, found.gaussian):
        torch.testing.assert_close(mixture.logvar_CD[:, 3:].exp(), torch.full((len(mixture.mean_CD), 2), 0.01).double())
        torch.testing.assert_close(
            mixture.mean_CD[:, 3:], torch.tensor([1234.567, 0.0]).double().repeat(len(mixture[0]), 1)
        )
    torch.testing.assert_close(found.mixture.mean_CD[:, :3], without.mixture.mean_CD, rtol=1e-8, atol=1e-8)
    peak = 2 * stats.norm.logpdf(0.0, scale=0.1)
    assert found.log_likelihood[-1] == pytest.approx(without.log_likelihood[-1] + peak, abs=1e-8)


def test_as_many_components_as_rows_is_allowed_and_one_more_is_refused() -> None:
    assert_rises(fit(blobs(6), 6))
    with pytest.raises(DataError, match=r"mixture of 7 Gaussians cannot be fitted to 6 latents.*at most 6"):
        fit(blobs(6), 7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_latents_that_are_not_finite_are_refused(value: float) -> None:
    z = blobs()
    z[17, 1] = value
    with pytest.raises(DataError, match=r"not all finite.*diverged"):
        fit(z)


def test_the_comparison_is_the_mean_log_density_of_each_contender() -> None:
    z, held_out = blobs(2000), blobs(700, seed=9).float()
    found = fit(z)
    compared = compare_fit(found, held_out)
    gaussian = stats.norm(z.numpy().mean(0), z.numpy().std(0))
    expected = {
        "mixture_nats": naive_log_density(held_out.double(), found.mixture).mean().item(),
        "gaussian_nats": gaussian.logpdf(held_out.double().numpy()).sum(1).mean(),
        "standard_normal_nats": stats.norm.logpdf(held_out.double().numpy()).sum(1).mean(),
    }
    assert compared == pytest.approx(expected, abs=1e-9)
    assert compared["mixture_nats"] > compared["gaussian_nats"] + 1 > compared["standard_normal_nats"] + 2
    # A prior of the model is a contender, too.
    assert mean_log_density(StandardPrior(), held_out) == pytest.approx(expected["standard_normal_nats"], abs=1e-5)
    with pytest.raises(DataError, match="no latents to score"):
        compare_fit(found, held_out[:0])


def test_latents_of_one_gaussian_gain_nothing_from_a_mixture() -> None:
    generator = torch.Generator().manual_seed(4)
    z, held_out = (torch.randn(4000, 8, generator=generator) for _ in range(2))
    compared = compare_fit(fit(z, 4), held_out)
    assert compared["mixture_nats"] == pytest.approx(compared["standard_normal_nats"], abs=0.05)


# A rank of two plays its part in every case: all rows on one rank, and thirds.
RANK = """
import json, sys, torch, torch.distributed as dist
from vae_dist.errors import DataError
from vae_dist.evaluate.mixture_em import compare_fit, fit_mixture
from safetensors.torch import load_file, save_file

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
for case in ("empty", "thirds"):
    data = load_file(f"{folder}/{case}-{rank}.safetensors")
    found = fit_mixture(data["z"], data["number"], 12, tolerance=1e-7)
    result = {"history": found.log_likelihood, "compared": compare_fit(found, data["held_out"])}
    result |= {name: part.tolist() for name, part in found.mixture._asdict().items()}
    for name, z in (("few", data["z"][:40]), ("broken", data["z"] / (data["number"] != 17 * 2**33)[:, None])):
        try:
            fit_mixture(z, data["number"][: len(z)], 100)
        except DataError as error:
            result[name] = error.message
    with open(f"{folder}/{case}-{rank}.json", "w") as file:
        json.dump(result, file)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict]]:
    """What both ranks found in a case."""
    folder = tmp_path_factory.mktemp("ranks")
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    for case, first in (("empty", 300), ("thirds", 100)):
        for rank, mine in enumerate(order.tensor_split([first])):
            data = {"z": blobs()[mine], "number": mine * 2**33, "held_out": blobs(seed=5)[mine]}
            save_file(data, folder / f"{case}-{rank}.safetensors")
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    ranks = [start_command([sys.executable, "-c", RANK, str(folder), str(r)], environment) for r in range(2)]
    outputs = [process.communicate(timeout=120) for process in ranks]
    assert all(process.returncode == 0 for process in ranks), outputs
    return lambda case: [json.loads((folder / f"{case}-{r}.json").read_text()) for r in range(2)]


@pytest.mark.parametrize("case", ["empty", "thirds"])
def test_the_fit_does_not_depend_on_who_holds_the_rows(of_ranks: Callable[[str], list[dict]], case: str) -> None:
    z = blobs()
    alone = fit_mixture(z, torch.arange(300) * 2**33, 12, tolerance=1e-7)
    shared, other = of_ranks(case)
    assert shared == other
    # The same start, and so the same path, for 12 components of which some overlap.
    assert len(shared["history"]) == len(alone.log_likelihood) > 10
    np.testing.assert_allclose(shared["history"], alone.log_likelihood, rtol=1e-9)
    for name, expected in alone.mixture._asdict().items():
        np.testing.assert_allclose(shared[name], expected, rtol=1e-7, atol=1e-9, err_msg=name)
    assert shared["compared"] == pytest.approx(compare_fit(alone, blobs(seed=5)), abs=1e-10)
    # 40 rows of either rank, where it has them; and one row that is not finite, on whichever rank.
    assert "100 Gaussians cannot be fitted to " + ("40" if case == "empty" else "80") in shared["few"]
    assert "not all finite" in shared["broken"]
