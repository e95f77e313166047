"""Mixtures of Gaussians: densities against a naive computation, draws against densities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal

from vae_dist.model.mixture import Components, draw, log_joint, log_mixture


@pytest.fixture
def mixture() -> Components:
    """Three components in two dimensions, float64."""
    log_weight_C = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    mean_CD = torch.tensor([[0.0, 1.0], [3.0, -2.0], [-4.0, 0.5]], dtype=torch.float64)
    return Components(log_weight_C, mean_CD, torch.tensor([[0.0, -1.0], [0.5, 0.2], [-2.0, 1.0]], dtype=torch.float64))


def naive(z_RD: torch.Tensor, mixture: Components) -> torch.Tensor:
    log_weight_C, mean_CD, logvar_CD = (part.double() for part in mixture)
    each_RC = Normal(mean_CD, (logvar_CD / 2).exp()).log_prob(z_RD.double()[:, None]).sum(-1)
    return (log_weight_C + each_RC).logsumexp(-1)


def normals(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniforms(count: int, seed: int = 4) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_mixture_density_equals_the_naive_one_in_float64(mixture: Components) -> None:
    z_RD = 3 * normals(200, 2)
    torch.testing.assert_close(log_mixture(z_RD, mixture), naive(z_RD, mixture), rtol=1e-12, atol=1e-12)


def test_the_mixture_density_is_right_in_float32_with_far_and_narrow_components() -> None:
    generator = torch.Generator().manual_seed(0)
    mean_CD = 1000 * torch.randn(6, 32, generator=generator)
    logvar_CD = 4 * torch.rand(6, 32, generator=generator) - 8
    mixture = Components(torch.randn(6, generator=generator).log_softmax(0), mean_CD, logvar_CD)
    near_RD = mean_CD[torch.arange(60) % 6] + (logvar_CD / 2).exp().repeat(10, 1) * normals(60, 32).float()
    for z_RD in (near_RD, 30 * normals(60, 32).float()):
        found = log_mixture(z_RD, mixture)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), naive(z_RD, mixture), rtol=1e-6, atol=1e-5)
    # The same in float32 arithmetic would be off by whole nats.
    precision_CD = (-logvar_CD).exp()
    square = near_RD.square() @ precision_CD.T - 2 * near_RD @ (mean_CD * precision_CD).T
    square = square + (mean_CD.square() * precision_CD).sum(1)
    right = (near_RD[:, None] - mean_CD).double().square().mul(precision_CD.double()).sum(-1)
    assert (square - right).abs().diagonal().max() > 1


def test_posterior_probabilities_of_components_follow_bayes(mixture: Components) -> None:
    z_RD = 2 * normals(100, 2)
    share_RC = log_joint(z_RD, mixture).softmax(1)
    each_RC = torch.stack([naive(z_RD, Components(*(part[[c]] for part in mixture))) for c in range(3)], dim=1).exp()
    torch.testing.assert_close(share_RC, each_RC / each_RC.sum(1, keepdim=True), rtol=1e-10, atol=1e-12)


def test_components_are_drawn_as_often_as_their_weights_say(mixture: Components) -> None:
    far = mixture._replace(mean_CD=torch.tensor([[-100.0, 0.0], [0.0, 0.0], [100.0, 0.0]]).double())
    z_RD = draw(normals(5000, 2), uniforms(5000), far)
    counts = [((z_RD[:, 0] / 100).round() == c).sum().item() for c in (-1, 0, 1)]
    assert stats.chisquare(counts, [2500, 1000, 1500]).pvalue > 1e-3
    for c in range(3):
        own_RD = z_RD[(z_RD[:, 0] / 100).round() == c - 1]
        for d in range(2):
            normal = stats.norm(far.mean_CD[c, d], (far.logvar_CD[c, d] / 2).exp())
            assert stats.kstest(own_RD[:, d].numpy(), normal.cdf).pvalue > 1e-3


def test_draws_of_a_mixture_have_its_moments_and_margins(mixture: Components) -> None:
    z_RD = draw(normals(40_000, 2), uniforms(40_000), mixture)
    weight_C1, variance_CD = mixture.log_weight_C.exp()[:, None], mixture.logvar_CD.exp()
    mean_D = (weight_C1 * mixture.mean_CD).sum(0)
    second_D = (weight_C1 * (variance_CD + mixture.mean_CD.square())).sum(0)
    error_D = (second_D - mean_D.square()).sqrt() / 200
    assert ((z_RD.mean(0) - mean_D).abs() < 5 * error_D).all()
    torch.testing.assert_close(z_RD.square().mean(0), second_D, rtol=0.03, atol=0.0)
    product = (weight_C1[:, 0] * mixture.mean_CD.prod(1)).sum()
    assert (z_RD.prod(1).mean() - product).abs() < 5 * z_RD.prod(1).std() / 200
    for d in range(2):

        def cdf(x: np.ndarray, d: int = d) -> np.ndarray:
            each = stats.norm.cdf(x[:, None], mixture.mean_CD[:, d], (mixture.logvar_CD[:, d] / 2).exp())
            return each @ weight_C1[:, 0].numpy()

        assert stats.kstest(z_RD[:, d].numpy(), cdf).pvalue > 1e-3


def test_a_component_begins_where_the_one_before_it_ends_and_none_without_weight_is_drawn() -> None:
    weight_C = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    mixture = Components(weight_C.log(), torch.arange(6.0)[:, None], torch.zeros(6, 1))
    edge = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-24])
    assert draw(torch.zeros(6, 1), edge, mixture)[:, 0].tolist() == [1, 1, 3, 3, 4, 4]
    # Weights whose sum rounds to less than one.
    tenth = Components(torch.full((10,), 0.1).log(), torch.arange(10.0)[:, None], torch.zeros(10, 1))
    almost_one = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert draw(torch.zeros(1, 1), almost_one, tenth).item() == 9
