"""The von Mises-Fisher law against Bessel functions, closed forms, numeric integrals and moments.

Shapes: K samples, R rows, D dimensions.
"""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import integrate, stats

from vae_dist.model.vmf import VonMisesFisher
from vae_kernels.philox import COMPILE_ELEMENTS, philox_normal


def means(dim: int) -> torch.Tensor:
    """Unit vectors [5, D], float64: two general ones, e1, -e1, and one whose first coordinate is zero."""
    generator = torch.Generator().manual_seed(dim)
    mean_RD = torch.randn(5, dim, generator=generator, dtype=torch.float64)
    mean_RD[2:] = 0.0
    mean_RD[2, 0], mean_RD[3, 0], mean_RD[4, 1] = 1.0, -1.0, 1.0
    return torch.nn.functional.normalize(mean_RD, dim=-1)


def noise(rows: int, dim: int, samples: int) -> torch.Tensor:
    """Normals [K, R, D], in parts too small for the seconds of compiling that large draws are worth."""
    part = min(samples, (COMPILE_ELEMENTS - 1) // (rows * dim))
    steps = range(-(-samples // part))
    parts = [philox_normal(torch.tensor([7, s]), torch.arange(rows), dim, num_samples=part, stream=2) for s in steps]
    return torch.cat(parts)[:samples]


def drawn(dim: int, kappa: float, samples: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """(mean [5, D], z [K, 5, D], log_q [K, 5])."""
    mean_RD = means(dim).to(dtype)
    return mean_RD, *VonMisesFisher(dim, kappa).draw(mean_RD, noise(5, dim, samples))


def angle_cdf(angle: np.ndarray, dim: int, kappa: float) -> np.ndarray:
    """P(angle <= a) by Simpson's rule on a fine grid around the angles asked for."""
    grid = np.linspace(max(0.0, angle.min() * 0.7), min(math.pi, angle.max() * 1.3), 200_001)
    log_weight = (dim - 2) * np.log(np.sin(grid).clip(1e-300)) + kappa * (np.cos(grid) - 1.0)
    cumulative = integrate.cumulative_simpson(np.exp(log_weight - log_weight.max()), x=grid, initial=0.0)
    return np.interp(angle, grid, cumulative / cumulative[-1])


@pytest.mark.parametrize("dim", [2, 3, 4, 33, 128, 4000])
@pytest.mark.parametrize("kappa", [0.01, 1.0, 80.0, 1e4])
def test_constants_are_those_of_bessel_functions(dim: int, kappa: float) -> None:
    with mpmath.workdps(40):
        order, half, k = mpmath.mpf(dim) / 2 - 1, mpmath.mpf(dim) / 2, mpmath.mpf(kappa)
        bessel = mpmath.besseli(order, k)
        mean_cosine = mpmath.besseli(order + 1, k) / bessel
        log_normaliser = order * mpmath.log(k) - half * mpmath.log(2 * mpmath.pi) - mpmath.log(bessel)
        log_area = mpmath.log(2) + half * mpmath.log(mpmath.pi) - mpmath.loggamma(half)
        entropy = k * mean_cosine + log_normaliser
    law = VonMisesFisher(dim, kappa)
    assert law.mean_cosine == pytest.approx(float(mean_cosine), rel=1e-12)
    assert law.negative_entropy == pytest.approx(float(entropy), rel=1e-12, abs=1e-11)
    assert law.log_uniform == pytest.approx(float(-log_area), rel=1e-12)
    # The KL is a difference of numbers as large as log_area, so its own error is theirs.
    assert law.kl == pytest.approx(float(entropy + log_area), rel=1e-10, abs=1e-15 * (1 + abs(float(log_area))))


def test_kl_vanishes_with_the_concentration_as_its_square() -> None:
    # The leading term of the series: kappa^2 / (2 D).
    assert VonMisesFisher(5, 1e-3).kl == pytest.approx(1e-7, rel=1e-5)


@pytest.mark.parametrize(("dim", "kappa"), [(2, 1e4), (3, 0.5), (4, 1e4), (33, 1e-3), (33, 80.0), (1024, 500.0)])
def test_angles_follow_the_integrated_density(dim: int, kappa: float) -> None:
    normal = torch.linspace(-6.5, 6.5, 3001, dtype=torch.float64)
    angle = VonMisesFisher(dim, kappa)._angle(normal).numpy()
    np.testing.assert_allclose(angle_cdf(angle, dim, kappa), torch.special.ndtr(normal), atol=6e-7)


@pytest.mark.parametrize("kappa", [0.5, 50.0, 1e4])
def test_angles_in_three_dimensions_follow_the_closed_form(kappa: float) -> None:
    # The cosine has the density kappa exp(kappa w) / (2 sinh kappa).
    normal = torch.linspace(-6.5, 6.5, 3001, dtype=torch.float64)
    gap = 2.0 * np.sin(VonMisesFisher(3, kappa)._angle(normal).numpy() / 2) ** 2
    below = np.expm1(-kappa * gap) / math.expm1(-2.0 * kappa)
    np.testing.assert_allclose(below, torch.special.ndtr(normal), atol=6e-7)


@pytest.mark.parametrize(("dim", "kappa"), [(2, 3.0), (3, 50.0), (33, 80.0)])
def test_drawn_cosines_pass_kolmogorov_and_smirnov(dim: int, kappa: float) -> None:
    mean_RD, z_KRD, _ = drawn(dim, kappa, 6_000)
    angle = torch.acos((z_KRD * mean_RD).sum(-1).clamp(-1.0, 1.0)).flatten().numpy()
    assert stats.kstest(angle, lambda a: angle_cdf(np.asarray(a), dim, kappa)).pvalue > 1e-3


@pytest.mark.parametrize(("dim", "kappa"), [(2, 3.0), (3, 20.0), (9, 30.0)])
def test_first_two_moments_are_those_of_the_distribution(dim: int, kappa: float) -> None:
    samples = 20_000
    mean_RD, z_KRD, _ = drawn(dim, kappa, samples)
    cosine = VonMisesFisher(dim, kappa).mean_cosine
    square = 1.0 - (dim - 1) * cosine / kappa
    outer_RDD = mean_RD[:, :, None] * mean_RD[:, None]
    second_RDD = square * outer_RDD + (1.0 - square) / (dim - 1) * (torch.eye(dim) - outer_RDD)
    # Coordinates and their products are within [-1, 1]: five standard errors are less than 5 / sqrt(K).
    torch.testing.assert_close(z_KRD.mean(0), cosine * mean_RD, rtol=0.0, atol=5.0 * samples**-0.5)
    measured_RDD = torch.einsum("krd,kre->rde", z_KRD, z_KRD) / samples
    torch.testing.assert_close(measured_RDD, second_RDD, rtol=0.0, atol=5.0 * samples**-0.5)
    tangent_error = ((z_KRD.mean(0) - cosine * mean_RD) / ((1.0 - square) / (dim - 1)) ** 0.5).abs().max()
    assert tangent_error < 6.0 * samples**-0.5


@pytest.mark.parametrize(("dim", "kappa"), [(2, 0.5), (5, 40.0), (33, 1e4)])
def test_draws_are_unit_vectors_and_log_q_is_the_density_there(dim: int, kappa: float) -> None:
    mean_RD, z_KRD, log_q_KR = drawn(dim, kappa, 50)
    torch.testing.assert_close(z_KRD.norm(dim=-1), torch.ones(50, 5, dtype=torch.float64), rtol=0.0, atol=1e-14)
    pairs_KRR = VonMisesFisher(dim, kappa).log_density(z_KRD.flatten(0, 1), mean_RD).view(50, 5, 5)
    torch.testing.assert_close(pairs_KRR.diagonal(dim1=1, dim2=2), log_q_KR, rtol=0.0, atol=1e-11 + 1e-15 * kappa)


def test_float32_draws_are_the_float64_ones_rounded() -> None:
    _, z_KRD, log_q_KR = drawn(33, 1e4, 200)
    _, rounded_KRD, rounded_KR = drawn(33, 1e4, 200, torch.float32)
    torch.testing.assert_close(rounded_KRD.double(), z_KRD, rtol=0.0, atol=5e-7)
    torch.testing.assert_close(rounded_KR.double(), log_q_KR, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("kappa", [0.5, 20.0])
def test_density_integrates_to_one_on_circle_and_sphere(kappa: float) -> None:
    circle = VonMisesFisher(2, kappa)
    turn = torch.linspace(0.0, 2.0 * math.pi, 1001, dtype=torch.float64)[:-1]
    points_ND = torch.stack([turn.cos(), turn.sin()], dim=-1)
    area = circle.log_density(points_ND, means(2)).exp().mean(0) * 2.0 * math.pi
    torch.testing.assert_close(area, torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0.0)
    sphere = VonMisesFisher(3, kappa)
    height, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(60))
    ring = (1.0 - height.square()).sqrt()
    # Slices of equal height have equal area, so the integral is over height and turn.
    points_ND = torch.stack(
        [ring[:, None] * turn.cos(), ring[:, None] * turn.sin(), height[:, None].expand(-1, 1000)], dim=-1
    )
    density_HTR = sphere.log_density(points_ND.flatten(0, 1), means(3)).exp().view(60, 1000, 5)
    area = (weight[:, None] * density_HTR.mean(1) * 2.0 * math.pi).sum(0)
    torch.testing.assert_close(area, torch.ones(5, dtype=torch.float64), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize(("dim", "kappa"), [(2, 2.0), (7, 15.0), (33, 80.0)])
def test_kl_is_the_mean_of_log_q_over_uniform(dim: int, kappa: float) -> None:
    log_q_KR = drawn(dim, kappa, 8_000)[2]
    law = VonMisesFisher(dim, kappa)
    error = float(log_q_KR.std() * log_q_KR.numel() ** -0.5)
    assert abs(float(log_q_KR.mean()) - law.log_uniform - law.kl) < 5.0 * error
    assert abs(float(log_q_KR.mean()) - law.negative_entropy) < 5.0 * error


@pytest.mark.parametrize("dim", [2, 3, 6])
def test_gradient_of_a_draw_is_that_of_finite_differences(dim: int) -> None:
    law = VonMisesFisher(dim, 4.0)
    normal_KRD = noise(4, dim, 3)
    # Without the row whose first coordinate is zero, where draws jump. Off the sphere, so that all of it is checked.
    raw_RD = (1.5 * means(dim)[:4]).requires_grad_()

    def draw(raw_RD: torch.Tensor) -> torch.Tensor:
        return law.draw(torch.nn.functional.normalize(raw_RD, dim=-1), normal_KRD)[0]

    assert torch.autograd.gradcheck(draw, (raw_RD,))


@pytest.mark.parametrize(("dim", "kappa"), [(2, 3.0), (3, 10.0), (6, 10.0)])
def test_mean_gradient_of_draws_is_the_gradient_of_the_expectation(dim: int, kappa: float) -> None:
    # Also where draws jump as the mean moves (last row) and at the poles of the reflection.
    samples, law = 20_000, VonMisesFisher(dim, kappa)
    normal_KRD = noise(5, dim, samples)
    generator = torch.Generator().manual_seed(1)
    linear_D, square_DD = torch.randn(dim, generator=generator), torch.randn(dim, dim, generator=generator)
    linear_D, square_DD = linear_D.double(), square_DD.double()

    def value(z: torch.Tensor) -> torch.Tensor:
        return z @ linear_D + ((z @ square_DD) * z).sum(-1)

    raw_KRD = means(dim).expand(samples, 5, dim).clone().requires_grad_()
    # One mean a sample, so that every sample's gradient is seen and gives the standard error.
    flat_RD = torch.nn.functional.normalize(raw_KRD, dim=-1).flatten(0, 1)
    value(law.draw(flat_RD, normal_KRD.reshape(1, -1, dim))[0]).sum().backward()
    gradient_KRD = raw_KRD.grad
    raw_RD = means(dim).requires_grad_()
    mean_RD = torch.nn.functional.normalize(raw_RD, dim=-1)
    square = 1.0 - (dim - 1) * law.mean_cosine / kappa
    spread = (1.0 - square) / (dim - 1)
    along_R = ((mean_RD @ square_DD) * mean_RD).sum(-1)
    expectation_R = law.mean_cosine * mean_RD @ linear_D + (square - spread) * along_R + spread * square_DD.trace()
    expectation_R.sum().backward()
    error_RD = gradient_KRD.std(0) * samples**-0.5
    assert ((gradient_KRD.mean(0) - raw_RD.grad).abs() < 5.0 * error_RD + 1e-12).all()
