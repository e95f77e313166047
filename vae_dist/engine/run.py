"""A training run on one rank: its parts, and what happens around the steps: log, validate, save, begin a phase."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from vae_dist.config.schema import Config
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.stream.stream import Stream
from vae_dist.data.stream.training_data import TrainingData, training_split
from vae_dist.engine.average import WeightAverage
from vae_dist.engine.build import build_objective
from vae_dist.engine.checkpoint import CheckpointWriter, Written, load_newest
from vae_dist.engine.checkpoint_files import Progress
from vae_dist.engine.controllers import Controllers
from vae_dist.engine.ledger import Ledger
from vae_dist.engine.plan import RunPlan
from vae_dist.engine.step import TrainStep
from vae_dist.engine.stragglers import Stragglers
from vae_dist.engine.watchdog import Watchdog
from vae_dist.engine.window import MetricsWindow
from vae_dist.engine.zero import restart
from vae_dist.errors import CheckpointError, RunError
from vae_dist.evaluate.aggregate import fit_sampling_prior
from vae_dist.evaluate.likelihood import Scores, score_split, summarise
from vae_dist.objective.schedule import is_autoencoder
from vae_dist.observe.activity import Activity
from vae_dist.observe.collapse import collapse_warning
from vae_dist.observe.metrics import MetricsWriter
from vae_dist.observe.start_up import StartUp
from vae_dist.observe.wall_time import WallTime

# Begin again from fresh weights, these stay: what reads text (Li et al. 2019 reset the decoder).
_KEPT_AT_RESET = ("vae.embedding.", "vae.encoder.", "vae.posterior.")


@dataclass
class TrainingRun:
    """Everything between a plan and its last step.

    Attributes:
        metrics: on rank 0 only.
        activity: what this rank is doing.
        wall_time: of the whole run on rank 0; the others' begins with their process.
        mfu_of_rate: the MFU is this times the tokens per second of all workers; None where no peak is known.
        step: optimizer steps made.
        has_warned: of the collapse that the last validation found.
        unwritten: checkpoints in a row that could not be written.
        skipped, skipped_before: updates left out, up to the last look and up to the last checkpoint.
    """

    plan: RunPlan
    engine: deepspeed.DeepSpeedEngine
    train_step: TrainStep
    controllers: Controllers
    average: WeightAverage | None
    data: TrainingData
    stream: Stream
    window: MetricsWindow
    metrics: MetricsWriter | None
    writer: CheckpointWriter
    ledger: Ledger | None
    activity: Activity
    wall_time: WallTime
    watchdog: Watchdog | None
    stragglers: Stragglers
    mfu_of_rate: float | None
    step: int
    has_warned: bool = False
    unwritten: int = 0
    skipped: int = 0
    skipped_before: int = 0

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.plan.config

    @property
    def dataset(self) -> Dataset:
        """The data set that is validated on."""
        return self.data.datasets[0]

    def begun(self, start_up: StartUp) -> None:
        """After the first step of these workers: say what the start of a new run took."""
        # The first step compiles: no rank is slow for that.
        self.activity.take_alone_seconds()
        if self.step == 1 and not self.wall_time.seconds["restart"]:
            start_up.mark("first step")
            self._note(start_up.message())

    def begin_phase(self) -> None:
        """After the autoencoder phase the optimizer begins anew and, if asked for, all that writes text."""
        fresh: dict[str, torch.Tensor] = {}
        if self.config.objective.reset_decoder:
            # Another seed than the first: the decoder starts again, not over.
            objective, _ = build_objective(self.config, self.dataset.tokenizer, torch.device("cpu"), seed_offset=1)
            weights = objective.named_parameters()
            fresh = {name: p.data for name, p in weights if not name.startswith(_KEPT_AT_RESET)}
        restart(self.engine, fresh)
        self.train_step.skip_rule.restart()
        if self.average:
            self.average.restart()
        self._note("autoencoder phase over" + (", decoder reset" if fresh else ""))

    def log(self) -> None:
        """Reduce the window over ranks, check that the loss is finite, write it. Collective."""
        values, alone_seconds = self.window.reduce(
            self.stream.take_waited_seconds(), self.activity.take_alone_seconds()
        )
        slow, slowest_over_median = self.stragglers.find(alone_seconds)
        for sentence in slow:
            self._note(sentence)
        self._count_skipped()
        if values is None:
            return
        self._require_finite(values["elbo_per_seq"])
        last = self.step - 1
        values |= {
            "beta": self.train_step.kl_weight(last),
            "learning_rate": self.train_step.learning_rate(last),
            "grad_norm": self.train_step.gradient_norm(),
            "epoch": self.step / self.plan.steps_per_epoch,
            "seconds_left": (self.plan.total_steps - self.step) * values["step_seconds"],
        }
        if self.config.data.damage == "skip":
            values["skipped_sequences"] = _sum_over_ranks(self.stream.skipped_sequences)
        if self.config.data.mixture:
            values["mixture"] = self.data.mixture_report(self.step)
        values["slowest_over_median"] = slowest_over_median
        if self.mfu_of_rate:
            values["mfu"] = self.mfu_of_rate * values["tokens_per_second"]
        values |= self.wall_time.values()
        if self.metrics:
            self.metrics.write("train", self.step, values)

    def validate(self) -> bool:
        """Score the validation split and tell the controllers; whether the run is over. Collective."""
        scores = self.score("valid", self.config.evaluate.max_sequences)
        told: list[Any] = [None]
        if scores is not None:
            summary = summarise(scores)
            told = [(summary["elbo_per_seq"], summary["mutual_information_nats"])]
            self._write_validation(summary)
        dist.broadcast_object_list(told, src=0)
        elbo, mutual_information = told[0]
        # An autoencoder's KL says nothing about what comes after it.
        is_autoencoder_phase = is_autoencoder(self.step - 1, self.plan.total_steps, self.config.objective)
        over = not is_autoencoder_phase and self._steer(elbo, mutual_information)
        self.window.skip_time()
        return over

    def score(self, split: str, max_sequences: int | None = None, importance_samples: int = 0) -> Scores | None:
        """Score a split over all ranks, with the averaged weights where there are some; None but on rank 0."""
        with self.exported_weights():
            return score_split(
                self.engine.module.vae,
                self.dataset.split(split),
                seed=self.config.train.seed,
                batch_sequences=max(1, self.config.evaluate.batch_sequences // dist.get_world_size()),
                max_sequences=max_sequences,
                importance_samples=importance_samples,
                autocast=self.engine.module.autocast,
                rank=dist.get_rank(),
                world_size=dist.get_world_size(),
            )

    def fit_sampling_prior(self) -> None:
        """Fit the mixture that samples are drawn from to the latents of the training split. Collective."""
        with self.exported_weights():
            fit = fit_sampling_prior(
                self.engine.module.vae,
                training_split(self.dataset, self.config),
                seed=self.config.train.seed,
                autocast=self.engine.module.autocast,
                rank=dist.get_rank(),
                world_size=dist.get_world_size(),
            )
        if self.metrics:
            self.metrics.write("fit", self.step, fit)
            if len(self.data.datasets) > 1:
                self._note("the sampling prior was fitted to the first data set of the mixture alone")

    def exported_weights(self) -> AbstractContextManager[None]:
        """The model computes with the averaged weights, where there are some."""
        return self.average.in_place() if self.average else nullcontext()

    def save(self, directory: str = "checkpoints", keep: int | None = None) -> None:
        """Take a checkpoint, which is written while training goes on. Collective.

        Raises:
            RunError: the loss is not finite, too many updates were left out, or too many checkpoints in a row could
                not be written.
        """
        tokens_seen, loss = self.window.totals()
        self._require_finite(loss)
        self._count_skipped()
        self.skipped_before = self.skipped
        controllers = {**self.controllers.state(), "skip": self.train_step.skip_rule.state()}
        if self.average:
            controllers["average_updates"] = self.average.updates
        earlier = self.writer.save(
            self.engine,
            self.plan.run_dir / directory,
            Progress(self.step, tokens_seen, controllers),
            keep or self.config.run.keep_checkpoints,
            self.average,
        )
        self._count_failures(earlier)
        self.window.skip_time()

    def finish_writing(self) -> None:
        """Wait for the checkpoints under way. Collective.

        Raises:
            RunError: the last one could not be written.
        """
        written = self.writer.wait()
        self._count_failures(written)
        if written and written[-1].problem:
            self._give_up(written[-1])

    def load_best(self) -> None:
        """Go back to the weights of the best validation. Collective.

        Raises:
            CheckpointError: they are not there any more, or damaged.
        """
        self.finish_writing()
        loaded = load_newest(self.engine, self.writer.store, self.plan.run_dir / "best", self.average)
        if loaded.progress.step != self.controllers.best_step:
            raise CheckpointError(
                f"{self.plan.run_dir / 'best'} does not hold the weights of the best validation, at step "
                f"{self.controllers.best_step}. {' '.join(loaded.passed_over)} Restore it, or train under another "
                "run.name."
            )

    def _steer(self, elbo_per_seq: float, mutual_information: float) -> bool:
        plateau, aggressive = self.controllers.plateau, self.controllers.aggressive
        is_best = self.controllers.is_new_best(elbo_per_seq, self.step)
        if is_best and (plateau or self.config.evaluate.select == "best"):
            with self.wall_time.part("checkpoint"):
                self.save("best", keep=1)
        if aggressive and aggressive.turn != "both":
            aggressive.after_validation(mutual_information)
            if aggressive.turn == "both":
                self._note("aggressive phase over: the mutual information fell")
        verdict = plateau.after_validation(elbo_per_seq) if plateau else "waiting"
        if plateau and verdict == "reduce":
            self.load_best()
            self._note(f"validation reached a plateau: learning rate times {plateau.factor:g}, best weights loaded")
        return verdict == "stop"

    def _write_validation(self, summary: dict[str, Any]) -> None:
        if self.metrics is None:
            return
        self.metrics.write("valid", self.step, summary)
        warning = None
        if self.engine.module.vae.latent_dim:
            warning = collapse_warning(summary, self.train_step.kl_weight(self.step - 1), self.config)
        if warning and not self.has_warned:
            self._note(warning)
        self.has_warned = warning is not None

    def _note(self, message: str) -> None:
        if self.metrics:
            self.metrics.write("event", self.step, {"message": message})

    def _count_skipped(self) -> None:
        """Tell of updates that were left out; too many end the run. Waits for the device."""
        skipped = self.train_step.skip_rule.skipped
        if skipped > self.skipped:
            self._note(f"{skipped - self.skipped} updates left out, their gradients not finite or too large")
        self.skipped = skipped
        budget, since = self.config.optimizer.skip_budget, skipped - self.skipped_before
        if since > budget:
            raise RunError(
                f"{since} updates were left out since the last checkpoint, up to step {self.step}, because their "
                f"gradients were not finite or too large (optimizer.skip_budget = {budget}). Lower "
                "optimizer.learning_rate or optimizer.gradient_clip_norm and train under another run.name."
            )

    def _count_failures(self, written: list[Written]) -> None:
        for one in written:
            self.unwritten = self.unwritten + 1 if one.problem else 0
            if self.unwritten == self.config.run.unwritten_checkpoints:
                self._give_up(one)

    def _give_up(self, written: Written) -> None:
        raise RunError(
            f"The checkpoint of step {written.step} could not be written to {written.path}: {written.problem}. Make "
            "room or mend the storage; the same command resumes from the newest whole checkpoint."
        )

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise RunError(
                f"The loss is not finite at step {self.step} ({loss}). The newest checkpoint in "
                f"{self.plan.run_dir / 'checkpoints'} is from before. Lower optimizer.learning_rate or "
                "optimizer.gradient_clip_norm and train under another run.name."
            )


def _sum_over_ranks(number: int) -> int:
    total = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)
