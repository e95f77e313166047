"""A forecast as lines for people, and as numbers for programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vae_dist.estimate.devices import USABLE_SHARE
from vae_dist.estimate.forecast import Forecast, Memory

_COLUMNS = ("weights", "gradients", "optimizer", "average", "activations", "loss", "buffers", "total")


def as_json(found: Forecast) -> dict[str, Any]:
    """Numbers of a forecast; all are estimates.

    Keys, bytes, seconds and FLOPs unless they say otherwise:
        device, workers, precision ("bf16" or "fp32"), mfu_assumed (share of the peak),
        flops_per_token {forward, backward, recompute},
        micro_batch, longest_micro_batch [sequences, tokens], micro_batches (of a worker in a step),
        memory_bytes {stage: {weights, gradients, optimizer, average, activations, loss, loss_unfused, buffers, total}},
        device_memory_bytes (all of it), usable_memory_bytes, fits (at the configured stage),
        communication_bytes (sent by a worker in a step), bandwidth (bytes a second),
        step_seconds {compute, communication, update, total}, tokens_per_second (all workers),
        checkpoint_bytes, checkpoint_seconds (in the background), checkpoint_stall_seconds,
        mtbf_hours (of all devices together),
        checkpoint_every_best (steps, by Daly 2006), goodput, goodput_best (share of the wall time that is work),
        work_hours (steps alone), wall_hours (with checkpoints, failures and restarts), price (null: none given)
    """
    step, assumed = found.step, found.assumptions
    forward, backward, recompute = found.flops_per_token
    return {
        "device": found.device.name,
        "workers": assumed.workers,
        "precision": _precision(found),
        "mfu_assumed": found.mfu,
        "flops_per_token": {"forward": forward, "backward": backward, "recompute": recompute},
        "micro_batch": list(found.shape),
        "longest_micro_batch": list(found.longest),
        "micro_batches": found.micro_batches,
        "memory_bytes": {str(stage): _memory(memory) for stage, memory in enumerate(found.memory)},
        "device_memory_bytes": found.device.memory_bytes,
        "usable_memory_bytes": round(USABLE_SHARE * found.device.memory_bytes),
        "fits": found.fits,
        "communication_bytes": found.sent_bytes,
        "bandwidth": found.device.bandwidth_between(assumed.workers),
        "step_seconds": {**step._asdict(), "total": step.total},
        "tokens_per_second": found.config.train.batch_sequences * found.workload.mean_tokens / step.total,
        "checkpoint_bytes": found.checkpoint_bytes,
        "checkpoint_seconds": found.write_seconds,
        "checkpoint_stall_seconds": found.stall_seconds,
        "mtbf_hours": found.mtbf_seconds / 3600,
        "checkpoint_every_best": found.best_checkpoint_every,
        "goodput": found.goodput(found.workload.checkpoint_every),
        "goodput_best": found.goodput(found.best_checkpoint_every),
        "work_hours": found.work_seconds / 3600,
        "wall_hours": found.wall_seconds / 3600,
        "price": found.price,
    }


def lines(found: Forecast) -> Iterator[str]:
    """The same as a table."""
    assumed, device, step = found.assumptions, found.device, found.step
    yield (
        f"\nEstimates, not measurements: {assumed.workers} workers on {device.name}, {_precision(found)}, "
        f"{100 * found.mfu:.0f} % of the peak assumed (--mfu)"
        + (f", {_time(device.operator_seconds)} an operator at least" if device.operator_seconds else "")
    )
    forward, backward, recompute = found.flops_per_token
    again = f" + recomputed {_si(recompute)}" if recompute else ""
    yield _line("FLOPs per token", f"forward {_si(forward)} + backward {_si(backward)}{again}")
    yield from _memory_lines(found)
    bandwidth = device.bandwidth_between(assumed.workers)
    yield _line("communication", f"{_si(found.sent_bytes)}B sent by a worker in a step, at {_si(bandwidth)}B/s")
    yield _line(
        "step", f"{_time(step.total)}: compute {_time(step.compute)}, communication {_time(step.communication)}, "
        f"update {_time(step.update)}; a worker has {found.micro_batches} times about "
        f"{found.shape.sequences} x {found.shape.tokens} tokens",
    )  # fmt: skip
    yield _line(
        "checkpoint",
        f"{_si(found.checkpoint_bytes)}B, written in {_time(found.write_seconds)} at "
        f"{_si(assumed.storage_bandwidth)}B/s while training goes on, which stands still for "
        f"{_time(found.stall_seconds)}",
    )
    yield from _failure_lines(found)
    cost = "" if found.price is None else f"; {found.price:,.2f} at {assumed.price:g} a device hour"
    yield _line("duration", f"{_time(found.work_seconds)} of steps, {_time(found.wall_seconds)} expected{cost}")


def _memory_lines(found: Forecast) -> Iterator[str]:
    device = found.device
    yield _line(
        "memory of a device",
        f"GB, with {found.longest.sequences} x {found.longest.tokens} tokens at a time (the longest), of "
        f"{USABLE_SHARE * device.memory_bytes / 1e9:.1f} usable in {device.memory_bytes / 1e9:.1f}",
    )
    yield "  ZeRO  " + " ".join(f"{name:>11}" for name in _COLUMNS)
    for stage, memory in enumerate(found.memory):
        numbers = _memory(memory)
        mark = "*" if stage == found.stage else " "
        yield f"  {mark} {stage}   " + " ".join(f"{numbers[name] / 1e9:11.3f}" for name in _COLUMNS)
    chosen, cluster = found.memory[found.stage], found.config.cluster
    if cluster.offload_optimizer or cluster.offload_parameters:
        # What DeepSpeed keeps where has been measured on no GPU yet.
        moved = chosen.state.optimizer + (chosen.state.weights if cluster.offload_parameters else 0)
        yield _line(
            "offload", f"about {_si(moved)}B of these lie in the host's memory; the table does not leave them out"
        )
    yield _line(
        "loss",
        f"{_si(chosen.loss)}B with the fused operator, {_si(chosen.loss_unfused)}B with torch's logits and softmax",
    )


def _failure_lines(found: Forecast) -> Iterator[str]:
    every, best = found.workload.checkpoint_every, found.best_checkpoint_every
    yield _line(
        "failures",
        f"one in {_time(found.mtbf_seconds)} at {found.assumptions.mtbf_hours:,.0f} h a device (--mtbf-hours), "
        f"{_time(found.assumptions.restart_seconds)} a restart",
    )
    yield _line(
        "goodput",
        f"{100 * found.goodput(every):.2f} % with a checkpoint every {every:,} steps; best every {best:,} "
        f"(Daly 2006): {100 * found.goodput(best):.2f} %",
    )


def _memory(memory: Memory) -> dict[str, int]:
    return {
        **memory.state._asdict(),
        "activations": memory.activations,
        "loss": memory.loss,
        "loss_unfused": memory.loss_unfused,
        "buffers": memory.buffers,
        "total": memory.total,
    }


def _precision(found: Forecast) -> str:
    return "bf16" if found.assumptions.autocast is torch.bfloat16 else "fp32"


def _line(name: str, words: str) -> str:
    return f"{name:<20} {words}"


def _si(number: float) -> str:
    """Three digits and a decimal prefix."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "


def _time(seconds: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            count = seconds / size
            return f"{count:,.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
