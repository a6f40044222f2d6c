"""Codebook lookup and its backward in Triton: tiles of rows, a loop over the features."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.fusion_triton import FUSED

# Elements of a tile: 8 for each of 128 threads. Twice as many spill registers where D is odd.
_TILE = 1024


def _blocks(D: int) -> tuple[int, int]:
    """(rows, features) of a tile."""
    features = min(max(16, triton.next_power_of_2(D)), 128)
    return _TILE // features, features


@triton.jit
def _row_offset(row, rows, stride_b, stride_r):
    return (row // rows) * stride_b + (row % rows) * stride_r


@triton.jit(do_not_specialize=["N", "rows", "K"])
def _lookup_kernel(
    x_ptr,
    codebook_ptr,
    indices_ptr,
    quantized_ptr,
    error_ptr,
    counts_ptr,
    N,
    rows,
    K,
    D,
    stride_b,
    stride_r,
    stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    index = tl.load(indices_ptr + n, mask=inside, other=-1)
    kept = index >= 0
    index = tl.minimum(tl.maximum(index, 0), K - 1)
    x_row = x_ptr + _row_offset(n, rows, stride_b, stride_r)
    dtype: tl.constexpr = error_ptr.dtype.element_ty
    error = tl.zeros((BLOCK_N,), dtype)
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        used = kept[:, None] & (d < D)[None, :]
        code = tl.load(codebook_ptr + index[:, None] * D + d[None, :], mask=used, other=0.0)
        x = tl.load(x_row[:, None] + d[None, :] * stride_d, mask=used, other=0.0)
        tl.store(quantized_ptr + n[:, None] * D + d[None, :], code, mask=inside[:, None] & (d < D)[None, :])
        difference = x.to(dtype) - code.to(dtype)
        error += tl.sum(difference * difference, 1)
    tl.store(error_ptr + n, error, mask=inside)
    # Integers: the order of the additions does not matter.
    tl.atomic_add(counts_ptr + index, tl.full((BLOCK_N,), 1, tl.int64), mask=kept, sem="relaxed")


def lookup(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x: (batch, rows, D) of any strides; indices: (batch * rows,)."""
    batch, rows, D = x.shape
    K, N = codebook.shape[0], batch * rows
    quantized = torch.empty((N, D), dtype=x.dtype, device=x.device)
    error = torch.empty(N, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    counts = torch.zeros(K, dtype=torch.int64, device=x.device)
    if N:
        block_n, block_d = _blocks(D)
        _lookup_kernel[(triton.cdiv(N, block_n),)](
            x,
            codebook.contiguous(),
            indices.contiguous(),
            quantized,
            error,
            counts,
            N,
            rows,
            K,
            D,
            *x.stride(),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            **FUSED,
        )
    return quantized, error, counts


@triton.jit(do_not_specialize=["N", "grad_rows", "rows", "K"])
def _lookup_backward_kernel(
    grad_quantized_ptr,
    grad_error_ptr,
    x_ptr,
    codebook_ptr,
    indices_ptr,
    grad_x_ptr,
    N,
    grad_rows,
    rows,
    K,
    D,
    grad_stride_b,
    grad_stride_r,
    grad_stride_d,
    stride_b,
    stride_r,
    stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    index = tl.load(indices_ptr + n, mask=inside, other=-1)
    kept = index >= 0
    index = tl.minimum(tl.maximum(index, 0), K - 1)
    x_row = x_ptr + _row_offset(n, rows, stride_b, stride_r)
    grad_row = grad_quantized_ptr + _row_offset(n, grad_rows, grad_stride_b, grad_stride_r)
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    slope = 2 * tl.load(grad_error_ptr + n, mask=kept, other=0.0).to(dtype)
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        used = kept[:, None] & (d < D)[None, :]
        code = tl.load(codebook_ptr + index[:, None] * D + d[None, :], mask=used, other=0.0).to(dtype)
        x = tl.load(x_row[:, None] + d[None, :] * stride_d, mask=used, other=0.0).to(dtype)
        through = tl.load(grad_row[:, None] + d[None, :] * grad_stride_d, mask=used, other=0.0).to(dtype)
        grad = tl.where(used, through + slope[:, None] * (x - code), 0.0)
        grad_x = grad_x_ptr + n[:, None] * D + d[None, :]
        tl.store(grad_x, grad.to(grad_x_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


def lookup_backward(grad_quantized: Tensor, grad_error: Tensor, x: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """grad_quantized, x: (batch, rows, D) of any strides, each with its own batch; grad_error, indices: (N,)."""
    batch, rows, D = x.shape
    N = batch * rows
    grad_x = torch.empty((N, D), dtype=x.dtype, device=x.device)
    if N:
        block_n, block_d = _blocks(D)
        _lookup_backward_kernel[(triton.cdiv(N, block_n),)](
            grad_quantized,
            grad_error.contiguous(),
            x,
            codebook.contiguous(),
            indices.contiguous(),
            grad_x,
            N,
            grad_quantized.shape[1],
            rows,
            codebook.shape[0],
            D,
            *grad_quantized.stride(),
            *x.stride(),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            **FUSED,
        )
    return grad_x
