"""The end of a run, on one process: export the model, evaluate it, compare it, and write report and result."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from vae_dist.config.credentials import without_credentials
from vae_dist.config.load import dump_yaml
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.split import Split, read_all
from vae_dist.data.stream.training_data import training_split
from vae_dist.data.text.special_ids import BOS_ID, PAD_ID
from vae_dist.decode.latent_ops import TextModel
from vae_dist.decode.request import Decoding
from vae_dist.engine.checkpoint_files import Progress
from vae_dist.engine.export_run import write_run_model
from vae_dist.engine.loop import Trained
from vae_dist.engine.plan import RunPlan, next_commands
from vae_dist.evaluate.latent import ACTIVE_UNIT_THRESHOLD, variance_of_mean
from vae_dist.evaluate.likelihood import Scores, summarise, swapped_rec_per_seq
from vae_dist.evaluate.ngram import KneserNey
from vae_dist.evaluate.text_metrics import distinct_n, sequence_hashes, verbatim_fraction
from vae_dist.evaluate.whole import TRAINING_TOKENS
from vae_dist.export.model_dir import load_model
from vae_dist.model.precision import autocast_dtype
from vae_dist.model.vae import count_parameters
from vae_dist.observe.metrics import read_metrics
from vae_dist.observe.report import write_report
from vae_dist.observe.versions import versions
from vae_dist.observe.wall_time import PARTS

_SHOWN_RECONSTRUCTIONS = 8
_BATCH_SEQUENCES = 64
_INTERPOLATION_STEPS = 7

HEADLINE_METRICS = (
    "elbo_per_seq",
    "rec_per_seq",
    "kl_per_seq",
    "nll_per_token",
    "ppl",
    "active_units",
    "mutual_information_nats",
)


def finish(plan: RunPlan, trained: Trained, workers: int, device: torch.device) -> dict[str, Any]:
    """Write `model/`, `report.html` and `result.json`; returns the result, the run's JSON line."""
    if device.type == "cpu":
        # The other workers are done: this one may use the whole machine.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    dataset = Dataset.open(plan.data_dir)
    model_dir, progress = plan.run_dir / "model", Progress(trained.exported_step, trained.tokens_seen, {})
    write_run_model(model_dir, trained.weights, plan.config.model, dataset, plan.run_dir.name, progress)
    loaded = load_model(model_dir, device)
    model = TextModel(loaded.vae, loaded.tokenizer, loaded.max_tokens)
    report = _compose(plan, trained, dataset, model, workers, device)
    write_report(report, plan.run_dir / "report.html")
    result = report["headline"]
    temporary = plan.run_dir / "result.json.tmp"
    temporary.write_text(json.dumps(result), encoding="utf-8")
    os.replace(temporary, plan.run_dir / "result.json")
    return result


def _compose(
    plan: RunPlan, trained: Trained, dataset: Dataset, model: TextModel, workers: int, device: torch.device
) -> dict[str, Any]:
    records = read_metrics(plan.run_dir)
    curves = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "valid")}
    train_tokens, offsets = read_all(training_split(dataset, plan.config), TRAINING_TOKENS)
    report: dict[str, Any] = {
        "title": f"vae_dist: {plan.run_dir.name}",
        "run_dir": str(plan.run_dir),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "curves": curves,
        "samples": _samples(plan, model, train_tokens, offsets),
        "counts": {
            "parameters": count_parameters(model.vae),
            **{
                f"{name}_{unit}": getattr(dataset.split(name), unit)
                for name in dataset.splits
                for unit in ("sequences", "tokens")
            },
        },
        "config_yaml": dump_yaml(plan.config),
        "versions": versions(),
        "next_commands": next_commands(plan),
    }
    speed = [r["tokens_per_second"] for r in curves["train"]] or [0.0]
    valid, baselines = {}, {}
    if trained.valid is not None:
        valid = _evaluate(plan, dataset, model, trained.valid, report)
        baselines = _baselines(train_tokens, offsets, dataset.split("valid"), dataset.tokenizer.vocab_size)
    report["throughput"] = {
        "tokens_per_second": statistics.median(speed),
        "step_seconds_median": statistics.median([r["step_seconds"] for r in curves["train"]] or [0.0]),
        "workers": workers,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "precision": "bf16" if autocast_dtype(plan.config.train.precision, device) else "fp32",
    }
    report["wall_time"] = _wall_time(records)
    report["headline"] = {
        "run_dir": str(plan.run_dir),
        "data_dir": without_credentials(plan.data_dir),
        "steps": trained.steps,
        "tokens_seen": trained.tokens_seen,
        "tokens_per_second": statistics.median(speed),
        "goodput": report["wall_time"]["goodput"],
        "valid": {name: valid[name] for name in HEADLINE_METRICS if name in valid},
        "baselines": baselines,
        "seconds": time.time() - plan.started_at,
    }
    return report


def _wall_time(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Where it went, by the last record that says so; `mfu` is None where no peak is known."""
    last = next(r for r in reversed(records) if r["kind"] == "time")
    mfu = [r["mfu"] for r in records if "mfu" in r]
    return {
        **{name: last[name] for name in ("goodput", "wall_seconds", "lost_steps")},
        "parts": {part: last[f"wall_{part}_seconds"] for part in PARTS},
        "mfu": statistics.median(mfu) if mfu else None,
    }


def _evaluate(
    plan: RunPlan, dataset: Dataset, model: TextModel, scores: Scores, report: dict[str, Any]
) -> dict[str, Any]:
    """What the scores of the validation split say; adds the report's sections on latent and reconstruction."""
    split, valid = dataset.split("valid"), summarise(scores)
    if model.vae.latent_dim == 0:
        return valid
    report["active_unit_threshold"] = ACTIVE_UNIT_THRESHOLD
    report["variance_of_posterior_mean_per_dim"] = variance_of_mean(scores.mean).tolist()
    if "kl_per_dim" in valid:
        report["kl_per_dim"] = valid["kl_per_dim"]
    if not model.vae.per_token:
        report["latent_use"] = _latent_use(plan, model, split, scores, valid)
    shown = min(split.sequences, _SHOWN_RECONSTRUCTIONS)
    inputs = [dataset.tokenizer.decode(ids) for ids in split.read(0, shown)]
    greedy = Decoding(temperature=0.0, max_tokens=model.max_tokens)
    outputs, _ = model.reconstruct(inputs, 0, greedy)
    report["reconstructions"] = [{"input": a, "output": b} for a, b in zip(inputs, outputs, strict=True)]
    if shown > 1:
        t, texts, _ = model.interpolate(inputs[0], inputs[1], _INTERPOLATION_STEPS, "linear", 0, greedy)
        points = [{"t": at, "text": text} for at, text in zip(t, texts, strict=True)]
        report["interpolation"] = {"a": inputs[0], "b": inputs[1], "points": points}
    return valid


def _latent_use(plan: RunPlan, model: TextModel, split: Split, scores: Scores, valid: dict[str, Any]) -> dict[str, Any]:
    """What decoding with a stranger's z costs."""
    seed = plan.config.train.seed
    # In the precision that the own z were scored in: the cost is a difference.
    autocast = autocast_dtype(plan.config.train.precision, model.vae.output_bias.device)
    swapped = swapped_rec_per_seq(
        model.vae, split, scores, seed=seed, batch_sequences=_BATCH_SEQUENCES, autocast=autocast
    )
    return {
        "nll_own_z_per_seq": valid["rec_per_seq"],
        "nll_swapped_z_per_seq": swapped,
        "swap_cost_nats_per_seq": swapped - valid["rec_per_seq"],
        "sequences": valid["sequences"],
    }


def _samples(plan: RunPlan, model: TextModel, tokens: np.ndarray, offsets: np.ndarray) -> dict[str, Any]:
    decoding = Decoding(max_tokens=model.max_tokens)
    texts, rows, _ = model.sample(plan.config.evaluate.num_samples, 0, decoding)
    ids = [row.tokens for row in rows]
    return {
        "seed_first": 0,
        "texts": texts,
        "verbatim_fraction": verbatim_fraction(ids, sequence_hashes(tokens, offsets)),
        "distinct_2": distinct_n(ids, 2),
        "decoding": {"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p},
    }


def _baselines(tokens: np.ndarray, offsets: np.ndarray, valid: Split, vocab_size: int) -> dict[str, float]:
    held_out = read_all(valid, TRAINING_TOKENS)
    excluded = (PAD_ID, BOS_ID)
    unigram, bigram = (
        KneserNey((tokens, offsets), vocab_size, order=order, modified=False, bos_id=BOS_ID, excluded_ids=excluded)
        for order in (1, 2)
    )
    return {"unigram_ppl": unigram.perplexity(held_out), "bigram_ppl": bigram.perplexity(held_out)}
