"""What the posterior tells: KL per dimension, active units, mutual information. float64 throughout.

Shapes: n latents (of sequences, or of tokens where each has its own), D latent dimensions.
"""

from __future__ import annotations

import math

import numpy as np

ACTIVE_UNIT_THRESHOLD = 0.01
MUTUAL_INFORMATION_LATENTS = 10_000
_CHUNK = 256


def kl_per_dim(mean: np.ndarray, logvar: np.ndarray) -> np.ndarray:
    """Mean over sequences of KL(q(z_d | x) || N(0, 1)), nats, float64[D]."""
    mean, logvar = mean.astype(np.float64), logvar.astype(np.float64)
    return (0.5 * (mean**2 + np.exp(logvar) - logvar - 1.0)).mean(axis=0)


def variance_of_mean(mean: np.ndarray) -> np.ndarray:
    """Variance over sequences of the posterior mean (divided by n - 1), float64[D]; zeros for n < 2."""
    return mean.astype(np.float64).var(axis=0, ddof=1) if len(mean) > 1 else np.zeros(mean.shape[1])


def active_units(mean: np.ndarray, threshold: float = ACTIVE_UNIT_THRESHOLD) -> int:
    """Dimensions whose posterior mean varies by at least `threshold` over the data (Burda et al. 2016)."""
    return int((variance_of_mean(mean) >= threshold).sum())


def mutual_information(
    mean: np.ndarray, logvar: np.ndarray, z: np.ndarray, concentration: float | None = None
) -> float:
    """I_q(x; z) = E log q(z | x) - E log q(z), nats (Hoffman and Johnson 2016; estimator of Li et al. 2019).

    Of Gaussians, or with `concentration` of von Mises-Fisher posteriors around `mean`. The first term is analytic for
    Gaussians; the second uses one z per latent and q(z) = mean of all n posteriors, its own included, so the value
    saturates near log n. At most 10,000 latents are used.
    """
    n = min(len(mean), MUTUAL_INFORMATION_LATENTS)
    mean, logvar, z = (a[:n].astype(np.float64) for a in (mean, logvar, z))
    if concentration is not None:
        # The normalising constant cancels between the two terms.
        own = concentration * (mean * z).sum(axis=1).mean()
        return float(own - _log_mean_density(z, concentration * mean, np.zeros_like(mean), np.zeros(n)).mean())
    log_2pi = math.log(2.0 * math.pi)
    negative_entropy = (-0.5 * (log_2pi + 1.0 + logvar).sum(axis=1)).mean()
    # log N(z; m, v) expands to matrix products: z . (m/v) - z^2 . (1/v) / 2 - (m^2/v + ...) / 2.
    precision = np.exp(-logvar)
    constant = -0.5 * (mean**2 * precision + logvar + log_2pi).sum(axis=1)
    return float(negative_entropy - _log_mean_density(z, mean * precision, -0.5 * precision, constant).mean())


def _log_mean_density(z: np.ndarray, linear: np.ndarray, square: np.ndarray, constant: np.ndarray) -> np.ndarray:
    """log of the mean over j of exp(linear_j . z + square_j . z^2 + constant_j), for each z; chunked over z."""
    found = np.empty(len(z))
    for start in range(0, len(z), _CHUNK):
        part = z[start : start + _CHUNK]
        log_density = part @ linear.T + part**2 @ square.T + constant
        top = log_density.max(axis=1, keepdims=True)
        found[start : start + _CHUNK] = top[:, 0] + np.log(np.exp(log_density - top).mean(axis=1))
    return found
