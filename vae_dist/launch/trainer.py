"""The Ray Train driver: a worker group around the engine's loop, progress for people, errors made plain."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from vae_dist.engine.plan import RunPlan
from vae_dist.errors import RunError, VaeDistError
from vae_dist.launch.cluster import WorkerGroup
from vae_dist.launch.stop import StopFlag, StopPoller, signals_to
from vae_dist.observe.metrics import MetricsTail
from vae_dist.observe.progress import format_record

_FOLLOW_SECONDS = 0.5
# glibc gives large blocks back to the kernel when they are freed, and each step would fault the same pages in
# again: the loss's forward and backward took 41 ms with its defaults and 30 ms with these (480 tokens, one core).
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


@dataclass(frozen=True)
class Outcome:
    """`result` is the run's JSON line, or None when it was stopped at `steps`."""

    result: dict[str, Any] | None
    steps: int


def fit(plan: RunPlan, group: WorkerGroup) -> Outcome:
    """Train on the connected cluster, showing progress on standard error; SIGINT and SIGTERM save and return.

    Raises:
        VaeDistError: what a worker raised for the user.
        RunError: any other failure, with where to look.
    """
    flag = StopFlag.remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"plan": plan, "flag": flag, "threads": group.cpus_per_worker},
        scaling_config=ScalingConfig(
            num_workers=group.workers,
            use_gpu=group.use_gpu,
            resources_per_worker={"CPU": group.cpus_per_worker, **({"GPU": 1} if group.use_gpu else {})},
        ),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if group.use_gpu else "gloo",
            timeout_s=plan.config.cluster.collective_timeout_seconds,
        ),
        run_config=RunConfig(
            name=plan.run_dir.name,
            storage_path=str(plan.run_dir / "ray"),
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": _worker_environment(group)},
        ),
    )

    def stop() -> None:
        print("stopping: saving a checkpoint at the next step (again to stop at once)", file=sys.stderr, flush=True)
        flag.set.remote()

    with signals_to(stop), _Follower(plan):
        return _fit_in_thread(trainer, plan)


def _fit_in_thread(trainer: TorchTrainer, plan: RunPlan) -> Outcome:
    """Run `fit` beside the main thread, which must stay free for signals."""
    box: dict[str, Any] = {}

    def target() -> None:
        try:
            box["result"] = trainer.fit()
        except BaseException as error:  # raised again in the main thread
            box["error"] = error

    thread = threading.Thread(target=target, name="ray-train-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
    if "error" in box:
        raise _plain(box["error"], plan) from box["error"]
    return Outcome(**box["result"].return_value)


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs on every worker; rank 0's return value reaches the driver."""
    import torch
    from ray.train.torch import get_device

    from vae_dist.engine.finish import finish
    from vae_dist.engine.lock import only_writer
    from vae_dist.engine.loop import train

    plan: RunPlan = settings["plan"]
    context, device = ray.train.get_context(), get_device()
    if device.type == "cpu":
        torch.set_num_threads(settings["threads"])
    writes = context.get_world_rank() == 0
    with only_writer(plan.run_dir) if writes else nullcontext():
        trained = train(plan, device, StopPoller(settings["flag"]))
        result = finish(plan, trained, context.get_world_size(), device) if trained.finished and writes else None
    return {"result": result, "steps": trained.steps}


def _worker_environment(group: WorkerGroup) -> dict[str, str]:
    passed = ("TRITON_INTERPRET", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
    return {
        **{name: os.environ[name] for name in passed if name in os.environ},
        **({} if group.use_gpu else {"DS_ACCELERATOR": "cpu", **_MALLOC}),
        "OMP_NUM_THREADS": str(group.cpus_per_worker),
    }


def _plain(error: BaseException, plan: RunPlan) -> BaseException:
    """The worker's own VaeDistError if there is one, else what failed and where to read on."""
    if not isinstance(error, TrainingFailedError):
        return error
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else [error]
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, VaeDistError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    first = str(next(iter(failures), error)).strip()
    return RunError(
        f"The training workers failed:\n{first}\nThe run is in {plan.run_dir}; the same command resumes it from its "
        "newest checkpoint."
    )


class _Follower:
    """Prints each new record of metrics.jsonl while the workers run."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan, self._over = plan, threading.Event()
        self._tail = MetricsTail(plan.run_dir)
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._tail.read_new()
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._print_new()

    def _follow(self) -> None:
        while not self._over.wait(_FOLLOW_SECONDS):
            self._print_new()

    def _print_new(self) -> None:
        for record in self._tail.read_new():
            line = format_record(record, self._plan.total_steps)
            if line:
                print(line, file=sys.stderr, flush=True)
