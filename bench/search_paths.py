"""Which way of searching is fastest at which size, per instruction set: `python -m bench.search_paths`.

For each size the exact op, the same on a prepared codebook, the scores alone (prepared, precision "fast": no second
pass, no codebook to pack) and the unfused one (torch.addmm, then argmax: rounded, so a candidate for "fast" only), each
in milliseconds; the first also in GFLOP/s (2 N K D operations) and as a share of the third's rate. Processor time of
one thread, the best of several runs, the ways in turn: of all measures the one that a busy machine disturbs least. The
table belongs in kernels/nearest/README.md.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from bench.search import addmm_argmax
from vqfast.ops import nearest_code, prepare

ISAS = ("amx", "avx512", "avx2")
# (N, K, D): few rows, many rows, and the sizes of the other benchmarks.
SIZES = (
    (16, 16, 8),
    (16, 16384, 64),
    (256, 16384, 64),
    (8192, 512, 64),
    (8192, 8192, 8),
    (8192, 8192, 64),
    (8192, 8192, 256),
)


def _milliseconds(ways: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """The least time of each way, in turn for about `seconds`."""
    best = [float("inf")] * len(ways)
    for way in ways:
        way()
    end = time.perf_counter() + seconds
    while True:
        for i, way in enumerate(ways):
            start = time.process_time()
            way()
            best[i] = min(best[i], time.process_time() - start)
        if time.perf_counter() > end:
            return [1e3 * b for b in best]


def measure(seconds: float) -> None:
    """Prints the rows of the instruction set in use."""
    from vqfast import _cpu

    torch.set_num_threads(1)
    for N, K, D in SIZES:
        g = torch.Generator().manual_seed(1)
        x, codebook = torch.randn(N, D, generator=g), torch.randn(K, D, generator=g)
        ready = prepare(codebook)
        exact, prepared, scores, unfused = _milliseconds(
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
            f"| {_cpu.isa()} | {N}, {K}, {D} | {exact:.3g} | {prepared:.3g} | {scores:.3g} | {unfused:.3g} | "
            f"{rate:.0f} | {100 * rate / score_rate:.0f} % |",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.search_paths", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="per size")
    parser.add_argument("--one", action="store_true", help="only the instruction set of VQFAST_ISA")
    args = parser.parse_args(argv)
    if args.one:
        measure(args.seconds)
        return 0
    print("| set | N, K, D | exact, ms | prepared | scores alone | unfused | exact, GFLOP/s | of the scores' rate |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for isa in ISAS:
        command = [sys.executable, "-m", "bench.search_paths", "--one", "--seconds", str(args.seconds)]
        subprocess.run(command, env=os.environ | {"VQFAST_ISA": isa}, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
