"""Our model and loss in a bare loop: batches that lie ready, torch's fused AdamW, no engine, no metrics."""

from __future__ import annotations

import copy
import itertools

import torch
from steps.ours import OurRun

from vae_dist.data.stream.batch import Batch
from vae_dist.objective.elbo import NegativeElbo, loss_scale

_READY_BATCHES = 16


class BareLoop:
    """What a step costs without everything around it."""

    def __init__(self, ours: OurRun) -> None:
        config = ours.run.config
        # From the weights it has now; a copy of the engine's module alone, without DeepSpeed's hooks on it.
        self._objective = NegativeElbo(copy.deepcopy(ours.vae), config.objective, ours.dtype).train()
        self._parameters = [p for p in self._objective.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=config.optimizer.learning_rate, fused=True)
        self._clip = config.optimizer.gradient_clip_norm
        self._batches = itertools.cycle(ours.next_batches(_READY_BATCHES))
        self._steps = 0

    def step(self) -> int:
        """One update; the real tokens of its batch."""
        batch, real_sequences = next(self._batches)
        self._update(batch, real_sequences)
        self._steps += 1
        return int(batch.offsets_B1[-1])

    def _update(self, batch: Batch, real_sequences: int) -> None:
        rng = torch.tensor([0, self._steps], dtype=torch.int64)
        loss, _ = self._objective(batch, rng, torch.tensor(1.0), torch.tensor(loss_scale(1, real_sequences)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
