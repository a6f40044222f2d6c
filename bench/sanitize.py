"""Every kernel of a backend once, on odd sizes: what compute-sanitizer watches (`make gpu` runs it under its tools).

Inputs are made and results checked on the CPU, so that hardly any kernel but vqfast's is slowed down.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import vqfast
from bench.search_scores import KINDS
from bench.sources import KERNELS
from vqfast.kernels.specs import SPECS
from vqfast.ops.registry import BACKENDS

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
READ_IN_PLACE = ("nearest", "lookup", "lookup_backward", "codebook_stats")  # vectors of any strides
_MOST_ELEMENTS = 1 << 22  # of a search's N x K x D: the tools make a kernel hundreds of times slower


def moved(value: Any, device: str) -> Any:
    """A tensor, or a tuple of them and of other things, on another device."""
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def strided(value: Any) -> Any:
    """A matrix with its columns in one piece, as channel-first memory has features; anything else as it is."""
    return value.mT.contiguous().mT if isinstance(value, Tensor) and value.ndim == 2 else value


def variants(op: str, backend: str) -> tuple[str | None, ...]:
    """VQFAST_CUDA_SCORES for each run of a call: every kind of scores of a search has kernels of its own."""
    return KINDS if op == "nearest" and backend == "cuda" else (None,)


def calls(ops: str = "", backend: str = ""):
    """(spec, shape, dtype) of the list; ops: comma-separated names of benchmarks or of folders of kernels/.

    Few for Triton, which compiles its kernels for each shape and dtype: a second or two each.
    """
    shapes, dtypes = (slice(3, 5), DTYPES[::2]) if backend == "triton" else (slice(None), DTYPES)
    wanted = [folder for op in ops.split(",") if op.strip() for folder in KERNELS.get(op.strip(), (op.strip(),))]
    for spec in SPECS:
        if wanted and not any(spec.op.startswith(folder) for folder in wanted):
            continue
        for shape in spec.test_shapes[shapes]:
            if spec.op == "nearest" and spec.flops(shape) > 2 * _MOST_ELEMENTS:
                continue
            for dtype in spec.dtypes:
                if dtype in dtypes:
                    yield spec, shape, dtype


def _scale_rows(device: str) -> None:
    rows, scale = torch.randn(3, 5, 131), torch.rand(3, 5)
    got = rows.clone().to(device)
    torch.ops.vqfast.scale_rows_(got, scale.to(device))
    torch.testing.assert_close(got.cpu(), rows * scale[..., None])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", required=True, choices=list(BACKENDS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ops", default="")
    args = parser.parse_args(argv)
    done, wrong = 0, 0
    with vqfast.backend(args.backend):
        for spec, shape, dtype in calls(args.ops, args.backend):
            if spec.op not in BACKENDS[args.backend].KERNELS:
                continue
            inputs = spec.inputs(shape, dtype, "cpu", 5)
            given = moved(inputs, args.device)
            for kind in variants(spec.op, args.backend):
                if kind is not None:
                    os.environ["VQFAST_CUDA_SCORES"] = kind
                for layout in (given, tuple(map(strided, given))) if spec.op in READ_IN_PLACE else (given,):
                    try:
                        got = getattr(torch.ops.vqfast, spec.op)(*layout)
                        spec.check(moved(got, "cpu"), inputs)
                        done += 1
                    except (AssertionError, RuntimeError) as error:
                        wrong += 1
                        why = (str(error).splitlines() or [type(error).__name__])[0]
                        print(f"WRONG {spec.op} {dict(shape)} {dtype} {kind or ''}: {why}", flush=True)
        if not args.ops and "scale_rows_" in BACKENDS[args.backend].KERNELS:
            _scale_rows(args.device)
            done += 1
    print(f"{args.backend}: {done} calls right, {wrong} wrong")
    return 1 if wrong or not done else 0


if __name__ == "__main__":
    sys.exit(main())
