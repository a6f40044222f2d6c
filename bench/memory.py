"""Memory that a call takes beyond its inputs and its result, at the worst moment.

On a CPU each call is measured in a process of its own. `python -m bench.memory` is the server that those are forked
from: it has imported everything and started no thread, so a child is ready in milliseconds.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Run
from bench.device import same_threads
from bench.peers import CASES
from bench.sources import ROOT

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt
_LIMIT_S = 120


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for item in result:
            yield from _tensors(item)


def result_bytes(result: Any) -> int:
    """Bytes of the tensors in a result, storage that two of them share counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(result)}.values())


def cuda_peak(run: Run) -> int:
    """High water of torch's allocator on the current device during a call, less what was there and the result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run.call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - result_bytes(result)
    del result
    return max(0, peak)


def _resident(field: str) -> int:
    return int(re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)[1]) << 10


def _smaller(shape: dict) -> dict:
    """The same op on few vectors, or few images."""
    return {key: min(size, {"N": 64, "B": 2}.get(key, size)) for key, size in shape.items()}


def resident_peak(op: str, shape: dict, dtype: torch.dtype, name: str) -> int:
    """High water of this process during one call of contender `name`, less what was there and the result.

    Whatever is loaded or compiled once is done before: on a small size, or on this one if it is compiled for it. Linux
    counts resident pages in batches per processor: half a megabyte more or less says nothing.
    """
    # Every block of 64 KiB is mapped on its own and goes back when it is freed: the high water is that of this call.
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)

    def prepare(sizes: dict) -> tuple[Run, bool]:
        case = CASES[op](sizes, dtype, "cpu")
        (contender,) = (c for c in case.contenders if c.name == name)
        return contender.prepare(case.problem(0)), contender.compiled

    run, compiled = prepare(shape)
    warm = run if compiled else prepare(_smaller(shape))[0]
    warm.call()
    warm.reset()
    del warm
    gc.collect()
    libc.malloc_trim(0)
    before = _resident("VmRSS")
    _CLEAR.write_text("5")  # sets the high water back to what is resident now
    result = run.call()
    return max(0, _resident("VmHWM") - before - result_bytes(result))


def _serve() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    torch._inductor.config.compile_threads = 1
    for module in ("faiss", "sklearn.metrics", "vector_quantize_pytorch"):
        try:
            importlib.import_module(module)
        except ImportError:
            pass
    for line in sys.stdin:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            os.write(answers, b"\n")
            continue
        try:
            op, shape, dtype, name, threads = json.loads(line)
            with same_threads(threads):
                peak = resident_peak(op, shape, getattr(torch, dtype), name)
            os.write(answers, str(peak).encode())
        finally:
            os._exit(0)


@cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, "-m", "bench.memory"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    atexit.register(server.kill)
    return server


def cpu_peak(case: Case, name: str, threads: int) -> int | None:
    """`resident_peak` of a contender in a process of its own; None where the system does not tell (it is not Linux), or
    where the call fails or takes minutes.
    """
    if not os.access(_CLEAR, os.W_OK):
        return None
    server = _server()
    try:
        print(json.dumps([case.op, dict(case.shape), case.dtype_text, name, threads]), file=server.stdin, flush=True)
    except BrokenPipeError:
        return None
    if not select.select([server.stdout], [], [], _LIMIT_S)[0]:
        os.killpg(server.pid, 9)
        _server.cache_clear()
        return None
    answer = server.stdout.readline().strip()
    return int(answer) if answer else None


if __name__ == "__main__":
    _serve()
