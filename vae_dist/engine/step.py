"""One optimizer step on one rank: micro-batches forward and backward, then DeepSpeed's update."""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist

from vae_dist.config.schema import Config
from vae_dist.data.stream.batch import Batch, Share, collate, micro_batches
from vae_dist.data.stream.order import mix
from vae_dist.engine.zero import set_learning_rate
from vae_dist.objective.elbo import ElboTerms, loss_scale
from vae_dist.objective.schedule import beta_at, learning_rate_at


class TrainStep:
    """Everything a step needs besides its data."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: Config, total_steps: int) -> None:
        self.engine, self.config, self.total_steps = engine, config, total_steps
        self.device = next(engine.module.parameters()).device
        self._stage_zero_norm: torch.Tensor | None = None

    def batches(self, share: Share, should_stop: bool) -> tuple[list[Batch], bool]:
        """This rank's micro-batches, as many as the rank with the most has, and whether any rank must stop.

        One collective of two integers agrees on both, so no rank ever waits for one that has nothing to do.
        """
        batches = micro_batches(share, self.config.train.micro_batch_tokens)
        agreed = torch.tensor([len(batches), int(should_stop)], dtype=torch.int64)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        empty = collate(share.sequences.take([]), share.sample_id[:0])
        batches += [empty] * (int(agreed[0]) - len(batches))
        return [batch.to(self.device) for batch in batches], bool(agreed[1])

    def __call__(self, step: int, batches: list[Batch], real_sequences: int) -> ElboTerms:
        """Accumulate the gradient of the global batch's loss and update the weights; returns summed terms."""
        engine, train = self.engine, self.config.train
        engine.train()
        set_learning_rate(engine, learning_rate_at(step, self.total_steps, self.config.optimizer))
        rng = torch.tensor([train.seed, step], dtype=torch.int64, device=self.device)
        beta = torch.tensor(beta_at(step, self.total_steps, self.config.objective), device=self.device)
        scale = torch.tensor(loss_scale(dist.get_world_size(), real_sequences), device=self.device)
        # Dropout is the one noise torch draws itself: seeded by position, a resumed run draws the same.
        torch.manual_seed(mix(train.seed, step, dist.get_rank()) >> 1)
        sums: ElboTerms | None = None
        for number, batch in enumerate(batches):
            engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            loss, terms = engine(batch, rng, beta, scale)
            # The loss is normalised already (see loss_scale).
            engine.backward(loss, scale_wrt_gas=False)
            sums = terms if sums is None else sums.plus(terms)
        self._measure_gradient()
        engine.step()
        assert sums is not None
        return sums

    def gradient_norm(self) -> float | None:
        """Global L2 norm of the last step's gradient before clipping; None before the first step."""
        norm = self.engine.get_global_grad_norm() if self._stage_zero_norm is None else self._stage_zero_norm
        return None if norm is None else float(norm)

    def _measure_gradient(self) -> None:
        """At ZeRO-0 DeepSpeed clips and forgets the norm; it stays on the device until it is asked for."""
        if self.engine.zero_optimization_stage() == 0:
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            self._stage_zero_norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
