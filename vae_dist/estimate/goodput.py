"""Goodput where devices fail and runs go on from checkpoints, and when to save.

Goodput is what a run measures (`observe/wall_time.py`): the time of steps, repeated ones counted once, over wall time.

Failures are a Poisson process: device failures independent of each other and of age. A failure costs the work since the
last checkpoint and a restart, during which there may be others. All times are in seconds.

Source: Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006), sections 2 to 4;
Young, "A first order approximation to the optimum checkpoint interval" (1974).
`tests/unit/test_goodput.py` compares it with a simulation of 4,096 devices.
"""

from __future__ import annotations

import math

# Of a device, in hours: Llama 3 405B had 419 unexpected interruptions on 16,384 H100 in 54 days (Grattafiori et al.
# 2024, section 3.3.4), which is one in 50,700 device hours.
MTBF_HOURS = 50_000.0


def goodput(interval: float, save: float, restart: float, mtbf: float) -> float:
    """Daly's complete model, exact under its assumptions: interval / E[wall time from one checkpoint to the next].

    Args:
        interval: work between two checkpoints.
        save: that a checkpoint stops the work for.
        restart: from a failure to the next step.
        mtbf: of the whole system, a device's over the number of devices.
    """
    if math.isinf(mtbf):
        return interval / (interval + save)
    exponent = (interval + save + restart) / mtbf
    # exp(restart / mtbf) (exp((interval + save) / mtbf) - 1), whose first factor alone may overflow.
    if exponent > 700.0:
        return 0.0
    wall = mtbf * math.exp(restart / mtbf) * math.expm1((interval + save) / mtbf)
    return interval / wall


def best_interval(save: float, mtbf: float) -> float:
    """Daly's estimate of the best work between two checkpoints (equation 37): Young's sqrt(2 save mtbf), refined."""
    if save >= 2 * mtbf:
        return mtbf
    ratio = math.sqrt(save / (2 * mtbf))
    return math.sqrt(2 * save * mtbf) * (1 + ratio / 3 + ratio**2 / 9) - save
