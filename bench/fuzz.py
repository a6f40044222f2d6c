"""A million rows of search against the exact answer: `python -m bench.fuzz [--rows N] [--metric l2] [--device cpu]`.

Each metric and distribution is drawn anew at random sizes until its share of the rows is done; the table says how many
rows were compared, how many the scores left open, and how many are wrong. Exit code 1 if any is.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.exact import exact_nearest
from vqfast.ops import nearest_code
from vqfast.ops.prepared import METRICS

Pair = tuple[Tensor, Tensor]
Draw = Callable[[int, int, int, torch.Generator], Pair]


def _gaussian(scale: float = 1.0, offset: float = 0.0, dtype: torch.dtype = torch.float32) -> Draw:
    def draw(N: int, K: int, D: int, g: torch.Generator) -> Pair:
        x, codes = torch.randn(N, D, generator=g), torch.randn(K, D, generator=g)
        return (x * scale + offset).to(dtype), (codes * scale + offset).to(dtype)

    return draw


def _clustered(N: int, K: int, D: int, g: torch.Generator) -> Pair:
    """Vectors close to the codes, as late in training."""
    codes = torch.randn(K, D, generator=g)
    return codes[torch.randint(K, (N,), generator=g)] + 0.05 * torch.randn(N, D, generator=g), codes


def _duplicated(N: int, K: int, D: int, g: torch.Generator) -> Pair:
    """Every code several times: all rows tie."""
    x, codes = _gaussian()(N, K, D, g)
    return x, codes[torch.randint(max(K // 4, 1), (K,), generator=g)]


def _one_bit_apart(N: int, K: int, D: int, g: torch.Generator) -> Pair:
    """Codes that differ from a common one by a step of nextafter in one component."""
    codes = torch.randn(1, D, generator=g).repeat(K, 1)
    k, d = torch.arange(K), torch.randint(D, (K,), generator=g)
    up = torch.where(torch.rand(K, generator=g) < 0.5, torch.inf, -torch.inf)
    codes[k, d] = torch.nextafter(codes[k, d], up)
    return codes[:1] + 0.1 * torch.randn(N, D, generator=g), codes


DISTRIBUTIONS: dict[str, Draw] = {
    "Gaussian": _gaussian(),
    "clustered": _clustered,
    "duplicated codes": _duplicated,
    "codes one bit apart": _one_bit_apart,
    "mean 1e2": _gaussian(offset=1e2),
    "mean 1e4": _gaussian(offset=1e4),
    "scale 1e-20": _gaussian(scale=1e-20),
    "scale 1e18": _gaussian(scale=1e18),
    "scale 1e20": _gaussian(scale=1e20),
    "bfloat16": _gaussian(dtype=torch.bfloat16),
    "float16": _gaussian(dtype=torch.float16),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="in all")
    parser.add_argument("--metric", choices=METRICS, help="default: all, in equal shares")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    g = torch.Generator().manual_seed(args.seed)
    metrics = (args.metric,) if args.metric else METRICS
    share = args.rows / len(metrics) / len(DISTRIBUTIONS)
    total = wrong = 0
    for metric in metrics:
        for name, draw in DISTRIBUTIONS.items():
            rows = bad = reranked = 0
            while rows < share:
                K, D = (int(2 ** (torch.rand((), generator=g) * most)) for most in (11, 8))
                # Fewer rows at large sizes: where all of them tie, the exact answer compares every pair.
                N = min(20_000, max(64, (1 << 24) // (K * D)))
                x, codes = (a.to(args.device) for a in draw(N, K, D, g))
                found, left_open = nearest_code(x, codes, metric=metric, return_certificate=True)
                bad += int((found != exact_nearest(x, codes, metric)).sum())
                rows, reranked = rows + N, reranked + int(left_open)
            open_share = 100 * reranked / rows
            print(f"{metric:6} {name:20} {rows:9,} rows, {open_share:5.1f} % left open, {bad} wrong", flush=True)
            total, wrong = total + rows, wrong + bad
    print(f"{'all':27} {total:9,} rows, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
