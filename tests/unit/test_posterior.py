"""Posteriors against torch.distributions, closed forms and independent fp64 formulas.

Shapes: K samples, R rows, N points, H encoder's output, D latent dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch import distributions

from vae_dist.config.model_schema import DeltaConfig, GaussianConfig, ModelConfig, VmfConfig
from vae_dist.errors import ConfigError
from vae_dist.model.latent import LatentSample
from vae_dist.model.posterior import DeltaPosterior, Posterior, build_posterior
from vae_kernels import gaussian_rsample_kl, philox_normal

H, D, R = 7, 5, 6
RNG = torch.tensor([11, 4])
IDS = torch.tensor([5, 0, -1, 2**40 + 3, 9, -7])
REAL = IDS >= 0
KINDS = {
    "gaussian": GaussianConfig(),
    "normalised": GaussianConfig(batch_norm_gamma=0.6),
    "delta": DeltaConfig(nats_per_dim=0.15),
    "vmf": VmfConfig(kappa=12.0),
}


def posterior(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Posterior:
    torch.manual_seed(seed)
    return build_posterior(ModelConfig(latent_dim=D, posterior=KINDS[kind]), H).to(dtype)


def encoded(dtype: torch.dtype = torch.float64, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(R, H, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def weights() -> torch.Tensor:
    return REAL.float()


def mixture(z_ND: torch.Tensor) -> torch.Tensor:
    """A prior without closed-form KL: two Gaussians."""
    one = distributions.Normal(-0.5, 0.8).log_prob(z_ND).sum(-1)
    two = distributions.Normal(0.7, 1.2).log_prob(z_ND).sum(-1)
    return torch.logaddexp(one, two) - math.log(2.0)


def weighted_sum(sample: LatentSample) -> torch.Tensor:
    """A scalar that asks every differentiable output for a gradient, each row another one."""
    generator = torch.Generator().manual_seed(8)
    outputs = (sample.z, sample.kl, sample.kl_free, sample.log_q, sample.log_p)
    return sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in outputs)


def test_gaussian_is_the_linear_layer_and_the_fused_kernel_bit_for_bit() -> None:
    module = posterior("gaussian", torch.float32)
    assert list(module.state_dict()) == ["weight", "bias"]
    torch.manual_seed(0)
    linear = torch.nn.Linear(H, 2 * D)
    h_RH, results = encoded(torch.float32), []
    mean_RD, logvar_RD = module(h_RH, weights())
    sample = module.draw(mean_RD, logvar_RD, RNG, IDS, num_samples=3, free_bits=0.1, stream=4)
    expected_RD = linear(h_RH).chunk(2, dim=-1)
    expected = gaussian_rsample_kl(*expected_RD, RNG, IDS, num_samples=3, free_bits=0.1, stream=4)
    for got, wanted, layer in ((sample, expected, module), (expected, sample, linear)):
        for ours, theirs in zip(got, wanted, strict=True):
            assert torch.equal(ours, theirs)
        weighted_sum(got).backward()
        results.append((layer.weight.grad, layer.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_kl_of_gaussians_is_a_sum_over_dimensions_and_that_on_the_sphere_has_none() -> None:
    for kind in KINDS:
        module = posterior(kind)
        sample = module.draw(*module(encoded(), weights()), RNG, IDS)
        assert sample.kl_per_dim.numel() == (0 if kind == "vmf" else D), kind
        if kind != "vmf":
            assert sample.kl_per_dim.sum().item() == pytest.approx(sample.kl.sum().item(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prior", [None, mixture])
def test_mean_of_log_q_less_log_p_is_the_kl(kind: str, prior: Callable | None) -> None:
    module, samples = posterior(kind), 2000
    mean_RD, logvar_RD = module(encoded(scale=0.7), weights())
    sample = module.draw(mean_RD, logvar_RD, RNG, IDS, num_samples=samples, prior=prior)
    ratio_KR = sample.log_q - sample.log_p
    error_R = ratio_KR.std(0) * samples**-0.5
    assert ((ratio_KR.mean(0) - sample.kl).abs() <= 5.0 * error_R).all()
    # log q was sampled on one side only, so the two are not the same number.
    assert kind == "vmf" or prior is None or not torch.allclose(ratio_KR.mean(0)[REAL], sample.kl[REAL], rtol=1e-9)


@pytest.mark.parametrize("kind", ["gaussian", "delta"])
def test_sampled_kl_to_a_standard_normal_is_unbiased_for_the_closed_form(kind: str) -> None:
    module = posterior(kind)
    mean_RD, logvar_RD = module(encoded(scale=0.7), weights())
    exact = module.draw(mean_RD, logvar_RD, RNG, IDS)
    standard = distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    # One draw a row; many rows are many estimates.
    many = 1000
    means_RD, logvars_RD, ids = (x.repeat_interleave(many, 0) for x in (mean_RD, logvar_RD, IDS))
    ids = torch.where(ids >= 0, torch.arange(R * many), -1)
    sample = module.draw(
        means_RD, logvars_RD, RNG, ids, num_samples=2, prior=lambda z_ND: standard.log_prob(z_ND).sum(-1)
    )
    estimates = sample.kl.view(R, many).T
    error_R = estimates.std(0) * len(estimates) ** -0.5
    assert ((estimates.mean(0) - exact.kl).abs() <= 4.5 * error_R).all()
    assert (error_R[REAL] > 0).all()


def test_sampled_kl_and_its_gradients_are_those_of_the_formula_in_fp64() -> None:
    mean_RD, logvar_RD = (x.detach() for x in posterior("gaussian")(encoded(), weights()))
    centre_D, samples = torch.linspace(-1.0, 1.0, D, dtype=torch.float64), 3
    upstream_R = torch.arange(1.0, R + 1, dtype=torch.float64)
    results = []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (mean_RD, logvar_RD, centre_D)]
        mean, logvar, centre = leaves

        def log_prior(z: torch.Tensor, centre: torch.Tensor = centre) -> torch.Tensor:
            return -torch.log1p((z - centre).square()).sum(-1)

        if ours:
            kl_R = posterior("gaussian").draw(mean, logvar, RNG, IDS, num_samples=samples, prior=log_prior).kl
        else:
            noise_KRD = philox_normal(RNG, IDS, D, num_samples=samples, stream=0).double()
            z_KRD = mean + (0.5 * logvar).exp() * noise_KRD
            entropy_R = distributions.Normal(mean, (0.5 * logvar).exp()).entropy().sum(-1)
            kl_R = torch.where(REAL, -entropy_R - log_prior(z_KRD).mean(0), 0.0)
        (kl_R * upstream_R).sum().backward()
        results.append([kl_R.detach(), *(x.grad for x in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_kl_under_another_prior_has_no_dimensions_and_no_free_bits() -> None:
    module = posterior("gaussian")
    sample = module.draw(*module(encoded(), weights()), RNG, IDS, free_bits=100.0, prior=mixture)
    assert torch.equal(sample.kl, sample.kl_free)
    assert sample.kl_per_dim.numel() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prior", [None, mixture])
def test_padding_gives_exact_zeros_whatever_it_holds(kind: str, prior: Callable | None) -> None:
    module = posterior(kind)
    leaves = [x.detach().clone() for x in module(encoded(), weights())]
    for leaf in leaves:
        leaf[~REAL] = math.nan
        leaf.requires_grad_()
    sample = module.draw(*leaves, RNG, IDS, num_samples=2, prior=prior)
    for output in (sample.z, sample.log_q, sample.log_p):
        assert (output[:, ~REAL] == 0.0).all()
    assert (sample.kl[~REAL] == 0.0).all() and (sample.kl_free[~REAL] == 0.0).all()
    weighted_sum(sample).backward()
    for leaf in leaves[: 1 if kind == "vmf" else 2]:
        assert (leaf.grad[~REAL] == 0.0).all()
        assert leaf.grad[REAL].isfinite().all() and (leaf.grad[REAL] != 0.0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_drawn_alike_alone_and_in_company(kind: str) -> None:
    module = posterior(kind, torch.float32).eval()
    mean_RD, logvar_RD = module(encoded(torch.float32), weights())
    together = module.draw(mean_RD, logvar_RD, RNG, IDS, num_samples=3, stream=6)
    for row in (0, 3):
        part = slice(row, row + 1)
        alone = module.draw(mean_RD[part], logvar_RD[part], RNG, IDS[part], num_samples=3, stream=6)
        torch.testing.assert_close(alone.z, together.z[:, part], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone.log_q, together.log_q[:, part], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone.kl, together.kl[part], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_depends_on_key_row_sample_and_stream(kind: str) -> None:
    module = posterior(kind, torch.float32)
    mean_RD, logvar_RD = (x[:1].expand(R, D) for x in module(encoded(torch.float32), weights()))
    ids = torch.arange(R)
    z = module.draw(mean_RD, logvar_RD, RNG, ids, num_samples=2).z
    again = module.draw(mean_RD, logvar_RD, RNG, ids, num_samples=2).z
    other_key = module.draw(mean_RD, logvar_RD, RNG + 1, ids, num_samples=2).z
    other_stream = module.draw(mean_RD, logvar_RD, RNG, ids, num_samples=2, stream=1).z
    assert torch.equal(z, again)
    distinct = torch.cat([z, other_key, other_stream]).flatten(0, 1)
    assert len(distinct.unique(dim=0)) == len(distinct)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_of_a_draw_is_that_of_its_law(kind: str) -> None:
    module = posterior(kind)
    mean_RD, logvar_RD = module(encoded(), torch.ones(R))
    ids = torch.arange(R)
    sample = module.draw(mean_RD, logvar_RD, RNG, ids, num_samples=4)
    if kind == "vmf":
        pairs_KRR = module.law.log_density(sample.z.flatten(0, 1), mean_RD).view(4, R, R)
        expected_KR = pairs_KRR.diagonal(dim1=1, dim2=2)
    else:
        expected_KR = distributions.Normal(mean_RD, (0.5 * logvar_RD).exp()).log_prob(sample.z).sum(-1)
    torch.testing.assert_close(sample.log_q, expected_KR, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_negative_entropy_is_the_mean_log_density(kind: str) -> None:
    module = posterior(kind)
    mean_RD, logvar_RD = module(encoded(), weights())
    found_R = module.negative_entropy(mean_RD, logvar_RD)
    if kind != "vmf":
        entropy_R = distributions.Normal(mean_RD, (0.5 * logvar_RD).exp()).entropy().sum(-1)
        torch.testing.assert_close(found_R, -entropy_R, rtol=1e-12, atol=0.0)
    log_q_KR = module.draw(mean_RD, logvar_RD, RNG, torch.arange(R), num_samples=2000).log_q
    assert ((log_q_KR.mean(0) - found_R).abs() < 5.0 * log_q_KR.std(0) * 2000**-0.5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_densities_are_float32_under_autocast(kind: str) -> None:
    module = posterior(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mean_RD, logvar_RD = module(encoded(torch.float32), weights())
        sample = module.draw(mean_RD, logvar_RD, RNG, IDS, prior=mixture)
    assert {x.dtype for x in (mean_RD, logvar_RD, *sample)} == {torch.float32}
    # What bfloat16 rounded is the linear map alone.
    exact = module.draw(mean_RD, logvar_RD, RNG, IDS, prior=mixture)
    assert all(torch.equal(a, b) for a, b in zip(sample, exact, strict=True))


@pytest.mark.parametrize("delta", [1e-4, 0.01, 0.15, 1.0, 8.0])
def test_delta_variances_are_between_the_roots(delta: float) -> None:
    module = DeltaPosterior(1, 1, delta)
    # ln v - v + c = 0 is v = -W(-exp(-c)), on the two real branches of Lambert's function.
    argument = -math.exp(-(2.0 * delta + 1.0))
    for std, branch in zip(module.std_range, (0, -1), strict=True):
        assert std**2 == pytest.approx(float(-special.lambertw(argument, branch).real), rel=1e-6)
        assert math.log(std**2) - std**2 + 2.0 * delta + 1.0 == pytest.approx(0.0, abs=1e-12)


def delta_parts(delta: float, raw_mean: float, raw_std: float) -> tuple[DeltaPosterior, torch.Tensor]:
    """A posterior of one dimension whose raw outputs are the two inputs."""
    module = DeltaPosterior(2, 1, delta)
    with torch.no_grad():
        module.weight.copy_(torch.eye(2))
        module.bias.zero_()
    return module, torch.tensor([[raw_mean, raw_std]], requires_grad=True)


RAW = st.one_of(st.floats(-40.0, 40.0, width=32), st.floats(-1e8, 1e8, width=32))


@settings(max_examples=150, deadline=None)
@given(delta=st.floats(1e-3, 8.0), raw_mean=RAW, raw_std=RAW)
def test_delta_kl_is_the_committed_rate_and_half_the_positive_raw_mean(
    delta: float, raw_mean: float, raw_std: float
) -> None:
    module, h_RH = delta_parts(delta, raw_mean, raw_std)
    mean_RD, logvar_RD = module(h_RH, torch.ones(1))
    kl = module.draw(mean_RD, logvar_RD, RNG, torch.tensor([1])).kl[0]
    expected = delta + max(0.0, raw_mean) / 2.0
    # The floor under the square root adds at most half of it, at the ends of the range of variances.
    assert expected * (1.0 - 2e-6) <= kl.item() <= expected * (1.0 + 2e-6) + 0.51e-4 * delta
    if abs(raw_std) < 4.0:
        assert kl.item() == pytest.approx(expected, rel=2e-6)
    kl.backward()
    assert h_RH.grad.isfinite().all() and module.weight.grad.isfinite().all()
    mean_RD, logvar_RD = module(h_RH, torch.ones(1))
    slope = torch.autograd.grad(mean_RD.sum() + logvar_RD.sum(), h_RH)[0]
    assert slope.isfinite().all() and slope.abs().max() < 100.0 * max(1.0, delta)


def test_delta_gradients_are_those_of_finite_differences() -> None:
    module = DeltaPosterior(H, D, 0.15).double()
    assert torch.autograd.gradcheck(lambda h_RH: module(h_RH, weights()), (encoded().requires_grad_(),))


def test_vmf_means_have_a_direction_even_for_an_output_of_zero() -> None:
    module = posterior("vmf")
    with torch.no_grad():
        module.bias.zero_()
    h_RH = encoded().index_fill(0, torch.tensor([1]), 0.0).requires_grad_()
    mean_RD, _ = module(h_RH, weights())
    expected_RD = F.normalize(h_RH.detach() @ module.weight.T.detach(), dim=-1)
    expected_RD[1] = torch.eye(D, dtype=torch.float64)[0]
    torch.testing.assert_close(mean_RD, expected_RD, rtol=1e-12, atol=1e-14)
    weighted_sum(module.draw(mean_RD, torch.zeros_like(mean_RD), RNG, IDS)).backward()
    assert h_RH.grad.isfinite().all() and (h_RH.grad[1] == 0.0).all() and (h_RH.grad[0] != 0.0).all()


def test_vmf_gradients_through_the_whole_posterior_are_those_of_finite_differences() -> None:
    module = posterior("vmf")

    def loss(h_RH: torch.Tensor) -> torch.Tensor:
        return weighted_sum(module.draw(*module(h_RH, weights()), RNG, IDS, num_samples=2, prior=mixture))

    assert torch.autograd.gradcheck(loss, (encoded().requires_grad_(),))


def test_vmf_with_one_dimension_is_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"latent_dim = 1 .* Use a model\.latent_dim of 2 or more"):
        build_posterior(ModelConfig(latent_dim=1, posterior=VmfConfig()), H)
