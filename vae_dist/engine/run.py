"""A training run on one rank: its parts, and what happens around the steps: log, validate, save, begin a phase."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from vae_dist.config.schema import Config
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.stream.stream import Stream
from vae_dist.data.stream.training_data import TrainingData, open_training_data, training_split
from vae_dist.data.text.tokenizer import Tokenizer
from vae_dist.engine.average import WeightAverage
from vae_dist.engine.checkpoint import load_newest, save_checkpoint
from vae_dist.engine.checkpoint_files import Progress
from vae_dist.engine.controllers import Controllers
from vae_dist.engine.plan import RunPlan
from vae_dist.engine.precision import autocast_dtype
from vae_dist.engine.step import TrainStep
from vae_dist.engine.window import MetricsWindow
from vae_dist.engine.zero import build_engine, optimizer_state_elements, require_compiler, restart
from vae_dist.errors import CheckpointError, MachineError, RunError
from vae_dist.evaluate.aggregate import fit_sampling_prior
from vae_dist.evaluate.likelihood import Scores, score_split, summarise
from vae_dist.model.embedding_vectors import initialise
from vae_dist.model.huggingface_checkpoint import start_from_checkpoints
from vae_dist.model.vae import TextVAE, count_parameters
from vae_dist.objective.elbo import NegativeElbo
from vae_dist.objective.schedule import is_autoencoder
from vae_dist.observe.collapse import collapse_warning
from vae_dist.observe.metrics import MetricsWriter
from vae_kernels import resolve_backend

# Begin again from fresh weights, these stay: what reads text (Li et al. 2019 reset the decoder).
_KEPT_AT_RESET = ("vae.embedding.", "vae.encoder.", "vae.posterior.")


@dataclass
class TrainingRun:
    """Everything between a plan and its last step.

    Attributes:
        metrics: on rank 0 only.
        step: optimizer steps made.
        has_warned: of the collapse that the last validation found.
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
    step: int
    has_warned: bool = False

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.plan.config

    @property
    def dataset(self) -> Dataset:
        """The data set that is validated on."""
        return self.data.datasets[0]

    def begin_phase(self) -> None:
        """After the autoencoder phase the optimizer begins anew and, if asked for, all that writes text."""
        fresh: dict[str, torch.Tensor] = {}
        if self.config.objective.reset_decoder:
            # Another seed than the first: the decoder starts again, not over.
            objective, _ = build_objective(self.config, self.dataset.tokenizer, torch.device("cpu"), seed_offset=1)
            weights = objective.named_parameters()
            fresh = {name: p.data for name, p in weights if not name.startswith(_KEPT_AT_RESET)}
        restart(self.engine, fresh)
        if self.average:
            self.average.restart()
        self._note("autoencoder phase over" + (", decoder reset" if fresh else ""))

    def log(self) -> None:
        """Reduce the window over ranks, check that the loss is finite, write it. Collective."""
        values = self.window.reduce(self.stream.take_waited_seconds())
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
        """Write a checkpoint. Collective."""
        started = time.monotonic()
        tokens_seen, loss = self.window.totals()
        # The loss is of the weights before the last update; the gradient's norm tells of the update itself.
        self._require_finite(loss + (self.train_step.gradient_norm() or 0.0))
        controllers = self.controllers.state()
        if self.average:
            controllers["average_updates"] = self.average.updates
        path = save_checkpoint(
            self.engine,
            self.plan.run_dir / directory,
            Progress(self.step, tokens_seen, controllers),
            keep or self.config.run.keep_checkpoints,
            self.average,
        )
        if self.metrics:
            name = str(path.relative_to(self.plan.run_dir))
            self.metrics.write("checkpoint", self.step, {"path": name, "seconds": time.monotonic() - started})
        self.window.skip_time()

    def load_best(self) -> None:
        """Go back to the weights of the best validation. Collective.

        Raises:
            CheckpointError: they are not there any more, or damaged.
        """
        loaded = load_newest(self.engine, self.plan.run_dir / "best", self.average)
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

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise RunError(
                f"The loss is not finite at step {self.step} ({loss}). The newest checkpoint in "
                f"{self.plan.run_dir / 'checkpoints'} is from before. Lower optimizer.learning_rate or "
                "optimizer.gradient_clip_norm and train under another run.name."
            )


def start_run(plan: RunPlan, device: torch.device) -> TrainingRun:
    """Build model and engine, load the newest checkpoint, open the stream. Collective."""
    config, world_size = plan.config, dist.get_world_size()
    data = open_training_data(plan.data_dirs, config, workers=world_size)
    engine, notes = start_engine(config, data.datasets[0].tokenizer, device)
    decay = config.optimizer.average_decay
    average = WeightAverage(engine.module, decay) if decay else None
    controllers = Controllers(config, plan.total_steps)
    loaded = load_newest(engine, plan.run_dir / "checkpoints", average)
    controllers.load(loaded.progress.controllers)
    notes = [*loaded.passed_over, *(notes if loaded.progress.step == 0 else [])]
    return TrainingRun(
        plan=plan,
        engine=engine,
        train_step=TrainStep(engine, config, plan.total_steps, controllers, average),
        controllers=controllers,
        average=average,
        data=data,
        stream=data.stream(dist.get_rank(), world_size),
        window=MetricsWindow(loaded.progress.tokens_seen),
        metrics=_open_metrics(plan, engine, loaded.progress.step, notes),
        step=loaded.progress.step,
    )


def start_engine(
    config: Config, tokenizer: Tokenizer, device: torch.device
) -> tuple[deepspeed.DeepSpeedEngine, list[str]]:
    """The model under DeepSpeed, at its start, and what there is to say about that. Collective."""
    try:
        resolve_backend(config.train.kernels, torch.empty(0, device=device))
    except RuntimeError as error:
        raise MachineError(f"train.kernels = {config.train.kernels}: {error}") from None
    require_compiler()
    deepspeed.init_distributed()
    objective, notes = build_objective(config, tokenizer, device)
    engine = build_engine(
        objective, config.optimizer, config.cluster.zero_stage, config.train.batch_sequences, dist.get_world_size()
    )
    return engine, notes


def build_objective(
    config: Config, tokenizer: Tokenizer, device: torch.device, seed_offset: int = 0
) -> tuple[NegativeElbo, list[str]]:
    """Model and loss, freshly initialised from the run's seed, and what there is to say about that."""
    torch.manual_seed(config.train.seed + seed_offset)
    vae = TextVAE(
        config.model,
        tokenizer.vocab_size,
        kernels=config.train.kernels,
        activation_checkpointing=config.train.activation_checkpointing,
    )
    notes = start_from_checkpoints(vae, tokenizer)
    if config.model.embedding_vectors:
        vectors = Path(config.model.embedding_vectors)
        notes.append(f"{vectors.name}: {initialise(vae.embedding.weight, vectors, tokenizer)}")
    return NegativeElbo(vae, config.objective, autocast_dtype(config.train.precision, device)).to(device), notes


def _open_metrics(plan: RunPlan, engine: Any, step: int, notes: list[str]) -> MetricsWriter | None:
    """Say how the run begins, and what DeepSpeed made of the model on each rank. Collective."""
    held: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(held, optimizer_state_elements(engine))
    if dist.get_rank() != 0:
        return None
    metrics = MetricsWriter(plan.run_dir, step)
    for note in notes:
        metrics.write("event", step, {"message": note})
    stage = engine.zero_optimization_stage()
    facts = {
        "optimizer": type(engine.optimizer).__name__,
        "zero_stage": stage,
        "parameters": count_parameters(engine.module),
        "optimizer_elements_per_rank": held,
        "precision": "bf16" if engine.module.autocast else "fp32",
        "kernels": resolve_backend(plan.config.train.kernels, engine.module.vae.output_bias),
    }
    where = f"resuming from step {step}" if step else "starting"
    message = (
        f"{where}: {facts['parameters']:,} parameters, {len(held)} workers, ZeRO-{stage}, {facts['precision']}, "
        f"{facts['kernels']} kernels"
    )
    metrics.write("event", step, {"message": message, **facts})
    return metrics


def _sum_over_ranks(number: int) -> int:
    total = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)
