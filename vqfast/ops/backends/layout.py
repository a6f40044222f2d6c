"""What compiled code is shown of tensors: dtype codes, a (batch, rows, features) view of memory."""

from typing import NamedTuple

import torch
from torch import Tensor

# vqfast_dtype of csrc/include/vqfast.h.
DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Its vqfast_metric.
METRIC = {"l2": 0, "dot": 1, "cosine": 2}


class Rows(NamedTuple):
    """`view` is (address, batch, rows, stride of batch, of row, of feature), strides in elements; `tensor` owns it."""

    tensor: Tensor
    view: tuple[int, int, int, int, int, int]


def as_rows(x: Tensor) -> Rows:
    """A (..., D) tensor as (batch, rows, D), read in place where its leading dimensions merge into at most two.

    Channel-first feature maps do: (B, D, H, W) permuted to (B, H, W, D) has rows of stride 1 and features of stride
    H * W. Anything else is copied.
    """
    if x.is_contiguous():
        D = x.shape[-1]
        return Rows(x, (x.data_ptr(), 1, x.numel() // (D or 1), 0, D, 1))
    # Merge neighbouring leading dimensions where the outer one's stride is that of the inner one times its size.
    merged: list[list[int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = [merged[-1][0] * size, stride]
        else:
            merged.append([size, stride])
    if len(merged) > 2:
        return as_rows(x.contiguous())
    (batch, stride_batch), (rows, stride_row) = ([[1, 0]] * (2 - len(merged)) + merged)[:2]
    return Rows(x, (x.data_ptr(), batch, rows, stride_batch, stride_row, x.stride(-1)))


def as_vectors(x: Tensor, leading: int) -> tuple[Rows, int]:
    """Features (..., D), or codes (...) as vectors of one element, with D; `leading` dimensions come before it."""
    if x.ndim > leading:
        return as_rows(x), x.shape[-1]
    if x.is_contiguous():
        return Rows(x, (x.data_ptr(), 1, x.numel(), 0, 1, 1)), 1
    return as_rows(x[..., None]), 1


class Heads(NamedTuple):
    """`rows` of the first head; the next ones lie `stride` elements further each."""

    rows: Rows
    count: int
    stride: int


def as_heads(x: Tensor) -> Heads:
    """(..., H, D) as one (batch, rows, D) view a head, read in place where `as_rows` can."""
    first = x.select(-2, 0)
    rows = as_rows(first)
    if rows.tensor is not first:
        x = x.contiguous()
        rows = as_rows(x.select(-2, 0))
    return Heads(rows, x.shape[-2], x.stride(-2))
