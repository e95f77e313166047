"""Metrics between two log lines: summed on the device, reduced over ranks once, when they are printed."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from vae_dist.evaluate.latent import ACTIVE_UNIT_THRESHOLD
from vae_dist.objective.elbo import ElboTerms


class MetricsWindow:
    """Collects the terms of each step; asks the device for nothing until `reduce`.

    `tokens_seen` counts target tokens of all ranks up to the last `reduce`, over restarts too.
    """

    def __init__(self, tokens_seen: int) -> None:
        self.tokens_seen = tokens_seen
        self._sums: ElboTerms | None = None
        self._steps = 0
        self._seconds = 0.0
        self._mark = time.monotonic()

    def add(self, terms: ElboTerms) -> None:
        """Add one step; its time runs since the last `add` or `skip_time`, waiting for data included."""
        self._sums = terms if self._sums is None else self._sums.plus(terms)
        self._steps += 1
        now = time.monotonic()
        self._seconds += now - self._mark
        self._mark = now

    def skip_time(self) -> None:
        """What passed since the last step was no training: a save or a validation."""
        self._mark = time.monotonic()

    def totals(self) -> tuple[int, float]:
        """Tokens seen up to now, and the summed loss of the open window (0.0 if it is empty). Collective."""
        if self._sums is None:
            return self.tokens_seen, 0.0
        sums = ElboTerms(*_all_reduce([*self._sums]))
        return self.tokens_seen + int(sums.tokens), float(sums.rec + sums.kl)

    def reduce(self, data_wait_seconds: float, alone_seconds: float) -> tuple[dict[str, Any] | None, list[float]]:
        """Averages over the window and all ranks, by metric name; starts a new window. Collective.

        Args:
            data_wait_seconds: how long this rank's steps of the window waited for data.
            alone_seconds: what this rank took in the window without waiting for others.

        Returns:
            The averages, None where every update of the window was left out; and every rank's `alone_seconds`.
        """
        assert self._sums is not None, "a window is reduced after a step was added"
        alone = self._sums.tokens.new_zeros(dist.get_world_size(), dtype=torch.float64)
        alone[dist.get_rank()] = alone_seconds
        *reduced, alone = _all_reduce([*self._sums, alone])
        sums = ElboTerms(*reduced)
        count, rows, tokens = float(sums.sequences), float(sums.rows), int(sums.tokens)
        if not count:
            self._sums, self._steps, self._seconds = None, 0, 0.0
            return None, alone.tolist()
        rec, kl = float(sums.rec) / count, float(sums.kl) / count
        # The variance of the posterior means over this window's latents: active units, live.
        variance = (sums.mean_square - sums.mean.square() / rows) / max(1.0, rows - 1.0)
        self.tokens_seen += tokens
        values = {
            "elbo_per_seq": -(rec + kl),
            "rec_per_seq": rec,
            "kl_per_seq": kl,
            "kl_counted_per_seq": float(sums.kl_counted) / count,
            "nll_per_token": (rec + kl) * count / tokens,
            "kl_per_dim": (sums.kl_per_dim / rows).tolist(),
            "active_units": int((variance >= ACTIVE_UNIT_THRESHOLD).sum()),
            "tokens_per_second": tokens / self._seconds,
            "step_seconds": self._seconds / self._steps,
            "data_wait_fraction": data_wait_seconds / self._seconds,
            "tokens_seen": self.tokens_seen,
        }
        self._sums, self._steps, self._seconds = None, 0, 0.0
        return values, alone.tolist()


def _all_reduce(sums: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sums over ranks, float64 on the host, in one collective."""
    shapes = [t.shape for t in sums]
    flat = torch.cat([t.detach().double().reshape(-1) for t in sums])
    dist.all_reduce(flat)
    parts = flat.cpu().split([shape.numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
