"""The loss at one shape: correctness of all, then speed and memory."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

import torch
from contender import TASKS, Contender, Loss
from contenders import YARDSTICK, contenders, step
from correctness import Errors, Reference, WrongKernelError, errors, reference, violations
from memory import device_extra_bytes, host_extra_bytes
from problem import DATA, Inputs, Shape, make_inputs
from timing import ColdCache, Turn, alternate, copies_beyond_cache, device_turn, host_turn


@dataclass
class Entrant:
    """A contender in one task at one shape, and what became of it."""

    contender: Contender
    loss: Loss
    errors: dict[str, Errors] = field(default_factory=dict)


@dataclass
class Task:
    """All that is known of one task at one shape: entrants by name, milliseconds by kind, bytes, reasons."""

    entrants: dict[str, Entrant] = field(default_factory=dict)
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    could_not_run: dict[str, str] = field(default_factory=dict)
    memory_not_measured: dict[str, str] = field(default_factory=dict)


def measure(
    shape: Shape, device: str, names: Iterable[str], tasks: tuple[str, ...], repeats: int, with_memory: bool
) -> dict[str, Task]:
    """What is known of each task at `shape`, for the contenders in `names`.

    Raises:
        WrongKernelError: one of ours is wrong; nothing has been timed then.
    """
    torch.compiler.reset()
    wanted = set(names)
    found = {task: _enter(device, wanted, task) for task in TASKS if task in tasks}
    for data in DATA:
        _check(found, make_inputs(shape, device, data), data, f"{shape}, {data} data")
    for name, task in found.items():
        # What was entered only to bound the errors of ours is not timed.
        timed = {key: entrant for key, entrant in task.entrants.items() if key in wanted}
        _say(f"{shape}: timing {name}")
        _time(task, timed, _turns(timed, make_inputs(shape, device, "normal"), name, device), repeats)
        if with_memory:
            _say(f"{shape}: memory of {name}")
            _measure_memory(task, timed, shape, name, device)
    return found


def _enter(device: str, wanted: set[str], task: str) -> Task:
    """Make what is wanted, and the plain forms that bound the errors of ours."""
    found = Task()
    for contender in contenders(device):
        if task not in contender.tasks or contender.name not in wanted | set(YARDSTICK.values()):
            continue
        try:
            found.entrants[contender.name] = Entrant(contender, contender.make())
        except Exception as error:
            found.could_not_run[contender.name] = _reason(error)
    return found


def _check(found: dict[str, Task], single: Inputs, data: str, where: str) -> None:
    """Fill the errors; those that cannot run leave with their reason, a wrong one of ours ends all."""
    _say(f"{where}: float64")
    wanted = reference(single, tuple(found))
    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = single.to(dtype)
        for name, task in found.items():
            for entrant in [entrant for entrant in task.entrants.values() if entrant.contender.dtype == dtype]:
                _say(f"{where}: {name} of {entrant.contender.name}")
                wrong += _run_once(entrant, task, inputs, name, data, wanted)
        for name, task in found.items():
            wrong += _gate(task, dtype, name, data)
    if wrong:
        raise WrongKernelError(f"{where}:\n  " + "\n  ".join(wrong))


def _run_once(entrant: Entrant, task: Task, inputs: Inputs, name: str, data: str, wanted: Reference) -> list[str]:
    """Fill the errors of one; an exception of ours is a wrong kernel, unless the machine is too small for it."""
    own = entrant.contender
    try:
        entrant.errors[data] = errors(own, entrant.loss, inputs, name, wanted)
        return []
    except Exception as error:
        reason, is_wrong = _reason(error), own.is_ours and not isinstance(error, (torch.OutOfMemoryError, MemoryError))
    inputs.clear()
    _leave(task, own.name, reason)
    return [f"{own.name}, {name}: {reason}"] if is_wrong else []


def _gate(task: Task, dtype: torch.dtype, name: str, data: str) -> list[str]:
    yardstick = task.entrants.get(YARDSTICK[dtype])
    bounds = yardstick.errors[data] if yardstick is not None else None
    return [
        f"{key}, {name}: {violation}"
        for key, entrant in task.entrants.items()
        if entrant.contender.is_ours and entrant.contender.dtype == dtype
        for violation in violations(entrant.errors[data], bounds, dtype)
    ]


def _turns(timed: dict[str, Entrant], single: Inputs, name: str, device: str) -> dict[str, dict[str, Turn]]:
    """Turns by kind and contender: "" on the CPU; "" (nothing in the L2 cache) and "hot" on a GPU."""
    dtypes = {entrant.contender.dtype for entrant in timed.values()}
    if device == "cpu":
        inputs = {dtype: single.to(dtype) for dtype in dtypes}
        return {"": {key: _host(entrant, inputs, name) for key, entrant in timed.items()}}
    copies = {dtype: _copies(single, dtype) for dtype in dtypes}
    flush = ColdCache()
    return {
        "": {key: _cold(entrant, copies, name, flush) for key, entrant in timed.items()},
        "hot": {key: _hot(entrant, copies, name) for key, entrant in timed.items()},
    }


def _time(task: Task, timed: dict[str, Entrant], turns: dict[str, dict[str, Turn]], repeats: int) -> None:
    for key in list(timed):
        # Untimed, and a test: what fits once may not fit beside the copies of the inputs.
        if not _warm_up(task, key, [of_kind[key] for of_kind in turns.values()]):
            del timed[key]
            for of_kind in turns.values():
                del of_kind[key]
    task.milliseconds = {kind: alternate(of_kind, repeats) for kind, of_kind in turns.items()}


def _warm_up(task: Task, name: str, turns: list[Turn]) -> bool:
    """Whether each turn can be taken; if not, the contender leaves with its reason."""
    try:
        for turn in turns:
            turn()
        return True
    except Exception as error:
        reason = _reason(error)
    _leave(task, name, reason)
    return False


def _copies(single: Inputs, dtype: torch.dtype) -> list[Inputs]:
    first = single.to(dtype)
    return [first, *(single.to(dtype) for _ in range(copies_beyond_cache(first.bytes) - 1))]


def _host(entrant: Entrant, inputs: dict[torch.dtype, Inputs], name: str) -> Turn:
    own = inputs[entrant.contender.dtype]
    return host_turn(partial(step, entrant.loss, own, name), own.clear)


def _cold(entrant: Entrant, copies: dict[torch.dtype, list[Inputs]], name: str, flush: ColdCache) -> Turn:
    own = copies[entrant.contender.dtype]
    rotation = cycle(own)
    current: list[Inputs] = []

    def prepare() -> None:
        current[:] = [next(rotation)]
        # All, for other contenders leave gradients there, and a second one would be added to the first.
        for inputs in own:
            inputs.clear()
        flush()

    return device_turn(lambda: step(entrant.loss, current[0], name), prepare)


def _hot(entrant: Entrant, copies: dict[torch.dtype, list[Inputs]], name: str) -> Turn:
    own = copies[entrant.contender.dtype][0]

    def prepare() -> None:
        own.clear()
        step(entrant.loss, own, name)
        own.clear()

    return device_turn(lambda: step(entrant.loss, own, name), prepare)


def _measure_memory(task: Task, timed: dict[str, Entrant], shape: Shape, name: str, device: str) -> None:
    single = make_inputs(shape, device, "normal") if device == "cuda" else None
    for key, entrant in timed.items():
        try:
            if single is None:
                task.extra_bytes[key] = host_extra_bytes(key, shape, name)
            else:
                inputs = single.to(entrant.contender.dtype)
                task.extra_bytes[key] = device_extra_bytes(entrant.loss, inputs, name)
        except RuntimeError as error:
            task.memory_not_measured[key] = _reason(error)


def _leave(task: Task, name: str, reason: str) -> None:
    """Call it after the except clause: until then the traceback holds the memory that is freed here."""
    del task.entrants[name]
    task.could_not_run[name] = reason
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    """Kind and first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
