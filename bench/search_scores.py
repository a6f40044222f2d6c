"""The kinds of scores that a search can be made of on a CUDA device, side by side: `python -m bench.search_scores`.

For each of a few sizes and each kind (VQFAST_CUDA_SCORES) the exact search and the scores alone (precision "fast"), in
milliseconds: medians over rounds that take the kinds in turn, between two CUDA events; the rate of the exact one (2 N K
D operations), and how many rows are wrong. The last row of a size is torch's bfloat16 product of the same shape, which
writes N x K scores. A kind that the device does not have gives way to the next best, and has its time.

With --write also the exact search at every size of a grid; the times of all sizes become the lines of this compute
capability in the table that the library chooses by, csrc/include/nearest_paths.inc, from the next build on. A kind that
was wrong at a size has 0 there: it is not chosen. Before anything is timed each kind is tried in a process of its own;
one that hangs or crashes there is left out, and has 0 everywhere.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product

import torch

import vqfast
from bench.device import device_text
from bench.exact import exact_nearest
from bench.search_table import Device, Size, replace
from bench.sources import ROOT
from vqfast.ops import nearest_code

KINDS = ("float32", "bfloat16", "hopper")
# (N, K, D): a large batch against large codebooks, and few rows.
SIZES: tuple[Size, ...] = ((262144, 8192, 256), (262144, 16384, 8), (65536, 1024, 64), (1024, 16384, 64))
GRID: tuple[Size, ...] = tuple(product((16, 512, 16384), (64, 512, 2048, 16384), (8, 64, 256, 512)))
# Every instance of the kernels, as D chooses them, with few rows and with many.
TRIALS: tuple[Size, ...] = SIZES + tuple(product((16, 20000), (2048,), (8, 20, 64, 256, 512)))
TRIAL_S = 40.0  # a new process, its context on the device
ROUNDS = 12


def milliseconds(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(ROUNDS + 2):
        for name, way in ways.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            way()
            end.record()
            end.synchronize()
            if round_number >= 2:
                samples[name].append(start.elapsed_time(end))
    return {name: statistics.median(times) for name, times in samples.items()}


def _search(kind: str, x: torch.Tensor, codebook: torch.Tensor, precision: str) -> torch.Tensor:
    os.environ["VQFAST_CUDA_SCORES"] = kind
    return nearest_code(x, codebook, precision=precision)


def _pair(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    N, K, D = size
    g = torch.Generator("cuda").manual_seed(1)
    return torch.randn(N, D, generator=g, device="cuda"), torch.randn(K, D, generator=g, device="cuda")


def attempt(kind: str) -> None:
    """Searches by a kind at every size of TRIALS, whatever comes out."""
    with vqfast.backend("cuda"):
        for size in TRIALS:
            _search(kind, *_pair(size), "exact")
            torch.cuda.synchronize()


def usable(trial: Callable[[str], list[str]], seconds: float = TRIAL_S) -> tuple[str, ...]:
    """The kinds whose `trial`, a command, ends well in time; all at once. Prints the others."""
    running = {kind: subprocess.Popen(trial(kind), cwd=ROOT, stderr=subprocess.DEVNULL) for kind in KINDS}
    end = time.monotonic() + seconds
    found = []
    for kind, process in running.items():
        try:
            why = f"exit code {code}" if (code := process.wait(max(0.1, end - time.monotonic()))) else ""
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            why = f"no end after {seconds:.0f} s"
        if why:
            print(f"| | {kind} | left out: {why} | | | |", flush=True)
        else:
            found.append(kind)
    return tuple(found)


def _wrong(x: torch.Tensor, codebook: torch.Tensor, kinds: Sequence[str]) -> dict[str, int]:
    want = exact_nearest(x, codebook)
    return {kind: int((_search(kind, x, codebook, "exact") != want).sum()) for kind in kinds}


def measure(size: Size, kinds: Sequence[str]) -> tuple[dict[str, int], dict[str, float]]:
    """Prints the rows of a size; how many rows each kind got wrong, and the times of the exact searches."""
    (N, K, D), (x, codebook) = size, _pair(size)
    low = x.bfloat16(), codebook.bfloat16()
    wrong = _wrong(x, codebook, kinds)
    ways: dict[str, Callable[[], object]] = {"product": lambda: low[0] @ low[1].T}
    for kind in kinds:
        for precision in ("exact", "fast"):
            ways[f"{kind} {precision}"] = lambda kind=kind, precision=precision: _search(kind, x, codebook, precision)
    times = milliseconds(ways)
    for kind in kinds:
        exact, fast = times[f"{kind} exact"], times[f"{kind} fast"]
        rate = 2e-9 * N * K * D / exact
        print(f"| {N}, {K}, {D} | {kind} | {exact:.3f} | {fast:.3f} | {rate:.0f} | {wrong[kind]} |", flush=True)
    rate = 2e-9 * N * K * D / times["product"]
    print(f"| {N}, {K}, {D} | torch's product | {times['product']:.3f} | | {rate:.0f} | |", flush=True)
    return wrong, {kind: times[f"{kind} exact"] for kind in kinds}


def measure_exact(size: Size, kinds: Sequence[str]) -> tuple[dict[str, int], dict[str, float]]:
    """The same of the exact searches alone; prints a size where a kind was wrong."""
    x, codebook = _pair(size)
    wrong = _wrong(x, codebook, kinds)
    if any(wrong.values()):
        print(f"| {', '.join(map(str, size))} | wrong rows | {wrong} |", flush=True)
    return wrong, milliseconds({kind: lambda kind=kind: _search(kind, x, codebook, "exact") for kind in kinds})


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every kind was right at every size, else 1; 2 without a device."""
    parser = argparse.ArgumentParser(prog="python -m bench.search_scores", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="measure the grid too, and keep the times as a table")
    parser.add_argument("--attempt", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 2
    if args.attempt:
        attempt(args.attempt)
        return 0
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    device = Device(f"sm_{capability}", f"{device_text('cuda')}, torch {torch.__version__}", KINDS)
    before = os.environ.get("VQFAST_CUDA_SCORES")
    print("| N, K, D | scores | exact, ms | scores alone | TFLOP/s | wrong |\n|---|---|---|---|---|---|")
    kinds = usable(lambda kind: [sys.executable, "-m", "bench.search_scores", "--attempt", kind])
    mistakes = len(KINDS) - len(kinds)
    try:
        with vqfast.backend("cuda"):
            for size in SIZES + (GRID if args.write else ()):
                wrong, times = (measure if size in SIZES else measure_exact)(size, kinds)
                mistakes += sum(wrong.values())
                device.times[size] = tuple(0 if wrong.get(kind) else times.get(kind, 0) for kind in KINDS)
    finally:
        os.environ.pop("VQFAST_CUDA_SCORES", None)
        if before is not None:
            os.environ["VQFAST_CUDA_SCORES"] = before
    if args.write:
        replace([device])
    return int(mistakes > 0)


if __name__ == "__main__":
    sys.exit(main())
