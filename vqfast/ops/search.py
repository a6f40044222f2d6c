"""Nearest-code search and what a vector quantiser does with its result."""

from typing import NamedTuple

import torch
from torch import Tensor

from vqfast.ops.checks import check_codebook, check_device, check_float, check_int64, describe
from vqfast.ops.reduction import ordered_sum

_nearest = torch.ops.vqfast.nearest.default
_lookup = torch.ops.vqfast.lookup.default
_lookup_backward = torch.ops.vqfast.lookup_backward.default
_codebook_stats = torch.ops.vqfast.codebook_stats.default


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code nearest to each vector: argmin_k ||x - c_k||^2, of the real numbers given.

    The result is exact, not that of a rounded expansion: what low precision cannot decide is decided in float64. Ties
    go to the lowest index. A NaN row gets index 0; a NaN code is never chosen while another distance is finite.

    Args:
        x: (..., D) float64, float32, bfloat16 or float16, any strides.
        codebook: (K, D), dtype and device of x, K >= 1.

    Returns:
        (...) int64. Not differentiable.

    Raises:
        TypeError: not float tensors, or of two dtypes.
        ValueError: ranks, D or devices that do not fit, an empty codebook.
    """
    check_codebook(x, codebook)
    return _nearest(x, codebook)


class Quantized(NamedTuple):
    """What `quantize` returns.

    quantized: (..., D) the codes chosen, dtype of x.
    indices: (...) int64.
    loss: scalar float32 (float64 for float64 input).
    counts: (K,) int64, how often each code was chosen.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    counts: Tensor


class _Lookup(torch.autograd.Function):
    """quantized and (codebook_weight + beta) ||x - code||^2 per vector, with the gradients of van den Oord et al."""

    @staticmethod
    def forward(ctx, x, codebook, indices, straight_through, beta, codebook_weight):
        quantized, error, counts = _lookup(x, codebook, indices)
        ctx.save_for_backward(x, codebook, indices)
        ctx.straight_through, ctx.beta, ctx.codebook_weight = straight_through, beta, codebook_weight
        ctx.mark_non_differentiable(counts)
        return quantized, error * (beta + codebook_weight), counts

    @staticmethod
    def backward(ctx, grad_quantized, grad_error, _):
        x, codebook, indices = ctx.saved_tensors
        grad_x = grad_codebook = None
        if ctx.needs_input_grad[0]:
            through = grad_quantized if ctx.straight_through else torch.zeros_like(grad_quantized)
            grad_x = _lookup_backward(through, grad_error * ctx.beta, x, codebook, indices)
        if ctx.needs_input_grad[1]:
            weight = grad_error * (2 * ctx.codebook_weight)
            counts, sums = _codebook_stats(x, indices, weight, codebook.shape[0])
            grad_codebook = counts[:, None] * codebook - sums
            if not ctx.straight_through:
                grad_codebook = grad_codebook + _codebook_stats(grad_quantized, indices, None, codebook.shape[0])[1]
            grad_codebook = grad_codebook.to(codebook.dtype)
        return grad_x, grad_codebook, None, None, None, None


def quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    beta: float = 0.25,
    codebook_weight: float = 1.0,
    estimator: str = "ste",
) -> Quantized:
    """Replace each vector by its nearest code, with the losses and the gradient of a VQ-VAE.

    loss = codebook_weight * mean(|sg(x) - code|^2) + beta * mean(|x - sg(code)|^2), means over all elements; sg stops
    the gradient (van den Oord et al. 2017, eq. 3). The first term moves the codes to the vectors (set its weight to 0
    where a moving average does that), the second the vectors to the codes.

    Args:
        x: (..., D) float64, float32, bfloat16 or float16, any strides.
        codebook: (K, D), dtype and device of x.
        beta: weight of the commitment term.
        codebook_weight: weight of the codebook term.
        estimator: what the gradient of `quantized` does. "ste": it passes straight through to x. "none": it goes to
            the codes chosen, as that of an embedding.

    Returns:
        Quantized(quantized, indices, loss, counts).

    Raises:
        TypeError: not float tensors, or of two dtypes.
        ValueError: ranks, D or devices that do not fit, an empty codebook, an unknown estimator.
    """
    check_codebook(x, codebook)
    if estimator not in ("ste", "none"):
        raise ValueError(f"estimator: expected 'ste' or 'none', got {estimator!r}")
    indices = _nearest(x.detach(), codebook.detach())
    quantized, error, counts = _Lookup.apply(
        x, codebook, indices, estimator == "ste", float(beta), float(codebook_weight)
    )
    return Quantized(quantized, indices, ordered_sum(error) / max(x.numel(), 1), counts)


def codebook_stats(
    x: Tensor, indices: Tensor, codebook_size: int, *, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each code, the weight that fell on it and the weighted sum of its vectors: the statistics of EMA and k-means.

    Deterministic: each sum adds its vectors in their order, under any number of threads.

    Args:
        x: (..., D) float64, float32, bfloat16 or float16.
        indices: (...) int64 in [0, codebook_size), or -1 for a vector that counts for none.
        codebook_size: K >= 1.
        weights: (...) float weight of each vector, default 1.

    Returns:
        counts (K,) and sums (K, D), float32 (float64 for float64 x). Not differentiable.

    Raises:
        TypeError: dtypes other than these.
        ValueError: shapes or devices that do not fit, an index out of range.
    """
    check_float("x", x)
    if x.ndim < 1:
        raise ValueError(f"x: expected at least one dimension (..., D), got {describe(x)}")
    check_int64("indices", indices, x.shape[:-1], "(...) of x")
    if codebook_size < 1:
        raise ValueError(f"codebook_size: expected at least 1, got {codebook_size}")
    if weights is not None:
        check_float("weights", weights)
        if weights.shape != indices.shape:
            raise ValueError(f"weights: expected the shape of indices, {tuple(indices.shape)}, got {describe(weights)}")
    check_device("x", x, indices=indices, weights=weights)
    return _codebook_stats(x.detach(), indices, None if weights is None else weights.detach(), codebook_size)
