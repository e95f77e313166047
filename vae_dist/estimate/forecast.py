"""What one configuration costs on some device, whether it fits, and the nearest configuration that does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from vae_dist.config.checks import cross_field_problems, worker_problem
from vae_dist.config.schema import Config
from vae_dist.config.science_checks import with_values
from vae_dist.errors import ConfigError
from vae_dist.estimate import goodput as failures
from vae_dist.estimate.devices import USABLE_SHARE, Device
from vae_dist.estimate.memory import ModelState, Sizes, buffer_bytes, checkpoint_bytes, model_state, sizes_of
from vae_dist.estimate.timing import StepSeconds, communication_bytes, micro_batches_of, step_seconds
from vae_dist.estimate.trace import Cost, Shape, loss_bytes, micro_batch_cost, peak_bytes
from vae_dist.model.vae import TextVAE
from vae_dist.objective.elbo import NegativeElbo

STAGES = (0, 1, 2, 3)
# From a device to host memory that is not pinned, bytes a second: an assumption, about half of PCIe 4 x16.
_COPY_BANDWIDTH = 1e10
_HOUR = 3600.0


@dataclass(frozen=True)
class Workload:
    """What the data make of a run.

    Attributes:
        mean_tokens, max_tokens: of a sequence.
        steps, checkpoint_every: optimizer steps.
    """

    vocab_size: int
    mean_tokens: float
    max_tokens: int
    steps: int
    checkpoint_every: int


@dataclass(frozen=True)
class Assumptions:
    """What neither configuration nor data say.

    Attributes:
        workers: of the run.
        autocast: type of the products.
        mfu: share of the peak; None: the device's.
        storage_bandwidth: bytes a second that all workers together write.
        restart_seconds: from a failure to the next step.
        mtbf_hours: of one device; inf: nothing fails.
        price: of a device hour, in any currency.
    """

    workers: int
    autocast: torch.dtype | None
    mfu: float | None = None
    storage_bandwidth: float = 2e9
    restart_seconds: float = 120.0
    mtbf_hours: float = failures.MTBF_HOURS
    price: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of a device at one ZeRO stage, in a step with the longest sequences.

    Attributes:
        loss, loss_unfused: of the softmax, with the fused operator and without.
    """

    state: ModelState
    activations: int
    loss: int
    loss_unfused: int
    buffers: int

    @property
    def total(self) -> int:
        """With the fused loss."""
        return self.state.total + self.activations + self.loss + self.buffers


@dataclass(frozen=True)
class Forecast:
    """Estimates, all of them; see `as_json` for units."""

    config: Config
    workload: Workload
    device: Device
    assumptions: Assumptions
    sizes: Sizes
    cost: Cost
    shape: Shape
    longest: Shape
    memory: tuple[Memory, ...]

    @property
    def stage(self) -> int:
        """The configured ZeRO stage."""
        return self.config.cluster.zero_stage

    @property
    def fits(self) -> bool:
        """Whether a device's memory is enough."""
        return self.memory[self.stage].total <= USABLE_SHARE * self.device.memory_bytes

    @property
    def micro_batches(self) -> int:
        """Of a worker in a step of mean length."""
        return micro_batches_of(_share(self.config, self.assumptions.workers), self.shape.sequences)

    @property
    def mfu(self) -> float:
        """Assumed, of the FLOPs that run, recomputed ones included."""
        return self.assumptions.mfu or self.device.mfu

    @property
    def flops_per_token(self) -> tuple[float, float, float]:
        """Forward, backward, recomputation."""
        tokens = self.shape.sequences * self.shape.tokens
        cost = self.cost
        return cost.forward_flops / tokens, cost.backward_flops / tokens, cost.recompute_flops / tokens

    @property
    def sent_bytes(self) -> int:
        """By a worker in a step."""
        return communication_bytes(self.sizes, self.stage, self.assumptions.workers, self.micro_batches)

    @property
    def step(self) -> StepSeconds:
        """Seconds of a step."""
        tokens = self.config.train.batch_sequences * self.workload.mean_tokens / self.assumptions.workers
        return step_seconds(
            self.sizes,
            self.config.optimizer,
            self.stage,
            self.assumptions.workers,
            self.device,
            flops=sum(self.flops_per_token) * tokens,
            flops_per_second=self.mfu * self.device.peak(self.assumptions.autocast),
            least_seconds=self.micro_batches * self.cost.operators * self.device.operator_seconds,
            sent_bytes=self.sent_bytes,
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint."""
        return checkpoint_bytes(self.sizes, self.config.optimizer)

    @property
    def write_seconds(self) -> float:
        """From a checkpoint's snapshot to its commit; training goes on meanwhile."""
        return self.checkpoint_bytes / self.assumptions.storage_bandwidth

    @property
    def stall_seconds(self) -> float:
        """That training stands still for a snapshot: sharded state is summed over workers, each copies its share."""
        workers, size = self.assumptions.workers, self.checkpoint_bytes
        sent = 2 * size * (workers - 1) / workers if self.stage else 0
        return size / workers / _COPY_BANDWIDTH + sent / self.device.bandwidth_between(workers)

    @property
    def mtbf_seconds(self) -> float:
        """Of all devices together."""
        return self.assumptions.mtbf_hours * _HOUR / self.assumptions.workers

    @property
    def best_checkpoint_every(self) -> int:
        """Steps between checkpoints that lose least (Daly 2006)."""
        if math.isinf(self.mtbf_seconds):
            return self.workload.steps
        # They are written one at a time.
        interval = max(self.write_seconds, failures.best_interval(self.stall_seconds, self.mtbf_seconds))
        return max(1, min(self.workload.steps, round(interval / self.step.total)))

    def goodput(self, checkpoint_every: int) -> float:
        """Share of the wall time that is work, with a checkpoint every so many steps."""
        interval = checkpoint_every * self.step.total
        # Training waits for a checkpoint that is not written when the next is due; and what fails while one is being
        # written goes back to the one before.
        stall = self.stall_seconds + max(0.0, self.write_seconds - interval)
        restart = self.assumptions.restart_seconds + self.write_seconds
        return failures.goodput(interval, stall, restart, self.mtbf_seconds)

    @property
    def work_seconds(self) -> float:
        """Of all steps, without validation."""
        return self.workload.steps * self.step.total

    @property
    def wall_seconds(self) -> float:
        """Expected, with checkpoints, failures and restarts."""
        share = self.goodput(self.workload.checkpoint_every)
        return self.work_seconds / share if share else math.inf

    @property
    def price(self) -> float | None:
        """Of the run, in the currency of the price given."""
        hourly = self.assumptions.price
        return None if hourly is None else self.wall_seconds / _HOUR * self.assumptions.workers * hourly


def forecast(config: Config, workload: Workload, device: Device, assumptions: Assumptions) -> Forecast:
    """Estimate one configuration.

    Raises:
        ConfigError: the workers cannot share the streams.
    """
    problem = worker_problem(assumptions.workers, config.data.streams)
    if problem:
        raise ConfigError(problem)
    autocast, vocab = assumptions.autocast, workload.vocab_size
    share = _share(config, assumptions.workers)
    shape = _micro_batch(config, share, max(1, round(workload.mean_tokens)))
    longest = _micro_batch(config, share, workload.max_tokens)
    cost = micro_batch_cost(config, vocab, shape, autocast, device.is_gpu)
    peak = peak_bytes(config, vocab, longest, autocast, device.is_gpu)
    loss = loss_bytes(config, vocab, longest, autocast, device.is_gpu)
    sizes = model_sizes(config, vocab)
    memory = tuple(
        Memory(
            state=model_state(sizes, config.optimizer, stage, assumptions.workers),
            activations=max(0, peak - loss.kept),
            loss=loss.kept + loss.workspace,
            loss_unfused=loss.unfused,
            buffers=buffer_bytes(sizes, stage),
        )
        for stage in STAGES
    )
    return Forecast(config, workload, device, assumptions, sizes, cost, shape, longest, memory)


def model_sizes(config: Config, vocab_size: int) -> Sizes:
    """Of the configured model, which takes no memory here."""
    with torch.device("meta"):
        module = NegativeElbo(TextVAE(config.model, vocab_size), config.objective, None)
    return sizes_of(module, config.optimizer, bool(config.optimizer.average_decay))


def nearest_fitting(found: Forecast) -> tuple[dict[str, Any], Forecast] | None:
    """The fewest changes that make the run fit, and its forecast: what changes no result first, then more workers.

    None where even one sequence at a time on as many workers as there are streams does not fit.
    """
    for changes in _changes(found):
        config = with_values(found.config, changes)
        workers = changes.get("cluster.workers", found.assumptions.workers)
        if _may_fit(found, config, workers) and not cross_field_problems(config):
            other = forecast(config, found.workload, found.device, replace(found.assumptions, workers=workers))
            if other.fits:
                return changes, other
    return None


def _changes(found: Forecast) -> Iterator[dict[str, Any]]:
    """Overrides to try, those with the fewest keys first and the gentlest among equals."""
    config, longest, workers = found.config, found.workload.max_tokens, found.assumptions.workers
    more_workers = range(workers + 1, config.data.streams + 1)
    options: dict[str, list[Any]] = {
        "cluster.zero_stage": [s for s in STAGES if s > found.stage],
        "train.micro_batch_tokens": [n * longest for n in _halvings(found.longest.sequences)],
        "train.activation_checkpointing": [] if config.train.activation_checkpointing else [True],
        "cluster.workers": [n for n in more_workers if config.data.streams % n == 0],
    }
    for count in range(1, len(options) + 1):
        for keys in itertools.combinations(options, count):
            for values in itertools.product(*(options[key] for key in keys)):
                yield dict(zip(keys, values, strict=True))


def _may_fit(found: Forecast, config: Config, workers: int) -> bool:
    """A quick look, for there are many to try: activations by a straight line between one sequence and all.

    They are the most of several sums that are linear in the sequences, so that the line is never below them.
    """
    shape = _micro_batch(config, _share(config, workers), found.workload.max_tokens)
    ends = (Shape(1, shape.tokens), Shape(max(2, found.longest.sequences), shape.tokens))
    vocab, autocast, gpu = found.workload.vocab_size, found.assumptions.autocast, found.device.is_gpu
    low, high = (peak_bytes(config, vocab, end, autocast, gpu) for end in ends)
    activations = low + (high - low) * (shape.sequences - 1) / (ends[1].sequences - 1)
    loss, stage = loss_bytes(config, vocab, shape, autocast, gpu), config.cluster.zero_stage
    state = model_state(found.sizes, config.optimizer, stage, workers).total
    total = state + activations + loss.workspace + buffer_bytes(found.sizes, stage)
    return total <= USABLE_SHARE * found.device.memory_bytes


def _halvings(sequences: int) -> list[int]:
    found = []
    while sequences > 1:
        sequences //= 2
        found.append(sequences)
    return found


def _share(config: Config, workers: int) -> int:
    return math.ceil(config.train.batch_sequences / workers)


def _micro_batch(config: Config, share: int, tokens: int) -> Shape:
    budget = config.train.micro_batch_tokens
    return Shape(share if budget is None else min(share, max(1, budget // tokens)), tokens)
