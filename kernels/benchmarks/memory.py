"""Peak memory of one step beyond its inputs and its results (both gradients, whether or not they exist at the peak).

On a GPU from torch's allocator. On a CPU from the kernel's high-water mark of the resident set, in a process of its own
for each contender, because freed memory is reused and would hide what the next contender needs:

    python memory.py CONTENDER TASK N,H,V
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import torch
from contender import Loss
from contenders import contenders, step
from problem import Inputs, Shape, make_inputs, parse_shape

_HERE = Path(__file__).resolve().parent


def device_extra_bytes(loss: Loss, inputs: Inputs, task: str) -> int:
    """Of one step on the GPU."""
    inputs.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, inputs, task)
    torch.cuda.synchronize()
    inputs.clear()
    return max(0, torch.cuda.max_memory_allocated() - before - _result_bytes(inputs, task))


def host_extra_bytes(name: str, shape: Shape, task: str) -> int:
    """Of one step on the CPU, in a new process.

    Raises:
        RuntimeError: the process failed or the system has no high-water mark to reset; the message is its last line.
    """
    command = [sys.executable, str(Path(__file__).resolve()), name, task, ",".join(map(str, shape))]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_HERE.parent), os.environ.get("PYTHONPATH")])),
        # Blocks from 1 MiB on go back to the system when they are freed, so what is resident is what is alive.
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    return int(done.stdout.split()[-1])


def _result_bytes(inputs: Inputs, task: str) -> int:
    return 0 if task == "forward" else inputs.bytes


def _measure(name: str, task: str, shape: Shape) -> int:
    contender = next(contender for contender in contenders("cpu") if contender.name == name)
    loss = contender.make()
    # Libraries, threads and compilers are not part of a step; what is compiled must see the step's own shape.
    warm_up = make_inputs(shape, "cpu", "normal").to(contender.dtype)
    # In a thread that ends: what a contender keeps for a thread's next step counts as its own, like all it allocates.
    thread = threading.Thread(target=step, args=(loss, warm_up, task))
    thread.start()
    thread.join()
    del warm_up
    inputs = make_inputs(shape, "cpu", "normal").to(contender.dtype)
    gc.collect()
    _return_freed_memory()
    before = _status("VmRSS")
    # 5 resets the high-water mark to what is resident now (proc_pid_clear_refs(5)).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    value = step(loss, inputs, task)
    peak = _status("VmHWM")
    del value
    return max(0, peak - before - _result_bytes(inputs, task))


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    print(_measure(sys.argv[1], sys.argv[2], parse_shape(sys.argv[3])))
