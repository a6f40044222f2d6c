"""What the interpreter runs: every op's shapes of its spec, in groups, to which promises are added."""

from collections.abc import Callable
from functools import partial

import torch

from vqfast.kernels.specs import SPECS

CASES: dict[str, dict[str, Callable[[], None]]] = {
    "search": {},
    "statistics": {},
    "posterior": {},
    "diffusion": {},
    "sampling": {},
    "matrices": {},
    "packing": {},
}
GROUP = {
    "nearest": "search",
    "lookup": "search",
    "lookup_backward": "search",
    "codebook_stats": "statistics",
    "posterior": "posterior",
    "posterior_backward": "posterior",
    "q_sample": "diffusion",
    "diffusion_loss": "diffusion",
    "p_sample": "sampling",
    "matrix_loss": "matrices",
    "matrix_sample": "matrices",
    "pack": "packing",
    "unpack": "packing",
    "unpack_backward": "packing",
    "position_mask": "packing",
    "grain_entropy": "packing",
}


def _agrees_with_the_reference(spec, dtype: torch.dtype, shape: dict) -> None:
    args = spec.inputs(shape, dtype, "cpu", 0)
    spec.check(getattr(torch.ops.vqfast, spec.op)(*args), args)


def _programs(op: str, shape: dict) -> int:
    """Roughly how many programs the op launches: each costs the interpreter milliseconds."""
    if op == "codebook_stats":
        return shape["K"] * (4 if shape["K"] < 1024 and shape["N"] > 1000 else 1)
    if GROUP[op] == "packing":
        return 100 if shape["B"] * shape.get("H", 1) * shape.get("rows", 1) > 1 else 1
    return {"nearest": 1, "lookup": 1 / 8, "lookup_backward": 1 / 8}.get(op, 0) * shape.get("N", 0)


# A program a token, or a row that its scores leave open, many of the interpreter's calls each: of this many, in float32
# and in other dtypes.
_TOKENS = {
    "posterior": (12, 4), "posterior_backward": (12, 4), "diffusion_loss": (12, 4), "p_sample": (16, 4),
    "nearest": (12, 6), "matrix_loss": (36, 6), "matrix_sample": (36, 6),
}  # fmt: skip


def _smaller(op: str, dtype: torch.dtype, shape: dict) -> dict:
    """The shape, with fewer programs where each does the same."""
    if op in ("pack", "unpack", "unpack_backward"):
        return dict(shape) | {"B": min(shape["B"], 2)}
    if op not in _TOKENS or shape.get("B") == 0:
        return dict(shape)
    most = _TOKENS[op][dtype != torch.float32]
    if op == "nearest":
        # Distances leave few rows open.
        return dict(shape) | ({"N": min(shape["N"], most)} if "metric" in shape else {})
    return dict(shape) | {"L": min(shape["L"], max(most // shape["B"], 1))}


def _first_dtype(dtypes: tuple[torch.dtype, ...], shape: dict) -> torch.dtype:
    """Codes, which have no features, are int64; what has features is float32."""
    return torch.int64 if torch.int64 in dtypes and "D" not in shape else torch.float32


for _spec in (spec for spec in SPECS if spec.op in GROUP):
    for _dtype in _spec.dtypes:
        for _shape in _spec.test_shapes:
            # A launch of many programs differs from one of few in its number only: one dtype will do.
            if _dtype == _first_dtype(_spec.dtypes, _shape) or _programs(_spec.op, _shape) < 100:
                _text = ",".join(f"{key}={value}" for key, value in _shape.items())
                _name = f"{_spec.op}-{str(_dtype).removeprefix('torch.')}-{_text}"
                _few = _smaller(_spec.op, _dtype, _shape)
                CASES[GROUP[_spec.op]][_name] = partial(_agrees_with_the_reference, _spec, _dtype, _few)


def promise(group: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(case: Callable[[], None]) -> Callable[[], None]:
        CASES[group][case.__name__] = case
        return case

    return add


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
