"""A mixture of diagonal Gaussians, fitted by EM to latents that stay on the ranks that hold them.

Shapes: n rows on this rank (none is fine), N rows on all ranks, R rows at a time, C components, D latent dimensions;
S = 1 + 2 D sums of a component: its mass, and z and z^2 weighted by responsibility. float64 throughout, nats.

Where a process group has more than one rank, every public function is a collective call: the ranks reduce sums, which
are small, and the result depends on neither their number nor who holds which row, beyond rounding. EM runs in
coordinates of zero mean and unit variance, in which the square of a mean takes no digits from a variance.

Sources: Dempster, Laird, Rubin, "Maximum likelihood from incomplete data via the EM algorithm" (1977), section 4.3;
start: Arthur and Vassilvitskii, "k-means++" (2007); use: Ghosh et al., "From variational to deterministic autoencoders"
(2020), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from vae_dist.errors import DataError
from vae_dist.model.mixture import Components, log_joint, log_mixture
from vae_kernels import philox_uniform

# Tag of the noise that chooses the start, apart from those of training, evaluation and decoding.
_START_STREAM = 16
# Rows at a time: memory beyond the rows is flat, and noise is drawn in amounts that philox does not compile for.
_CHUNK_ROWS = 8192
# Components below this mass, in rows, have lost all of them.
_NO_MASS = 1e-12


@dataclass(frozen=True)
class MixtureFit:
    """What EM found.

    Attributes:
        mixture: C components; one that lost all rows has log weight -inf.
        gaussian: the single Gaussian with the mean and the variances of the same rows.
        log_likelihood: mean over rows at the start and after each iteration, never falling; the last is `mixture`'s.
        rows: N.
    """

    mixture: Components
    gaussian: Components
    log_likelihood: list[float]
    rows: int


@torch.no_grad()
def fit_mixture(
    z_nD: torch.Tensor,
    number_n: torch.Tensor,
    components: int,
    *,
    seed: int = 0,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
    variance_floor: float = 1e-3,
) -> MixtureFit:
    """Fit a mixture to the rows of all ranks.

    Args:
        z_nD: this rank's latents, on a device whose tensors the process group reduces.
        number_n: int64, a number of each row, another one for each row of the run: it says what the start's noise is.
        components: C.
        seed: of the start.
        max_iterations: of EM; 0 gives the start.
        tolerance: EM ends when the mean log-likelihood rises by less than this share of it (of a nat, where it is
            smaller than one).
        variance_floor: least variance of a component in a dimension, over the variance of all rows in it; of a
            dimension that does not vary, the variance itself.

    Raises:
        DataError: fewer rows than components, or numbers that are not finite; on every rank.
    """
    z_nD = z_nD.double()
    rows, centre_D, scale_D, varies_D = _moments(z_nD, components)
    x_nD = (z_nD - centre_D) / scale_D
    mixture = _start(x_nD, number_n, components, seed, rows, variance_floor)
    history: list[float] = []
    while True:
        sums_CS, log_likelihood = _expect(x_nD, mixture)
        history.append(log_likelihood / rows)
        if len(history) > max_iterations or _settled(history, tolerance):
            break
        mixture = _maximise(sums_CS, mixture, variance_floor)
    log_scale_D = scale_D.log()
    variance_D = torch.where(varies_D, scale_D.square(), variance_floor)
    return MixtureFit(
        mixture=Components(
            mixture.log_weight_C, centre_D + scale_D * mixture.mean_CD, mixture.logvar_CD + 2.0 * log_scale_D
        ),
        gaussian=Components(centre_D.new_zeros(1), centre_D[None], variance_D.log()[None]),
        log_likelihood=[value - float(log_scale_D.sum()) for value in history],
        rows=rows,
    )


@torch.no_grad()
def mean_log_density(log_density: Callable[[torch.Tensor], torch.Tensor], z_nD: torch.Tensor) -> float:
    """Mean of log p(z) over the rows of all ranks, in nats.

    `log_density` gives [R] for [R, D]: a prior, for one, with whole weights (ranks call it unequally often).

    Raises:
        DataError: no rank has a row.
    """
    total = z_nD.new_zeros(2, dtype=torch.float64)
    for part_RD in z_nD.split(_CHUNK_ROWS):
        total += torch.stack((log_density(part_RD).double().sum(), total.new_tensor(len(part_RD))))
    log_likelihood, rows = _all_reduce(total).tolist()
    if rows == 0:
        raise DataError("There are no latents to score. Give a split with at least one sequence.")
    return float(log_likelihood / rows)


def compare_fit(fit: MixtureFit, z_nD: torch.Tensor) -> dict[str, float]:
    """Mean log density, in nats, of rows that were not fitted: under the mixture, under one Gaussian, under N(0, I).

    Raises:
        DataError: no rank has a row.
    """
    z_nD = z_nD.double()
    zeros_1D = torch.zeros_like(fit.gaussian.mean_CD)
    contenders = {
        "mixture_nats": fit.mixture,
        "gaussian_nats": fit.gaussian,
        "standard_normal_nats": Components(zeros_1D[:, 0], zeros_1D, zeros_1D),
    }
    return {name: mean_log_density(partial(log_mixture, components=p), z_nD) for name, p in contenders.items()}


def _moments(z_nD: torch.Tensor, components: int) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the rows of all ranks: their number, their mean, a scale for each dimension, and which dimensions vary."""
    sums = _all_reduce(torch.cat((z_nD.new_tensor([len(z_nD)]), z_nD.sum(0))))
    rows, total_D = int(sums[0]), sums[1:]
    if rows < components:
        raise DataError(
            f"A mixture of {components} Gaussians cannot be fitted to {rows} latents. Set model.sampling_components "
            f"to at most {rows}, or fit to more sequences."
        )
    if not total_D.isfinite().all():
        raise DataError(
            "The latents that a mixture of Gaussians should be fitted to are not all finite. The model has diverged: "
            "take an older checkpoint, or train with a lower optimizer.learning_rate."
        )
    mean_D = total_D / rows
    deviation_D = (_all_reduce((z_nD - mean_D).square().sum(0)) / rows).sqrt()
    # What varies in the last digits alone is constant: rounding must not become the unit of length.
    varies_D = deviation_D > 1e-8 * mean_D.abs()
    return rows, mean_D, torch.where(varies_D, deviation_D, 1.0), varies_D


def _start(
    x_nD: torch.Tensor, number_n: torch.Tensor, components: int, seed: int, rows: int, variance_floor: float
) -> Components:
    """Equal weights, k-means++ rows as means, and the mean square distance to the nearest of them as variances."""
    mean_CD = x_nD.new_empty(components, x_nD.shape[1])
    weight_n, nearest_n = torch.ones_like(x_nD[:, 0]), torch.zeros_like(number_n)
    for turn in range(components):
        mean_CD[turn] = _choose_row(x_nD, weight_n, number_n, seed, turn)
        distance_n = (x_nD - mean_CD[turn]).square().sum(1)
        nearer_n = (distance_n < weight_n) | (turn == 0)
        weight_n, nearest_n = torch.where(nearer_n, distance_n, weight_n), torch.where(nearer_n, turn, nearest_n)
    variance_D = (_all_reduce((x_nD - mean_CD[nearest_n]).square().sum(0)) / rows).clamp(min=variance_floor)
    log_weight_C = x_nD.new_full((components,), -math.log(components))
    return Components(log_weight_C, mean_CD, variance_D.log().repeat(components, 1))


def _choose_row(
    x_nD: torch.Tensor, weight_n: torch.Tensor, number_n: torch.Tensor, seed: int, turn: int
) -> torch.Tensor:
    """A row of any rank, chosen in proportion to the weights: the one whose exponential clock rings first.

    A clock depends on the row's number, the seed and the turn, so the choice does not depend on who holds the row.
    """
    rng = torch.tensor([seed, turn], dtype=torch.int64, device=x_nD.device)
    digit_21 = torch.arange(2, device=x_nD.device)[:, None]
    parts = [philox_uniform(rng, part, digit_21, stream=_START_STREAM) for part in number_n.split(_CHUNK_ROWS)]
    digits_2n = torch.cat(parts, dim=1).double()
    # Two numbers of 24 bits: the first of many clocks rings early, where one would be coarse.
    time_n = -torch.log1p(-(digits_2n[0] + digits_2n[1] * 2.0**-24))
    time_n = time_n / weight_n.clamp(min=1e-300)
    candidate = x_nD.new_full((1 + x_nD.shape[1],), math.inf)
    if len(x_nD):
        first = time_n.argmin()
        candidate = torch.cat((time_n[first, None], x_nD[first]))
    candidates = [candidate]
    if _ranks() > 1:
        candidates = [torch.empty_like(candidate) for _ in range(_ranks())]
        dist.all_gather(candidates, candidate)
    return min(candidates, key=lambda c: float(c[0]))[1:]


def _expect(x_nD: torch.Tensor, mixture: Components) -> tuple[torch.Tensor, float]:
    """E-step over all ranks: the sums [C, S] and the log-likelihood of all rows."""
    count, dim = mixture.mean_CD.shape
    sums_CS, log_likelihood = x_nD.new_zeros(count, 1 + 2 * dim), x_nD.new_zeros(1)
    for x_RD in x_nD.split(_CHUNK_ROWS):
        log_joint_RC = log_joint(x_RD, mixture)
        log_density_R1 = log_joint_RC.logsumexp(1, keepdim=True)
        responsibility_RC = (log_joint_RC - log_density_R1).exp()
        sums_CS += responsibility_RC.T @ torch.cat((torch.ones_like(log_density_R1), x_RD, x_RD.square()), dim=1)
        log_likelihood += log_density_R1.sum()
    return _all_reduce(sums_CS), float(_all_reduce(log_likelihood))


def _maximise(sums_CS: torch.Tensor, mixture: Components, variance_floor: float) -> Components:
    """M-step under the floor, which keeps EM's promise: where the best variance is below the floor, the floor is best.

    A component that lost all rows keeps its place, with no weight.
    """
    dim = mixture.mean_CD.shape[1]
    mass_C1, first_CD, second_CD = sums_CS.split([1, dim, dim], dim=1)
    lives_C1 = mass_C1 > _NO_MASS
    mean_CD = torch.where(lives_C1, first_CD / mass_C1, mixture.mean_CD)
    variance_CD = torch.where(lives_C1, second_CD / mass_C1 - mean_CD.square(), mixture.logvar_CD.exp())
    mass_C = torch.where(lives_C1, mass_C1, 0.0)[:, 0]
    return Components((mass_C / mass_C.sum()).log(), mean_CD, variance_CD.clamp(min=variance_floor).log())


def _settled(history: list[float], tolerance: float) -> bool:
    return len(history) > 1 and history[-1] - history[-2] <= tolerance * max(1.0, abs(history[-1]))


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_reduce(sums: torch.Tensor) -> torch.Tensor:
    if _ranks() > 1:
        dist.all_reduce(sums)
    return sums
