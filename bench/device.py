"""What a figure was taken on: the device's name, and as many threads for everybody."""

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def device_text(device: str) -> str:
    """The name that a person knows it by, with the cores or the compute capability that it shows."""
    if torch.device(device).type == "cuda":
        p = torch.cuda.get_device_properties(device)
        return f"{p.name}, sm_{p.major}{p.minor}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        name = match[1].strip() if match else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability().lower()}"


def slug(text: str) -> str:
    """A device's text as a file name: 'NVIDIA H200, sm_90' gives nvidia-h200-sm-90."""
    plain = re.sub(r"\((r|tm)\)|\bcpu\b|@.*?(?=,|$)", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _processor_time() -> tuple[float, float]:
    """(idle, all) ticks of every processor since the start."""
    ticks = [float(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def others_share(seconds: float = 0.3) -> float:
    """Share of the processors that other programs take while this one waits; 0 where the system does not tell."""
    if not Path("/proc/stat").exists():
        return 0.0
    idle, total = _processor_time()
    time.sleep(seconds)
    later_idle, later_total = _processor_time()
    return 1 - (later_idle - idle) / max(later_total - total, 1.0)


@contextmanager
def same_threads(threads: int) -> Iterator[None]:
    """Give torch, vqfast (which follows torch), faiss, scikit-learn and every BLAS the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    limits = None
    try:
        import faiss

        faiss.omp_set_num_threads(threads)
    except ImportError:
        pass
    try:
        from threadpoolctl import threadpool_limits

        limits = threadpool_limits(threads)
    except ImportError:
        pass
    try:
        yield
    finally:
        if limits is not None:
            limits.unregister()
        torch.set_num_threads(before)
