"""Where the tasks of a prepare run: on the Ray cluster if there is one, else in processes of this machine.

Both give what `vae_dist.data.prepare.tasks.run_here` gives. A list of one task is always run in this process, with the
tokenizer's own threads: a small corpus pays neither for processes nor for a cluster.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from vae_dist.data.prepare.tasks import Item, Result, Run, run_here
from vae_dist.errors import MachineError, VaeDistError

# More blocks cost Ray's scheduler more than they gain.
_LARGEST_BLOCK_COUNT = 10_000


def executor(workers: int | None = None) -> Run:
    """The executor for this process.

    Args:
        workers: local processes; default: one for each CPU this process may use. On a Ray cluster tasks take a CPU
            each, and the cluster decides how many run at a time.
    """
    return partial(_run, workers or len(os.sched_getaffinity(0)))


def _run(workers: int, function: Callable[[Item], Result], items: Sequence[Item], /) -> Iterator[Result]:
    if len(items) < 2:
        return run_here(function, items)
    if has_cluster():
        return run_on_ray(function, items)
    return run_here(function, items) if workers == 1 else run_in_processes(workers, function, items)


def has_cluster() -> bool:
    """Whether this process belongs to a Ray cluster: by RAY_ADDRESS, as in a Ray job, or because it is connected."""
    if os.environ.get("RAY_ADDRESS"):
        return True
    # Ray takes a second to import, and is not connected when nobody has.
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def run_in_processes(workers: int, function: Callable[[Item], Result], items: Sequence[Item], /) -> Iterator[Result]:
    """In at most so many processes of this machine, which end with this one.

    Raises:
        MachineError: a process died.
    """
    processes = min(workers, len(items))
    # Forked from a clean process: this one may hold threads and locks.
    context = multiprocessing.get_context("forkserver")
    # Shards are written with webdataset, which takes seconds to import: once is enough.
    context.set_forkserver_preload(["vae_dist.data.prepare.making", "webdataset"])
    pool = ProcessPoolExecutor(processes, context, _enter_process, (dict(os.environ), max(1, workers // processes)))
    waiting = iter(items)
    running: set[Future[Result]] = set()
    try:
        while True:
            # A few tasks are given out ahead, the rest when there is room: there may be very many.
            while len(running) < 2 * processes and (item := next(waiting, None)) is not None:
                running.add(pool.submit(function, item))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise MachineError(
            "A process that prepares data died, probably for lack of memory. What is finished is kept: run the same "
            "command again, with fewer --workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _enter_process(environment: dict[str, str], threads: int) -> None:
    """What a process does before its first task."""
    # The process it was forked from may be older than the credentials of this prepare.
    os.environ.clear()
    os.environ.update(environment)
    # Ctrl-C is the parent's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _set_tokenizer_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _set_tokenizer_threads(threads: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)


def _end_with_parent() -> None:
    """A parent that was killed cannot say so; its processes would write into the next prepare's folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_on_ray(function: Callable[[Item], Result], items: Sequence[Item], /) -> Iterator[Result]:
    """As Ray Data tasks of one CPU each, on the cluster that `connect` finds.

    Raises:
        VaeDistError: of a task, as itself.
    """
    import ray.data
    from ray import cloudpickle

    from vae_dist.launch.cluster import connect

    connect()
    _silence_ray_data(ray.data.DataContext.get_current())

    def apply(row: dict[str, bytes]) -> dict[str, bytes]:
        _set_tokenizer_threads(1)
        try:
            return {"result": cloudpickle.dumps(function(cloudpickle.loads(row["item"])))}
        except VaeDistError as error:
            # Raised here, it would reach the user inside Ray's traceback.
            return {"result": cloudpickle.dumps(error)}

    # As bytes, for Arrow has no columns of Python objects.
    rows = [{"item": cloudpickle.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(items), _LARGEST_BLOCK_COUNT))
    for row in dataset.map(apply, num_cpus=1).iter_rows():
        result = cloudpickle.loads(row["result"])
        if isinstance(result, VaeDistError):
            raise result
        yield result


def _silence_ray_data(context: Any) -> None:
    """Progress is ours to show."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
