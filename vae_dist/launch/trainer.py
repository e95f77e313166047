"""The driver: workers around the engine's loop, progress for people, errors made plain."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any

from vae_dist.engine.plan import RunPlan
from vae_dist.engine.watchdog import hang_message
from vae_dist.errors import VaeDistError
from vae_dist.launch.cluster import WorkerGroup
from vae_dist.launch.prometheus import show_record
from vae_dist.launch.stop import StopPoller, ToDriver, signals_to
from vae_dist.launch.supervise import Outcome, Supervisor, WorkersLostError
from vae_dist.launch.workers import Rank, WorkersFailedError, run_workers
from vae_dist.observe.metrics import MetricsTail
from vae_dist.observe.progress import format_record
from vae_dist.observe.start_up import StartUp

_FOLLOW_SECONDS = 0.5
# glibc gives large blocks back to the kernel when they are freed, and each step would fault the same pages in
# again: the loss's forward and backward took 41 ms with its defaults and 30 ms with these (480 tokens, one core).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


def fit(plan: RunPlan, group: WorkerGroup, start_up: StartUp) -> Outcome:
    """Train on the connected cluster, showing progress on standard error; SIGINT and SIGTERM save and return.

    Raises:
        VaeDistError: what a worker raised for the user.
        WorkersLostError: workers were lost too often, with where to look.
        MachineError: they were lost, and there was no room for others.
    """
    supervisor = Supervisor(plan, lambda group, flag: _beside_main_thread(lambda: _train(plan, group, flag, start_up)))

    def stop() -> None:
        print("stopping: saving a checkpoint at the next step (again to stop at once)", file=sys.stderr, flush=True)
        supervisor.stop()

    with signals_to(stop), _Follower(plan):
        return supervisor.run(group)


def _train(plan: RunPlan, group: WorkerGroup, flag: Any, start_up: StartUp) -> Outcome:
    """One group of workers, from start to end."""
    settings = {"plan": plan, "flag": flag, "threads": group.cpus_per_worker, "start_up": start_up}
    timeout = plan.config.cluster.collective_timeout_seconds
    try:
        found = run_workers(group, _worker_environment(group), timeout, _worker, settings)
    except WorkersFailedError as error:
        raise _plain(error, plan) from error
    return Outcome(**found)


def _beside_main_thread(function: Callable[[], Outcome]) -> Outcome:
    """Call it in a thread: the main one must stay free for signals."""
    found: Future[Outcome] = Future()

    def target() -> None:
        try:
            found.set_result(function())
        except BaseException as error:  # raised again in the main thread
            found.set_exception(error)

    # A daemon: a second signal ends the command at once.
    thread = threading.Thread(target=target, name="workers", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
    return found.result()


def _worker(rank: Rank, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs on every worker; rank 0's return value reaches the driver."""
    import torch

    from vae_dist.engine.finish import finish
    from vae_dist.engine.lock import only_writer
    from vae_dist.engine.loop import train

    logging.getLogger("vae_dist").addHandler(ToDriver(settings["flag"]))
    plan: RunPlan = settings["plan"]
    start_up: StartUp = settings["start_up"]
    start_up.mark("workers")
    device = torch.device("cuda", rank.local_rank) if rank.gpus else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(settings["threads"])
    writes = rank.rank == 0
    with only_writer(plan.run_dir) if writes else nullcontext():
        trained = train(plan, device, StopPoller(settings["flag"]), start_up)
        result = finish(plan, trained, rank.world_size, device) if trained.finished and writes else None
    return {"result": result, "steps": trained.steps}


def _worker_environment(group: WorkerGroup) -> dict[str, str]:
    passed = ("TRITON_INTERPRET", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
    return {
        **{name: os.environ[name] for name in passed if name in os.environ},
        **({} if group.use_gpu else {"DS_ACCELERATOR": "cpu", **MALLOC}),
        "OMP_NUM_THREADS": str(group.cpus_per_worker),
    }


def _plain(error: WorkersFailedError, plan: RunPlan) -> VaeDistError:
    """A worker's own VaeDistError if there is one, else what failed and where to read on."""
    for cause in error.causes:
        if isinstance(cause, VaeDistError):
            return cause
    first = hang_message(plan.run_dir, plan.started_at) or str(error).strip()
    return WorkersLostError(
        f"The training workers failed:\n{first}\nThe run is in {plan.run_dir}; the same command resumes it from its "
        "newest checkpoint."
    )


class _Follower:
    """Prints each new record of metrics.jsonl while the workers run, and gives it to Prometheus."""

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
            show_record(record, self._plan.run_dir.name)
            line = format_record(record, self._plan.total_steps)
            if line:
                print(line, file=sys.stderr, flush=True)
