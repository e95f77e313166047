"""One optimizer step on one rank: micro-batches forward and backward, then the update."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from vae_dist.config.objective_schema import CapacityControl
from vae_dist.config.schema import Config
from vae_dist.data.stream.batch import Batch, Share, collate, micro_batches
from vae_dist.data.stream.order import mix
from vae_dist.engine.average import WeightAverage
from vae_dist.engine.controllers import Controllers
from vae_dist.engine.gradients import average_gradients, clip_in_update, gradient_norm
from vae_dist.engine.skip import SkipRule
from vae_dist.engine.zero import set_learning_rate
from vae_dist.objective.elbo import ElboTerms, loss_scale
from vae_dist.objective.schedule import beta_at, capacity_at, is_autoencoder, learning_rate_at
from vae_dist.observe.activity import Activity

# In an aggressive phase a step moves these or the rest (He et al. 2019).
_ENCODER_SIDE = ("vae.encoder.", "vae.posterior.")


class TrainStep:
    """Everything a step needs besides its data."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        config: Config,
        total_steps: int,
        controllers: Controllers | None = None,
        average: WeightAverage | None = None,
        activity: Activity | None = None,
    ) -> None:
        self.engine, self.config, self.total_steps = engine, config, total_steps
        self.controllers, self.average = controllers or Controllers(config, total_steps), average
        self.device = next(engine.module.parameters()).device
        self.skip_rule = SkipRule(engine, config.optimizer.skip_above_median)
        self.activity = activity or Activity(Path(config.run.storage), dist.get_rank(), self.device)
        self._is_whole = engine.zero_optimization_stage() == 0
        # DeepSpeed calls it at the end of its backward pass.
        reduce = self._reduce_whole if self._is_whole else engine.allreduce_gradients
        engine.allreduce_gradients = self.activity.span("reduce")(reduce)
        self._stage_zero_norm: torch.Tensor | None = None

    def batches(self, share: Share, should_stop: bool) -> tuple[list[Batch], bool]:
        """This rank's micro-batches, as many as the rank with the most has, and whether any rank must stop.

        One collective of two integers agrees on both, so no rank ever waits for one that has nothing to do.
        """
        batches = micro_batches(share, self.config.train.micro_batch_tokens)
        agreed = torch.tensor([len(batches), int(should_stop)], dtype=torch.int64)
        with self.activity.span("agree"):
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        empty = collate(share.sequences.take([]), share.sample_id[:0])
        batches += [empty] * (int(agreed[0]) - len(batches))
        return [batch.to(self.device) for batch in batches], bool(agreed[1])

    def __call__(self, step: int, batches: list[Batch], real_sequences: int) -> ElboTerms:
        """Accumulate the gradient of the global batch's loss and update the weights.

        Returns summed terms; all zero where the update was left out.
        """
        engine, train = self.engine, self.config.train
        engine.train()
        set_learning_rate(engine, self.learning_rate(step))
        rng = torch.tensor([train.seed, step], dtype=torch.int64, device=self.device)
        kl_weight = self.kl_weight(step)
        beta = torch.tensor(kl_weight, device=self.device)
        scale = torch.tensor(loss_scale(dist.get_world_size(), real_sequences), device=self.device)
        # Dropout is the one noise torch draws itself: seeded by position, a resumed run draws the same.
        torch.manual_seed(mix(train.seed, step, dist.get_rank()) >> 1)
        sums: ElboTerms | None = None
        for number, batch in enumerate(batches):
            engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            with self.activity.span("forward"):
                loss, terms = engine(batch, rng, beta, scale, self._capacity(step))
            with self.activity.span("backward"):
                # The loss is normalised already (see loss_scale).
                engine.backward(loss, scale_wrt_gas=False)
            sums = terms if sums is None else sums.plus(terms)
        assert sums is not None
        self._take_turns()
        if self._is_whole:
            self._stage_zero_norm = gradient_norm(engine.module.parameters())
            clip_in_update(engine.optimizer, self._stage_zero_norm, self.config.optimizer.gradient_clip_norm)
        with self.activity.span("optimizer"):
            left_out = self.skip_rule.step(self._stage_zero_norm)
        # What was left out was not trained on; its terms may be NaN, which no factor of 0 removes.
        sums = ElboTerms(*(term.masked_fill(left_out, 0.0) for term in sums))
        if self.average:
            self.average.update()
        self._inform_controllers(step, sums, kl_weight)
        return sums

    def kl_weight(self, step: int) -> float:
        """What the KL is multiplied with: the schedule's beta, or what a rate controller makes of it."""
        objective = self.config.objective
        beta, rate = beta_at(step, self.total_steps, objective), self.controllers.rate
        return beta if rate is None or is_autoencoder(step, self.total_steps, objective) else rate.weight(beta)

    def learning_rate(self, step: int) -> float:
        """The schedule's, cut as often as the validation reached a plateau."""
        factor = self.controllers.plateau.factor if self.controllers.plateau else 1.0
        return factor * learning_rate_at(step, self.total_steps, self.config.optimizer, self.config.objective)

    def gradient_norm(self) -> float | None:
        """Global L2 norm of the last step's gradient before clipping; None before the first step."""
        norm = self.engine.get_global_grad_norm() if self._stage_zero_norm is None else self._stage_zero_norm
        return None if norm is None else float(norm)

    def _capacity(self, step: int) -> torch.Tensor | None:
        objective = self.config.objective
        if not isinstance(objective.rate_control, CapacityControl):
            return None
        return torch.tensor(capacity_at(step, self.total_steps, objective), device=self.device)

    def _take_turns(self) -> None:
        """In an aggressive phase keep the encoder or all else as it is, its moments too: it gets no gradient."""
        aggressive = self.controllers.aggressive
        if aggressive is None or aggressive.turn == "both":
            return
        for name, parameter in self.engine.module.named_parameters():
            if name.startswith(_ENCODER_SIDE) != (aggressive.turn == "encoder"):
                parameter.grad = None

    def _inform_controllers(self, step: int, sums: ElboTerms, kl_weight: float) -> None:
        rate, aggressive = self.controllers.rate, self.controllers.aggressive
        if rate is None and aggressive is None:
            return
        totals = torch.stack([sums.kl, sums.rec, sums.sequences, sums.tokens]).double()
        dist.all_reduce(totals)
        kl, rec, sequences, tokens = totals.tolist()
        if not sequences:
            return
        if rate and not is_autoencoder(step, self.total_steps, self.config.objective):
            rate.update(kl / sequences)
        if aggressive:
            aggressive.after_step(rec + kl_weight * kl, tokens)

    def _reduce_whole(self) -> None:
        """Once for all micro-batches: at their last."""
        if self.engine.is_gradient_accumulation_boundary():
            average_gradients(self.engine.module.parameters())
