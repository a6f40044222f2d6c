"""What a CUDA device can do at most, measured: `python -m bench.ceilings` prints it as JSON.

Copy bandwidth counts bytes read and written. Matrix products run on random data (zeros are faster than real data).
A figure's floor is the larger of its bytes over the bandwidth and its operations over the rate.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.case import Case
from bench.measure import spread

_COPY_BYTES = 2 << 30
_SIDE = 8192
_ROUNDS = 10


@dataclass(frozen=True)
class Ceilings:
    """copy_bytes_per_s; matmul_flops_per_s by "bf16", "fp16", "tf32", "fp32"; launch_s: an empty kernel started from
    Python, graph_kernel_s: the same inside a replayed graph.
    """

    device: str
    copy_bytes_per_s: float
    matmul_flops_per_s: dict[str, float]
    launch_s: float
    graph_kernel_s: float

    def floor(self, case: Case) -> float:
        """Seconds that no version of the op runs much faster than."""
        rates = self.matmul_flops_per_s
        rate = max(rates.values()) if case.matmul else rates["fp32"]
        return max(case.bytes_moved / self.copy_bytes_per_s, case.flops / rate)


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Median over rounds of the mean of `repeats` calls between two events."""
    for _ in range(3):
        call()
    samples = []
    for _ in range(_ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1000 / repeats)
    return spread(samples)[0]


def _matmul(dtype: torch.dtype, tf32: bool = False) -> float:
    a, b = (torch.randn(_SIDE, _SIDE, device="cuda").to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        return 2 * _SIDE**3 / _seconds(lambda: a @ b, repeats=2)
    finally:
        torch.set_float32_matmul_precision(before)


def _copy() -> float:
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _seconds(lambda: target.copy_(source), repeats=4)


def measure_ceilings() -> Ceilings:
    """A few seconds on the current CUDA device."""
    cell = torch.zeros(1, device="cuda")
    launch = _seconds(lambda: cell.add_(1), repeats=1000)
    graph, kernels = torch.cuda.CUDAGraph(), 100
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            cell.add_(1)
    return Ceilings(
        device=torch.cuda.get_device_name(),
        copy_bytes_per_s=_copy(),
        matmul_flops_per_s={
            "bf16": _matmul(torch.bfloat16),
            "fp16": _matmul(torch.float16),
            "tf32": _matmul(torch.float32, tf32=True),
            "fp32": _matmul(torch.float32),
        },
        launch_s=launch,
        graph_kernel_s=_seconds(graph.replay, repeats=20) / kernels,
    )


def load(path: Path) -> Ceilings | None:
    return Ceilings(**json.loads(path.read_text())) if path.exists() else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ceilings", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file to write the JSON to as well")
    args = parser.parse_args(argv)
    found = measure_ceilings()
    if args.out:
        args.out.write_text(json.dumps(asdict(found), indent=1))
    rates = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in found.matmul_flops_per_s.items())
    print(f"copy {found.copy_bytes_per_s / 1e12:.2f} TB/s; {_SIDE}^3 products in TFLOP/s: {rates}")
    print(f"launch {found.launch_s * 1e6:.1f} µs, in a graph {found.graph_kernel_s * 1e6:.1f} µs")


if __name__ == "__main__":
    main()
