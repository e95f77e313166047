"""Which updates are left out: those whose gradient is not finite, or a spike beside those before it.

Decided and counted on the device, so that no step waits for the host. A left-out update leaves weights, moments and
their counts as they are, bit for bit: the fused optimizers of torch take a flag for that.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch

# OLMo-core looks back as far, for a limit of mean + 6 sigma; a median is not moved by the spikes themselves.
_NORMS = 128


class SkipRule:
    """Judges the global gradient norm of each step, the same on every rank.

    Args:
        spike_factor: leave out what is above this many times the median norm of the last 128 updates that were made;
            None for none. Before there are so many, only what is not finite is left out.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, spike_factor: float | None) -> None:
        self._engine, self._factor = engine, spike_factor
        device = next(engine.module.parameters()).device
        self._norms = torch.zeros(_NORMS, device=device)
        self._made = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._norm: torch.Tensor | None = None
        self._verdict: torch.Tensor | None = None
        sharded = engine.zero_optimization_stage() > 0
        inner = engine.optimizer.optimizer if sharded else engine.optimizer
        inner.register_step_pre_hook(self._before_update)

    def step(self, norm: torch.Tensor | None) -> torch.Tensor:
        """Make the engine's step, or leave it out; whether it was left out, bool[] on the device.

        Args:
            norm: L2 norm of the whole gradient; None where DeepSpeed measures it itself (ZeRO 1 to 3).
        """
        self._norm, self._verdict = norm, None
        self._engine.step()
        if self._verdict is None:
            # DeepSpeed itself found that the gradient is not finite, and made no update.
            self._judge(torch.tensor(torch.inf, device=self._norms.device))
        assert self._verdict is not None
        return self._verdict

    def restart(self) -> None:
        """Forget the norms: another phase has others."""
        self._made.zero_()

    def state(self) -> dict[str, Any]:
        """Fit for JSON: a resumed run judges as one that was not interrupted."""
        return {"norms": self._norms.tolist(), "made": int(self._made)} if self._factor else {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; an empty one is the beginning."""
        if state:
            self._norms.copy_(torch.tensor(state["norms"]))
            self._made.fill_(state["made"])

    @property
    def skipped(self) -> int:
        """Updates left out so far. Waits for the device."""
        return int(self._skipped)

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Where the optimizer's state is in several pieces it steps once for each.
        if self._verdict is None:
            norm = self._engine.optimizer._global_grad_norm if self._norm is None else self._norm
            self._judge(torch.as_tensor(norm, device=self._norms.device))
        optimizer.found_inf = self._verdict.float()  # type: ignore[attr-defined, union-attr]

    def _judge(self, norm: torch.Tensor) -> None:
        norm = norm.float()
        verdict = ~torch.isfinite(norm)
        if self._factor is not None:
            verdict |= (self._made >= _NORMS) & (norm > self._factor * self._norms.median())
            # Not by an index in brackets, which the host would have to know.
            place = (self._made % _NORMS)[None]
            self._norms.scatter_(0, place, torch.where(verdict, self._norms.gather(0, place), norm))
        self._made += ~verdict
        self._skipped += verdict
        self._verdict = verdict
