"""Priors: densities against closed forms and integrals, gradients against differences, draws against densities."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.autograd.functional import jacobian
from torch.distributions import Normal

from vae_dist.config.model_schema import (
    FlowPriorConfig,
    MixturePriorConfig,
    ModelConfig,
    StandardPriorConfig,
    VampPriorConfig,
    VmfConfig,
)
from vae_dist.errors import ConfigError, ModelError
from vae_dist.model.mixture import Components, draw
from vae_dist.model.prior import (
    FittedMixture,
    FlowPrior,
    MixturePrior,
    Prior,
    SpherePrior,
    StandardPrior,
    VampPrior,
    build_prior,
    build_sampling_prior,
)

TOKENS, EMBEDDING = 3, 4


def shaken(prior: Prior, scale: float = 0.4, seed: int = 0) -> Prior:
    """The prior in float64 with every parameter moved at random, so that nothing is at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prior.double().parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return prior


class Reader(nn.Module):
    """A toy encoder: mean and log-variance are linear in the mean of the embeddings up to a sequence's length."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(EMBEDDING, 2 * dim).double()

    def forward(self, x_BTE: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        real = torch.arange(x_BTE.shape[1]) < lengths_B[:, None]
        mean, logvar = self.linear((x_BTE * real[..., None]).sum(1) / lengths_B[:, None]).chunk(2, dim=-1)
        return mean, logvar


def priors(dim: int) -> dict[str, Prior]:
    torch.manual_seed(0)
    flow = {"flow": shaken(FlowPrior(dim, 3, 8))} if dim > 1 else {}
    return flow | {
        "standard": StandardPrior(),
        "mixture": shaken(MixturePrior(3, dim), 0.8),
        "vamp": shaken(VampPrior(3, TOKENS, EMBEDDING), 1.5),
    }


def density(name: str, dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    prior, encode = priors(dim)[name], Reader(dim)
    return lambda z_RD: prior(z_RD, encode)


def naive(z_RD: torch.Tensor, mixture: Components) -> torch.Tensor:
    log_weight_C, mean_CD, logvar_CD = (part.double() for part in mixture)
    each_RC = Normal(mean_CD, (logvar_CD / 2).exp()).log_prob(z_RD.double()[:, None]).sum(-1)
    return (log_weight_C + each_RC).logsumexp(-1)


def normals(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniforms(count: int, seed: int = 4) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_standard_prior_is_the_product_of_normal_densities() -> None:
    z_RD = 3 * normals(50, 7)
    np.testing.assert_allclose(StandardPrior()(z_RD), stats.norm.logpdf(z_RD).sum(1), rtol=1e-12)
    assert torch.equal(StandardPrior().from_noise(z_RD, uniforms(50)), z_RD)


@pytest.mark.parametrize(("dim", "area"), [(1, 2.0), (2, 2 * math.pi), (3, 4 * math.pi), (4, 2 * math.pi**2)])
def test_the_prior_on_the_sphere_is_one_over_its_area(dim: int, area: float) -> None:
    z_RD = SpherePrior().from_noise(normals(20, dim), uniforms(20))
    torch.testing.assert_close(z_RD.norm(dim=1), torch.ones(20).double())
    torch.testing.assert_close(SpherePrior()(z_RD), torch.full((20,), -math.log(area)).double())
    assert SpherePrior()(z_RD.bfloat16()).dtype == torch.float32


def test_draws_on_the_sphere_have_uniform_heights() -> None:
    # Archimedes: on the sphere in three dimensions every coordinate is uniform on [-1, 1].
    z_RD = SpherePrior().from_noise(normals(4000, 3), uniforms(4000))
    for d in range(3):
        assert stats.kstest(z_RD[:, d].numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", ["standard", "mixture", "vamp"])
def test_densities_on_the_line_integrate_to_one(name: str) -> None:
    z_RD = torch.linspace(-40, 40, 40_001, dtype=torch.float64)[:, None]
    assert torch.trapezoid(density(name, 1)(z_RD).exp(), z_RD[:, 0]).item() == pytest.approx(1.0, abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["standard", "mixture", "vamp", "flow"])
def test_densities_in_the_plane_integrate_to_one(name: str) -> None:
    axis = torch.linspace(-40, 40, 801, dtype=torch.float64)
    total = density(name, 2)(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1.0, abs=1e-6)


def test_the_mixture_keeps_nothing_of_rows_times_components_times_dimensions() -> None:
    rows, components, dim = 40, 30, 20
    sizes = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    prior = MixturePrior(components, dim)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        prior(torch.randn(rows, dim, requires_grad=True))
    assert max(sizes) == rows * components


@pytest.mark.parametrize("name", ["standard", "mixture", "vamp", "flow"])
def test_gradients_of_densities_against_finite_differences(name: str) -> None:
    prior, encode = priors(3)[name], Reader(3)
    names, values = (
        zip(*[*prior.named_parameters(), *encode.named_parameters()], strict=True) if name != "standard" else ((), ())
    )

    def log_p(z_RD: torch.Tensor, *moved: torch.Tensor) -> torch.Tensor:
        own = {n: v for n, v in zip(names, moved, strict=True) if not n.startswith("linear")}
        of_encoder = {n: v for n, v in zip(names, moved, strict=True) if n.startswith("linear")}

        def encode_moved(*arguments):
            return torch.func.functional_call(encode, of_encoder, arguments)

        return torch.func.functional_call(prior, own, (z_RD, encode_moved))

    inputs = [normals(4, 3).requires_grad_(), *(v.detach().clone().requires_grad_() for v in values)]
    assert torch.autograd.gradcheck(log_p, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixture", "vamp", "flow"])
def test_every_parameter_of_a_learned_prior_gets_a_gradient(name: str) -> None:
    prior, encode = priors(3)[name], Reader(3)
    prior(normals(5, 3), encode).sum().backward()
    for label, parameter in prior.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, label
    assert (encode.linear.weight.grad is not None) == (name == "vamp")


@pytest.mark.parametrize("name", ["standard", "mixture", "flow"])
def test_densities_and_draws_are_float32_and_exact_under_autocast(name: str) -> None:
    prior, z_RD = priors(5)[name].float(), normals(9, 5).float()
    noise = (z_RD, uniforms(9).float())
    with torch.autocast("cpu", torch.bfloat16):
        found, drawn = prior(z_RD), prior.from_noise(*noise)
        assert found.dtype == prior(z_RD.bfloat16()).dtype == torch.float32
    assert torch.equal(found, prior(z_RD))
    assert torch.equal(drawn, prior.from_noise(*noise))


@pytest.mark.parametrize("name", ["standard", "mixture", "vamp", "flow"])
def test_what_is_drawn_for_a_row_does_not_depend_on_its_company(name: str) -> None:
    prior, encode, normal_RD, uniform_R = priors(5)[name], Reader(5), normals(9, 5), uniforms(9)
    together = prior.from_noise(normal_RD, uniform_R, encode)
    for r in range(9):
        alone = prior.from_noise(normal_RD[r, None], uniform_R[r, None], encode)
        torch.testing.assert_close(alone[0], together[r], rtol=1e-12, atol=1e-12)


def test_a_fresh_mixture_has_zero_mean_and_unit_variance_and_different_components() -> None:
    torch.manual_seed(0)
    prior = MixturePrior(400, 60)
    log_weight_C, mean_CD, logvar_CD = prior.components()
    torch.testing.assert_close(log_weight_C.exp(), torch.full((400,), 1 / 400).double())
    variance = logvar_CD.exp().mean() + mean_CD.var(0, correction=0).mean()
    # 24,000 means of variance 0.1: the mean square has a standard error of 0.001.
    assert variance.item() == pytest.approx(1.0, abs=0.005)
    assert mean_CD.mean().abs() < 5 * (0.1 / 24_000) ** 0.5
    assert torch.pdist(mean_CD).min() > 1


def test_the_vamp_prior_is_the_average_of_the_posteriors_of_its_pseudo_inputs() -> None:
    prior, encode = shaken(VampPrior(4, TOKENS, EMBEDDING), 1.0), Reader(2)
    mean_CD, logvar_CD = (part.detach().numpy() for part in encode.linear(prior.pseudo_CTE.mean(1)).chunk(2, dim=-1))
    z_RD = normals(30, 2)
    each_CR = [stats.norm.pdf(z_RD.numpy(), m, np.exp(v / 2)).prod(1) for m, v in zip(mean_CD, logvar_CD, strict=True)]
    found = prior(z_RD, encode).detach()
    np.testing.assert_allclose(found, np.log(np.mean(each_CR, axis=0)), rtol=1e-10)
    noise, quarters = normals(4, 2), (torch.arange(4.0) + 0.5) / 4
    drawn = prior.from_noise(noise, quarters, encode).detach()
    np.testing.assert_allclose(drawn, mean_CD + np.exp(logvar_CD / 2) * noise.numpy(), rtol=1e-12)
    with pytest.raises(TypeError, match="encode"):
        prior(z_RD)


def test_a_vamp_prior_over_tokens_averages_the_posteriors_of_all_pseudo_tokens() -> None:
    prior, linear = shaken(VampPrior(4, TOKENS, EMBEDDING), 1.0), Reader(2).linear

    def encode(x_BTE: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = linear(x_BTE).chunk(2, dim=-1)
        return mean, logvar

    mean_CD, logvar_CD = linear(prior.pseudo_CTE.reshape(-1, EMBEDDING)).chunk(2, dim=-1)
    z_RD = normals(30, 2)
    expected = naive(z_RD, Components(torch.full((12,), 1 / 12, dtype=torch.float64).log(), mean_CD, logvar_CD))
    torch.testing.assert_close(prior(z_RD, encode), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dim", [2, 3, 5, 6])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_flow_changes_volume_by_the_determinant_of_its_jacobian(dim: int, layers: int) -> None:
    prior = shaken(FlowPrior(dim, layers, 8))
    assert isinstance(prior, FlowPrior)

    def to_noise(z_D: torch.Tensor) -> torch.Tensor:
        u_RD = z_D[None]
        for layer in prior.layers:
            u_RD = layer(u_RD)[0]
        return u_RD[0]

    for z_D in 2 * normals(4, dim):
        change = torch.linalg.slogdet(jacobian(to_noise, z_D)).logabsdet
        assert change.abs() > 1e-3
        expected = stats.norm.logpdf(to_noise(z_D).detach()).sum() + change.item()
        assert prior(z_D[None]).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("dim", [2, 3, 6])
def test_the_flow_draws_from_the_density_that_it_states(dim: int) -> None:
    prior = shaken(FlowPrior(dim, 4, 8))

    def from_noise(u_D: torch.Tensor) -> torch.Tensor:
        return prior.from_noise(u_D[None], uniforms(1))[0]

    for u_D in normals(4, dim):
        change = torch.linalg.slogdet(jacobian(from_noise, u_D)).logabsdet.item()
        expected = stats.norm.logpdf(u_D).sum() - change
        assert prior(from_noise(u_D)[None]).item() == pytest.approx(expected, abs=1e-10)


def test_the_flow_is_inverted_in_float32_also_where_its_networks_shout() -> None:
    prior = shaken(FlowPrior(7, 4, 8), 1.0).float()
    assert isinstance(prior, FlowPrior)
    u_RD = normals(50, 7).float()
    back_RD = prior.from_noise(u_RD, uniforms(50))
    for layer in prior.layers:
        back_RD, log_det_R = layer(back_RD)
        # Four of seven dimensions at most, each by at most two nats.
        assert log_det_R.abs().max() <= 8.001
    torch.testing.assert_close(back_RD, u_RD, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dim", [2, 5])
def test_the_flow_starts_as_the_standard_normal_and_every_dimension_can_move(dim: int) -> None:
    fresh, z_RD = FlowPrior(dim, 2, 8), normals(9, dim).float()
    assert torch.equal(fresh(z_RD), StandardPrior()(z_RD))
    assert torch.equal(fresh.from_noise(z_RD, uniforms(9)), z_RD)
    moved = shaken(fresh).from_noise(z_RD.double(), uniforms(9))
    assert (moved - z_RD).abs().max(0).values.min() > 0.1


def test_draws_of_the_flow_follow_its_density() -> None:
    prior = shaken(FlowPrior(2, 3, 8), 0.6, seed=1)
    with torch.no_grad():
        z_RD = prior.from_noise(normals(4000, 2), uniforms(4000)).numpy()
        axis = torch.linspace(-20, 20, 801, dtype=torch.float64)
        p_XY = prior(torch.cartesian_prod(axis, axis)).exp().view(801, 801).numpy() * 0.05**2
    assert p_XY.sum() == pytest.approx(1.0, abs=1e-4)
    for d in range(2):
        # Cell masses end half a cell to the right of their centres.
        cdf = np.cumsum(p_XY.sum(1 - d))
        assert stats.kstest(z_RD[:, d], lambda x, c=cdf: np.interp(x, axis.numpy() + 0.025, c)).pvalue > 1e-3
        assert stats.kstest(z_RD[:, d], stats.norm.cdf).pvalue < 1e-6


def test_a_fitted_mixture_is_saved_as_it_was_stored_and_trains_nothing() -> None:
    learned = priors(2)["mixture"]
    assert isinstance(learned, MixturePrior)
    mixture = learned.components()
    config = ModelConfig(latent_dim=2, sampling_components=3)
    fitted, loaded = build_sampling_prior(config), build_sampling_prior(config)
    assert list(fitted.parameters()) == []
    fitted.store(mixture)
    loaded.load_state_dict(fitted.state_dict())
    z_RD = normals(50, 2)
    torch.testing.assert_close(loaded(z_RD), naive(z_RD, mixture), rtol=1e-5, atol=1e-5)
    noise = (normals(50, 2).float(), uniforms(50).float())
    torch.testing.assert_close(loaded.from_noise(*noise), draw(*noise, mixture), rtol=1e-5, atol=1e-5)


def test_a_mixture_that_was_never_fitted_refuses_to_draw() -> None:
    fitted = FittedMixture(3, 2)
    for call in (lambda: fitted.from_noise(normals(4, 2), uniforms(4)), lambda: fitted(normals(4, 2))):
        with pytest.raises(ModelError, match=r"not fitted yet.*sample from the prior"):
            call()


def test_the_configuration_names_the_prior() -> None:
    built = {
        StandardPrior: build_prior(ModelConfig(prior=StandardPriorConfig())),
        SpherePrior: build_prior(ModelConfig(prior=StandardPriorConfig(), posterior=VmfConfig())),
        MixturePrior: build_prior(ModelConfig(prior=MixturePriorConfig(components=6), latent_dim=3)),
        VampPrior: build_prior(ModelConfig(prior=VampPriorConfig(components=6, pseudo_tokens=2), embedding_dim=7)),
        FlowPrior: build_prior(ModelConfig(prior=FlowPriorConfig(layers=3, hidden_dim=9), latent_dim=5)),
    }
    assert all(type(prior) is kind for kind, prior in built.items())
    shapes = {kind: [tuple(p.shape) for p in prior.parameters()] for kind, prior in built.items()}
    assert shapes[MixturePrior] == [(6,), (6, 3), (6, 3)]
    assert shapes[VampPrior] == [(6, 2, 7)]
    assert len(shapes[FlowPrior]) == 3 * 6 and shapes[FlowPrior][0] == (9, 2) and shapes[FlowPrior][6] == (9, 3)


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (build_prior, ModelConfig(prior=FlowPriorConfig(), latent_dim=1), "latent_dim = 1 has no halves"),
        (build_prior, ModelConfig(prior=FlowPriorConfig(), posterior=VmfConfig()), "kind = flow is a density in space"),
        (build_prior, ModelConfig(prior=VampPriorConfig(), posterior=VmfConfig()), "Use model.prior.kind=standard"),
        (build_sampling_prior, ModelConfig(sampling_components=5, posterior=VmfConfig()), "sampling_components = 5"),
    ],
)  # fmt: skip
def test_priors_that_cannot_work_are_refused(
    build: Callable[[ModelConfig], Prior], config: ModelConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(config)
