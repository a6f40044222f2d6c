"""Nearest-code search and what a vector quantiser does with its result."""

from typing import NamedTuple

import torch
from torch import Tensor

from vqfast.ops.checks import check_codebook, check_device, check_float, check_int64, check_mask, describe
from vqfast.ops.reduction import ordered_sum

_nearest = torch.ops.vqfast.nearest.default
_lookup = torch.ops.vqfast.lookup.default
_lookup_backward = torch.ops.vqfast.lookup_backward.default
_codebook_stats = torch.ops.vqfast.codebook_stats.default


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code nearest to each vector: argmin_k ||x - c_k||^2, of the real numbers given.

    The result is exact, not that of a rounded expansion: what low precision cannot decide is decided in float64. Ties
    go to the lowest index. A row with a NaN or an infinity gets index 0; a code with one is never chosen while another
    is finite. Subnormals count as what they are. float64 rows so far away that squares overflow tie.

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

    quantized: (..., D) the codes chosen, dtype of x; zero where masked.
    indices: (...) int64; -1 where masked.
    loss: scalar float32 (float64 for float64 input).
    counts: (K,) int64, how often each code was chosen.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    counts: Tensor

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of the codes chosen: 1 if all vectors share one, K if all are used alike."""
        share = self.counts.double() / self.counts.sum().clamp(min=1)
        return torch.exp(-torch.special.xlogy(share, share).sum())


def _rotate_back(grad: Tensor, x: Tensor, quantized: Tensor) -> Tensor:
    """Gradient through the rotation and scaling that carries x onto its code, both held constant.

    quantized = s R x with R = 1 - 2 r r^T + 2 q x^T, x and q of unit length, r the unit vector halfway between them
    (Fifty et al. 2024, 'Restructuring Vector Quantization with the Rotation Trick', section 4.2); so the gradient to
    x is s R^T grad.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    grad, x, quantized = grad.to(accumulate), x.to(accumulate), quantized.to(accumulate)
    length, code_length = x.norm(dim=-1, keepdim=True), quantized.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(accumulate).tiny
    unit, code = x / length.clamp(min=tiny), quantized / code_length.clamp(min=tiny)
    halfway = torch.nn.functional.normalize(unit + code, dim=-1, eps=tiny)
    turned = grad - 2 * halfway * (halfway * grad).sum(-1, keepdim=True)
    turned = turned + 2 * unit * (code * grad).sum(-1, keepdim=True)
    return turned * (code_length / length.clamp(min=tiny))


class _Lookup(torch.autograd.Function):
    """quantized and (codebook_weight + beta) ||x - code||^2 per vector, with the gradients of van den Oord et al."""

    @staticmethod
    def forward(ctx, x, codebook, indices, estimator, beta, codebook_weight):
        quantized, error, counts = _lookup(x, codebook, indices)
        ctx.save_for_backward(x, codebook, indices)
        ctx.estimator, ctx.beta, ctx.codebook_weight = estimator, beta, codebook_weight
        ctx.mark_non_differentiable(counts)
        return quantized, error * (beta + codebook_weight), counts

    @staticmethod
    def backward(ctx, grad_quantized, grad_error, _):
        x, codebook, indices = ctx.saved_tensors
        grad_x = grad_codebook = None
        if ctx.needs_input_grad[0]:
            through = grad_quantized
            if ctx.estimator == "none":
                through = torch.zeros_like(grad_quantized)
            elif ctx.estimator == "rotation":
                through = _rotate_back(grad_quantized, x, _lookup(x, codebook, indices)[0]).to(x.dtype)
            grad_x = _lookup_backward(through, grad_error * ctx.beta, x, codebook, indices)
        if ctx.needs_input_grad[1]:
            weight = grad_error * (2 * ctx.codebook_weight)
            counts, sums = _codebook_stats(x, indices, weight, codebook.shape[0])
            grad_codebook = counts[:, None] * codebook - sums
            if ctx.estimator == "none":
                grad_codebook = grad_codebook + _codebook_stats(grad_quantized, indices, None, codebook.shape[0])[1]
            grad_codebook = grad_codebook.to(codebook.dtype)
        return grad_x, grad_codebook, None, None, None, None


ESTIMATORS = ("ste", "rotation", "none")


def quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    beta: float = 0.25,
    codebook_weight: float = 1.0,
    estimator: str = "ste",
    mask: Tensor | None = None,
    indices: Tensor | None = None,
) -> Quantized:
    """Replace each vector by its nearest code, with the losses and the gradient of a VQ-VAE.

    loss = codebook_weight * mean(|sg(x) - code|^2) + beta * mean(|x - sg(code)|^2), means over all elements that are
    not masked; sg stops the gradient (van den Oord et al. 2017, eq. 3). The first term moves the codes to the vectors
    (set its weight to 0 where a moving average does that), the second the vectors to the codes.

    Args:
        x: (..., D) float64, float32, bfloat16 or float16, any strides.
        codebook: (K, D), dtype and device of x.
        beta: weight of the commitment term.
        codebook_weight: weight of the codebook term.
        estimator: what the gradient of `quantized` does. "ste": it passes straight through to x. "rotation": it is
            turned and scaled as the vector was to reach its code (Fifty et al. 2024). "none": it goes to the codes
            chosen, as that of an embedding.
        mask: (...) bool, True where a vector counts. Elsewhere the index is -1 and the output zero; there is no
            loss, no count and no gradient.
        indices: (...) int64, the code of each vector where that is not to be the nearest.

    Returns:
        Quantized(quantized, indices, loss, counts), with a property `perplexity`.

    Raises:
        TypeError: not float tensors, or of two dtypes; a mask that is not bool, indices that are not int64.
        ValueError: ranks, D, shapes or devices that do not fit, an empty codebook, an unknown estimator.
    """
    check_codebook(x, codebook)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if indices is None:
        indices = _nearest(x.detach(), codebook.detach())
    else:
        check_int64("indices", indices, x.shape[:-1], "(...) of x")
        check_device("x", x, indices=indices)
    elements = max(x.numel(), 1)
    if mask is not None:
        check_mask(mask, x)
        indices = torch.where(mask, indices, -1)
        elements = (mask.sum() * x.shape[-1]).clamp(min=1)
    quantized, error, counts = _Lookup.apply(x, codebook, indices, estimator, float(beta), float(codebook_weight))
    return Quantized(quantized, indices, ordered_sum(error) / elements, counts)


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
