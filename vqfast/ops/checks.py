"""Checks of arguments: shapes, dtypes and devices where a public function is called, values where a kernel runs.

Values (an index in range, t within 0..T) are looked at inside the op, on CPU tensors only: there they cost no device
sync, and a traced graph keeps no data-dependent branch. Checked mode (VQFAST_CHECK=1 when the process starts, or
`with vqfast.checked()`) pays for the sync and gives the same errors on CUDA; without it a kernel clamps what it reads
by and never leaves its buffers. With it, logits that are NaN are an error too, on every device.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqfast.ops.coverage import capacity_holds, covers_once, grains_in_range
from vqfast.ops.transforms import transformed

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# As with VQFAST_BACKEND the environment is read once, and the choice holds for all threads (see registry.py).
_checking: bool = os.environ.get("VQFAST_CHECK") == "1"


def checking() -> bool:
    """Whether checks that cost a device sync were asked for."""
    return _checking


@contextmanager
def checked(asked: bool = True) -> Iterator[None]:
    """Look at the values of arguments inside the block even where that costs a device sync, or as much as the op.

    Errors then name what is wrong and where: a grain out of range, a cell covered twice, an index without a code, NaN
    logits. In all threads; VQFAST_CHECK=1 in the environment does the same for the whole process.
    """
    global _checking
    previous, _checking = _checking, asked
    try:
        yield
    finally:
        _checking = previous


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} numpy array of shape {value.shape}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def check_float(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a float64, float32, bfloat16 or float16 tensor, got {describe(value)}")


def check_int64(name: str, value: Any, shape: tuple[int, ...], layout: str) -> None:
    """`layout` names the expected dimensions, as in "(B, L)"."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor of shape {layout}, got {describe(value)}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {layout} = {tuple(shape)}, got {describe(value)}")


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got {describe(value)}")
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"{least}..{most}"
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_device(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        # Two tensors of the host, the usual case where a call is small, without making objects of their devices.
        if other is None or (other.is_cpu and reference.is_cpu):
            continue
        if other.device != reference.device:
            raise ValueError(
                f"{name}: expected the device of {reference_name}, {reference.device}, got {describe(other)}"
            )


def check_codebook(x: Any, codebook: Any, name: str = "x") -> None:
    """x, called `name`, and codebook: (..., D) and (K, D), or (..., H, D) and (H, K, D); one float dtype and device."""
    check_float(name, x)
    check_float("codebook", codebook)
    check_codes(codebook)
    # Each look at a shape or a device makes an object; together they would be a tenth of a small search.
    shape, codes = x.shape, codebook.shape
    if not shape:
        raise ValueError(f"{name}: expected at least one dimension (..., D), got {describe(x)}")
    if shape[-1] != codes[-1]:
        raise ValueError(f"codebook: expected D = {shape[-1]} as in {name} {tuple(shape)}, got {describe(codebook)}")
    if len(codes) == 3 and (len(shape) < 2 or shape[-2] != codes[0]):
        raise ValueError(
            f"{name}: expected (..., H, D) = (..., {codes[0]}, {codes[2]}) for a codebook of shape (H, K, D), "
            f"got {describe(x)}"
        )
    if x.dtype != codebook.dtype:
        raise TypeError(f"codebook: expected the dtype of {name}, {x.dtype}, got {describe(codebook)}")
    if not (x.is_cpu and codebook.is_cpu):
        check_device(name, x, codebook=codebook)


def check_codes(codebook: Tensor) -> None:
    """codebook: (K, D) or (H, K, D), no dimension empty."""
    if codebook.ndim != 2 and codebook.ndim != 3:
        raise ValueError(
            f"codebook: expected two dimensions (K, D), or three (H, K, D) for heads, got {describe(codebook)}"
        )
    if 0 in codebook.shape:
        raise ValueError(f"codebook: expected at least one code and one dimension, got {describe(codebook)}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_mask(mask: Any, x: Tensor) -> None:
    """mask: (...) bool for x (..., D)."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor (...) of x, got {describe(mask)}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask: expected shape {tuple(x.shape[:-1])}, that of x without D, got {describe(mask)}")
    check_device("x", x, mask=mask)


def _check_range(name: str, value: Tensor, low: int, high: int, meaning: str) -> None:
    if value.numel() == 0:
        return
    smallest, largest = (int(v) for v in torch.aminmax(value))
    if smallest < low or largest > high:
        raise ValueError(f"{name}: expected values in {low}..{high} ({meaning}), got {smallest}..{largest}")


def check_indices(indices: Any, codebook_size: int, least: int = 0, name: str = "indices") -> None:
    """Indices of codes to be decoded, of any shape: int64 or int32; values in least..K-1, of which -1 is masked.

    Values are looked at on the host, on other devices in checked mode, and not in a traced graph or under torch.func.
    """
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected an int64 or int32 tensor, got {describe(indices)}")
    if (indices.is_cpu or checking()) and not (torch.compiler.is_compiling() or transformed()):
        meaning = f"K = {codebook_size}" if least == 0 else f"K = {codebook_size}; -1 is masked"
        _check_range(name, indices, least, codebook_size - 1, meaning)


def _indices(indices: Tensor, codebook_size: int) -> None:
    _check_range("indices", indices, -1, codebook_size - 1, f"K = {codebook_size}; -1 is masked")


def _steps(t: Tensor, s: Tensor, T: int) -> None:
    _check_range("t", t, 1, T, f"T = {T}")
    _check_range("s", s, 0, T - 1, f"T = {T}, s < t")
    if bool((s >= t).any()):
        raise ValueError(f"s: expected s < t in every sample, got s = {s.tolist()}, t = {t.tolist()}")


def _codes(name: str, codes: Tensor, codebook_size: int) -> None:
    _check_range(name, codes, 0, codebook_size - 1, f"K = {codebook_size}")


def _states(name: str, codes: Tensor, codebook_size: int, levels: Tensor) -> None:
    if levels.shape[1] == 1:
        _codes(name, codes, codebook_size)
    else:
        _check_range(name, codes, 0, codebook_size, f"K = {codebook_size}; K is the mask state")


def _known(known: Tensor | None, codebook_size: int) -> None:
    if known is not None:
        _check_range("known", known, -1, codebook_size - 1, f"K = {codebook_size}; -1 is unknown")


def _no_nan(name: str, scores: Tensor | None) -> None:
    """Only where asked for: it is a pass over the logits, and kernels give such rows a defined result."""
    if checking() and scores is not None and bool(scores.isnan().any()):
        rows = scores.isnan().any(-1)
        b, l = (int(i) for i in rows.nonzero()[0])
        raise ValueError(f"{name}: expected no NaN, got NaN in {int(rows.sum())} tokens, the first at [{b}, {l}]")


def _q_sample(x0: Tensor, t: Tensor, levels: Tensor, noise: Tensor | None, codebook_size: int, key: Tensor) -> None:
    T = levels.shape[0] - 1
    _check_range("t", t, 0, T, f"T = {T}; 0 is data")
    _codes("x0", x0, codebook_size)


def _posterior(logits, x_t, t, s, levels, noise, marginal) -> None:
    _steps(t, s, levels.shape[0] - 1)
    _states("x_t", x_t, logits.shape[-1], levels)
    _no_nan("logits", logits)


def _diffusion_loss(logits, x0, x_t, t, s, levels, noise, scale, marginal, aux_weight, with_grad) -> None:
    _codes("x0", x0, logits.shape[-1])
    _posterior(logits, x_t, t, s, levels, noise, marginal)


def _p_sample(logits, unconditional, x_t, t, s, levels, noise, known, marginal, *options) -> None:
    _posterior(logits, x_t, t, s, levels, noise, marginal)
    _no_nan("unconditional", unconditional)
    _known(known, logits.shape[-1])


def _matrix_loss(logits, x0, x_t, s, prior, *options) -> None:
    _codes("x0", x0, logits.shape[-1])
    _codes("x_t", x_t, logits.shape[-1])


def _matrix_sample(logits, unconditional, x_t, s, prior, likelihood, known, *options) -> None:
    _codes("x_t", x_t, logits.shape[-1])
    _known(known, logits.shape[-1])


def _pack(values: Tensor, grains: Tensor, region: bool, capacity: int) -> None:
    grains_in_range(grains, (values.shape[1] // max(grains.shape[1], 1)).bit_length())


def _position_mask(positions, grain_ids, grain, Hc, Wc, num_grains, vocab_size) -> None:
    _check_range("grain", grain, 0, num_grains - 1, f"{num_grains} grains")


def check_chain_values(
    T: int,
    K: int,
    t: Tensor,
    s: Tensor | None = None,
    *,
    known: Tensor | None = None,
    logits: Tensor | None = None,
    unconditional: Tensor | None = None,
    **codes: Tensor,
) -> None:
    """The value checks of diffusion ops that are several kernels: without s, t may be 0. Not in a traced graph
    or under torch.func."""
    if torch.compiler.is_compiling() or transformed() or not (t.is_cpu or checking()):
        return
    if s is None:
        _check_range("t", t, 0, T, f"T = {T}; 0 is data")
    else:
        _steps(t, s, T)
    for name, value in codes.items():
        _codes(name, value, K)
    _known(known, K)
    _no_nan("logits", logits)
    _no_nan("unconditional", unconditional)


_VALUE_CHECKS = {
    "lookup": lambda x, codebook, indices: _indices(indices, codebook.shape[0]),
    "dynamic_lookup": lambda features, codebook, indices, grains, G: _codes("indices", indices, codebook.shape[0]),
    "codebook_stats": lambda x, indices, weights, codebook_size: _indices(indices, codebook_size),
    "q_sample": _q_sample,
    "posterior": _posterior,
    "diffusion_loss": _diffusion_loss,
    "p_sample": _p_sample,
    "matrix_loss": _matrix_loss,
    "matrix_sample": _matrix_sample,
    "pack": _pack,
    "position_mask": _position_mask,
}

# Checks that cost more than the op: in checked mode only, on any device.
_COSTLY_CHECKS = {"pack": capacity_holds, "unpack": covers_once}


def has_value_checks(op: str) -> bool:
    return op in _VALUE_CHECKS or op in _COSTLY_CHECKS


def check_values(op: str, args: tuple, *, in_kernel: bool = False) -> None:
    """Raise ValueError where a value (not a shape) of an op's arguments is out of range.

    Args:
        in_kernel: the kernel will look at them itself; in checked mode they are looked at here all the same.
    """
    check, costly = _VALUE_CHECKS.get(op), _COSTLY_CHECKS.get(op)
    asked = (costly is not None or in_kernel or not args[0].is_cpu) and checking()
    if check is not None and (asked or (args[0].is_cpu and not in_kernel)):
        check(*args)
    if costly is not None and asked:
        costly(*args)
