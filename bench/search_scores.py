"""The kinds of scores that a search can be made of on a CUDA device, side by side: `python -m bench.search_scores`.

For each size and each kind (VQFAST_CUDA_SCORES) the exact search and the scores alone (precision "fast"), in
milliseconds: medians over rounds that take the kinds in turn, between two CUDA events; the rate of the exact one (2 N K
D operations), and how many rows are wrong. The last row of a size is torch's bfloat16 product of the same shape, which
writes N x K scores. A kind that the device does not have gives way to the next best, and has its time.
"""

import os
import statistics
import sys
from collections.abc import Callable

import torch

import vqfast
from bench.exact import exact_nearest
from vqfast.ops import nearest_code

KINDS = ("float32", "bfloat16", "hopper")
# (N, K, D): a large batch against large codebooks, and few rows.
SIZES = ((262144, 8192, 256), (262144, 16384, 8), (65536, 1024, 64), (1024, 16384, 64))
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


def measure(N: int, K: int, D: int) -> int:
    """Prints the rows of a size; how many rows some kind got wrong."""
    g = torch.Generator("cuda").manual_seed(1)
    x, codebook = (torch.randn(n, D, generator=g, device="cuda") for n in (N, K))
    low = x.bfloat16(), codebook.bfloat16()
    want = exact_nearest(x, codebook)
    wrong = {kind: int((_search(kind, x, codebook, "exact") != want).sum()) for kind in KINDS}
    ways: dict[str, Callable[[], object]] = {"product": lambda: low[0] @ low[1].T}
    for kind in KINDS:
        for precision in ("exact", "fast"):
            ways[f"{kind} {precision}"] = lambda kind=kind, precision=precision: _search(kind, x, codebook, precision)
    times = milliseconds(ways)
    for kind in KINDS:
        exact, fast = times[f"{kind} exact"], times[f"{kind} fast"]
        rate = 2e-9 * N * K * D / exact
        print(f"| {N}, {K}, {D} | {kind} | {exact:.3f} | {fast:.3f} | {rate:.0f} | {wrong[kind]} |", flush=True)
    product = times["product"]
    print(f"| {N}, {K}, {D} | torch's product | {product:.3f} | | {2e-9 * N * K * D / product:.0f} | |", flush=True)
    return sum(wrong.values())


def main() -> int:
    """0 if every kind was right at every size, else 1; 2 without a device."""
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 2
    before = os.environ.get("VQFAST_CUDA_SCORES")
    print("| N, K, D | scores | exact, ms | scores alone | TFLOP/s | wrong |\n|---|---|---|---|---|---|")
    try:
        with vqfast.backend("cuda"):
            return int(sum(measure(*size) for size in SIZES) > 0)
    finally:
        os.environ.pop("VQFAST_CUDA_SCORES")
        if before is not None:
            os.environ["VQFAST_CUDA_SCORES"] = before


if __name__ == "__main__":
    sys.exit(main())
