"""What the posterior tells: KL per dimension, active units, mutual information. float64 throughout.

Shapes: n sequences, D latent dimensions.
"""

from __future__ import annotations

import math

import numpy as np

ACTIVE_UNIT_THRESHOLD = 0.01
_MUTUAL_INFORMATION_SEQUENCES = 10_000
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


def mutual_information(mean: np.ndarray, logvar: np.ndarray, z: np.ndarray) -> float:
    """I_q(x; z) = E log q(z | x) - E log q(z), nats (Hoffman and Johnson 2016; estimator of Li et al. 2019).

    The first term is analytic; the second uses one z per sequence and q(z) = mean of all n posteriors, the
    sequence's own included, so the value saturates near log n. At most 10,000 sequences are used.
    """
    n = min(len(mean), _MUTUAL_INFORMATION_SEQUENCES)
    mean, logvar, z = (a[:n].astype(np.float64) for a in (mean, logvar, z))
    log_2pi = math.log(2.0 * math.pi)
    negative_entropy = (-0.5 * (log_2pi + 1.0 + logvar).sum(axis=1)).mean()
    # log N(z; m, v) expands to matrix products: z^2 . (1/v) - 2 z . (m/v) + m^2/v.
    precision = np.exp(-logvar)
    constant = (mean**2 * precision + logvar + log_2pi).sum(axis=1)
    log_marginal = np.empty(n)
    for start in range(0, n, _CHUNK):
        part = z[start : start + _CHUNK]
        log_density = -0.5 * (part**2 @ precision.T - 2.0 * part @ (mean * precision).T + constant)
        top = log_density.max(axis=1, keepdims=True)
        log_marginal[start : start + _CHUNK] = top[:, 0] + np.log(np.exp(log_density - top).mean(axis=1))
    return float(negative_entropy - log_marginal.mean())
