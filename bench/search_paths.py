"""Which way of searching is fastest at which size, per instruction set: `python -m bench.search_paths`.

Times every way that this processor has (VQFAST_CPU_SCORES names them: a score engine and how many panels share a
maximum; or a library's product, "unfused") at every size of a grid, exact, the codebook packed anew in each call, and
prints the fastest of each size with its milliseconds. With --write the times become the table that the library
chooses by, csrc/include/nearest_paths.inc, from the next build on. Minutes.

With --rates instead, for a few sizes: the exact op as it chooses, the same on a prepared codebook, the scores alone
(prepared, precision "fast": no second pass, no codebook to pack) and torch.addmm with argmax (rounded: no candidate),
each in milliseconds; the first also in GFLOP/s (2 N K D operations) and as a share of the third's rate.

Processor time of one thread, the best of several rounds, the ways in turn: of all measures the one that a busy machine
disturbs least. Both tables belong in kernels/nearest/README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product

import torch

from bench.device import device_text
from bench.search import addmm_argmax
from bench.search_table import Device, Size, replace
from vqfast.kernels.nearest.library import by_product
from vqfast.ops import nearest_code, prepare

ISAS = ("amx", "avx512", "avx2")
# From a few rows, where packing a codebook is most of the work, to many.
GRID: tuple[Size, ...] = tuple(product((4, 64, 4096), (64, 512, 2048, 16384), (8, 16, 32, 64, 128, 256)))
# (N, K, D): few rows, many rows, and the sizes of the other benchmarks.
RATES: tuple[Size, ...] = (
    (16, 16, 8),
    (16, 16384, 64),
    (256, 16384, 64),
    (8192, 512, 64),
    (8192, 8192, 8),
    (8192, 8192, 64),
    (8192, 8192, 256),
)
# Long enough for the clock, and for a call's own noise to be seen through.
SAMPLE_S = 0.0005
LEAST_ROUNDS = 3


def _milliseconds(ways: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """The least time of each way, in turn for about `seconds`, at least three rounds."""
    calls = []
    for way in ways:
        way()
        start = time.process_time()
        way()
        calls.append(max(1, round(SAMPLE_S / max(time.process_time() - start, 1e-6))))
    best = [float("inf")] * len(ways)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        rounds += 1
        # Another one first in each round: what a way leaves in the caches falls on all.
        for i in (*range(rounds % len(ways), len(ways)), *range(rounds % len(ways))):
            start = time.process_time()
            for _ in range(calls[i]):
                ways[i]()
            best[i] = min(best[i], (time.process_time() - start) / calls[i])
    return [1e3 * b for b in best]


def _pair(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    N, K, D = size
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, D, generator=g), torch.randn(K, D, generator=g)


def _way(name: str, x: torch.Tensor, codebook: torch.Tensor) -> Callable[[], torch.Tensor]:
    if name == "unfused":  # called itself: the op leaves it out for small codebooks
        return lambda: by_product(x, codebook, "l2", lambda rows: nearest_code(rows, codebook))

    def search() -> torch.Tensor:
        os.environ["VQFAST_CPU_SCORES"] = name
        return nearest_code(x, codebook)

    return search


def ways(seconds: float) -> Device:
    """Every way of the instruction set in use at every size of the grid."""
    from vqfast import _cpu

    names = tuple(_cpu.nearest_paths())
    note = f"{device_text('cpu')}, torch {torch.__version__}"
    device = Device(_cpu.isa(), note, names)
    try:
        for size in GRID:
            x, codebook = _pair(size)
            calls = [_way(name, x, codebook) for name in names]
            first, *rest = (call() for call in calls)
            if wrong := [name for name, got in zip(names[1:], rest, strict=True) if not torch.equal(got, first)]:
                raise AssertionError(f"N, K, D = {size}: {', '.join(wrong)} differ from {names[0]}")
            device.times[size] = tuple(_milliseconds(calls, seconds))
    finally:
        os.environ.pop("VQFAST_CPU_SCORES", None)
    return device


def rates(seconds: float) -> None:
    """Prints the rows of the instruction set in use."""
    from vqfast import _cpu

    for size in RATES:
        (N, K, D), (x, codebook) = size, _pair(size)
        ready = prepare(codebook)
        exact, prepared, scores, rounded = _milliseconds(
            (
                lambda x=x, codebook=codebook: nearest_code(x, codebook),
                lambda x=x, ready=ready: nearest_code(x, ready),
                lambda x=x, ready=ready: nearest_code(x, ready, precision="fast"),
                lambda x=x, codebook=codebook: addmm_argmax(x, codebook),
            ),
            seconds,
        )
        rate, score_rate = (2e-6 * N * K * D / t for t in (exact, scores))
        print(
            f"| {_cpu.isa()} | {N}, {K}, {D} | {_cpu.nearest_path(N, K, D)} | {exact:.3g} | {prepared:.3g} | "
            f"{scores:.3g} | {rounded:.3g} | {rate:.0f} | {100 * rate / score_rate:.0f} % |",
            flush=True,
        )


def fastest(device: Device) -> None:
    """Prints the fastest way of each size, a row for each N and K."""
    rows: dict[tuple[int, int], list[str]] = {}
    for (N, K, _), times in device.times.items():
        least = min(times)
        rows.setdefault((N, K), []).append(f"{device.ways[times.index(least)]} {least:.3g}")
    for (N, K), cells in rows.items():
        print(f"| {device.name} | {N}, {K} | {' | '.join(cells)} |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.search_paths", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="keep the times as the library's table")
    what.add_argument("--rates", action="store_true", help="the op as it is, beside its scores alone")
    parser.add_argument("--seconds", type=float, default=0.6, help="per size")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the instruction set of VQFAST_ISA
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.one and args.rates:
        rates(args.seconds)
        return 0
    if args.one:
        device = ways(args.seconds)
        print(json.dumps([device.name, device.note, device.ways, list(device.times.items())]))
        return 0
    command = [sys.executable, "-m", "bench.search_paths", "--one", "--seconds", str(args.seconds)]
    if args.rates:
        print(
            "| set | N, K, D | way | exact, ms | prepared | scores alone | addmm + argmax | GFLOP/s | of the scores' |"
        )
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
    else:
        columns = sorted({D for _, _, D in GRID})
        print(f"| set | N, K | D = {' | '.join(map(str, columns))} |\n|---|---|{'---|' * len(columns)}", flush=True)
    measured = []
    for isa in ISAS:
        environment = {name: value for name, value in os.environ.items() if name != "VQFAST_CPU_SCORES"}
        environment |= {"VQFAST_ISA": isa, "OMP_NUM_THREADS": "1"}
        if args.rates:
            subprocess.run([*command, "--rates"], env=environment, check=True)
            continue
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        name, note, names, times = json.loads(done.stdout)
        if name != isa:  # this processor does not have it, and has used another
            continue
        measured.append(Device(name, note, tuple(names), {tuple(size): tuple(t) for size, t in times}))
        fastest(measured[-1])
    if args.write:
        replace(measured)
        print("written; in effect after the next build", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
