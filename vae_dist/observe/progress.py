"""One line a person can read for each metrics record. Fixed width, greppable, units stated."""

from __future__ import annotations

from typing import Any

from vae_dist.observe.wall_time import PARTS

# Share of a step's time that a person should hear of.
_SHOWN_WAIT = 0.01


def format_record(record: dict[str, Any], total_steps: int) -> str | None:
    """The line for a record of metrics.jsonl, or None for kinds that are not shown."""
    formatter = _FORMATTERS.get(record["kind"])
    return formatter(record, total_steps) if formatter else None


def format_seconds(seconds: float) -> str:
    """42s, 3m 05s, 2h 07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def _train(r: dict[str, Any], total_steps: int) -> str:
    waited = r.get("data_wait_fraction", 0.0)
    return (
        f"step {r['step']:>6}/{total_steps}  ELBO {r['elbo_per_seq']:8.2f}  rec {r['rec_per_seq']:7.2f}  "
        f"KL {r['kl_per_seq']:6.2f} nats/seq  active {r['active_units']:>3}  beta {r['beta']:.2f}  "
        f"{r['tokens_per_second']:>8,.0f} tok/s  left {format_seconds(r['seconds_left'])}"
        + (f"  waiting for data {100 * waited:.0f} %" if waited >= _SHOWN_WAIT else "")
        + (f"  skipped {r['skipped_sequences']:,} damaged" if r.get("skipped_sequences") else "")
    )


def _valid(r: dict[str, Any], total_steps: int) -> str:
    return (
        f"valid{r['step']:>6}/{total_steps}  ELBO {r['elbo_per_seq']:8.2f}  rec {r['rec_per_seq']:7.2f}  "
        f"KL {r['kl_per_seq']:6.2f} nats/seq  active {r['active_units']:>3}  PPL {r['ppl']:.1f}  "
        f"MI {r['mutual_information_nats']:.2f} nats"
    )


def _checkpoint(r: dict[str, Any], total_steps: int) -> str:
    return f"saved{r['step']:>6}/{total_steps}  {r['path']} ({r['seconds']:.1f} s, stall {r['blocked_seconds']:.2f} s)"


def _fit(r: dict[str, Any], total_steps: int) -> str:
    return (
        f"      sampling prior fitted to {r['rows']:,} latents: mean log density of held-out ones "
        f"{r['mixture_nats']:.2f} nats (one Gaussian {r['gaussian_nats']:.2f}, N(0, I) {r['standard_normal_nats']:.2f})"
    )


def _time(r: dict[str, Any], total_steps: int) -> str:
    shares = ", ".join(
        f"{part.replace('_', ' ')} {100 * seconds / r['wall_seconds']:.0f} %"
        for part in PARTS
        if (seconds := r[f"wall_{part}_seconds"])
    )
    return f"      goodput {100 * r['goodput']:.0f} % of {format_seconds(r['wall_seconds'])}: {shares}"


def _event(r: dict[str, Any], total_steps: int) -> str:
    return f"      {r['message']}"


_FORMATTERS = {"train": _train, "valid": _valid, "checkpoint": _checkpoint, "fit": _fit, "time": _time, "event": _event}
