"""Nearest-code search and what a vector quantiser does with its result."""

from typing import NamedTuple

import torch
from torch import Tensor

from vqfast.ops.checks import (
    check_choice,
    check_codebook,
    check_device,
    check_float,
    check_int64,
    check_mask,
    check_whole,
    describe,
)
from vqfast.ops.prepared import METRICS, PreparedCodebook, unit_vectors
from vqfast.ops.reduction import ordered_sum
from vqfast.ops.transforms import Function, once_differentiable

_nearest = torch.ops.vqfast.nearest.default
_nearest_counted = torch.ops.vqfast.nearest_counted.default
_lookup = torch.ops.vqfast.lookup.default
_lookup_backward = torch.ops.vqfast.lookup_backward.default
_codebook_stats = torch.ops.vqfast.codebook_stats.default


PRECISIONS = ("exact", "fast")


def nearest_code(
    x: Tensor,
    codebook: Tensor | PreparedCodebook,
    *,
    metric: str = "l2",
    precision: str = "exact",
    mask: Tensor | None = None,
    return_certificate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Index of the code nearest to each vector, of the real numbers given.

    "l2" is argmin_k ||x - c_k||^2, "dot" argmax_k x . c_k, "cosine" argmax_k x . c_k / (||x|| ||c_k||). The result is
    exact, not that of a rounded expansion: what low precision cannot prove is decided in float64, and what that cannot
    separate in twice float64, to about 2^-100 of the squared distance, of sum_d |x_d c_kd|, or of the squared cosine
    (squared cosines that differ by less than 2^-96 of themselves tie). Ties go to the lowest index. A row with a NaN or
    an infinity gets index 0; a code with one is never chosen while another is finite. The cosine of a zero vector with
    anything is 0, so a zero row gets the first finite code, under "dot" too. Subnormals count as what they are. float64
    rows so far away that squared distances overflow tie.

    Args:
        x: (..., D) float64, float32, bfloat16 or float16, any strides; (..., H, D) for H heads.
        codebook: (K, D), dtype and device of x, K >= 1; (H, K, D) searches the codebook h for the vectors x[..., h, :].
            Or what `prepare` made of it.
        metric: "l2", "dot" or "cosine"; that of a prepared codebook must be the same.
        precision: "fast" takes the best of the low-precision scores without proof. With B the bound on their error
            (kernels/nearest/README.md), the squared distance of its code exceeds the least by at most 4 B, its product
            falls short of the largest by at most 2 B; with bfloat16 scores B is below 2^-8 ||x - m|| max_k ||c_k - m||,
            m the mean of the codebook (||x|| for "dot"). Equal codes may give any of them. A backend without such
            scores may answer exactly.
        mask: (...) bool, or (..., H), True where a vector counts; elsewhere the index is -1.
        return_certificate: also return how many rows the scores left open: on the CPU between several groups of up to
            eight codes, elsewhere between several codes.

    Returns:
        (...) or (..., H) int64, not differentiable; with `return_certificate` also a scalar int64.

    Raises:
        TypeError: not float tensors, or of two dtypes; a mask that is not bool.
        ValueError: ranks, D, H, mask shape or devices that do not fit, an empty codebook, an unknown metric or
            precision, a codebook prepared for another metric.
        RuntimeError: the codebook changed since it was prepared.
    """
    codes, packed = _codes_of(codebook, metric) if isinstance(codebook, PreparedCodebook) else (codebook, None)
    check_codebook(x, codes)
    if metric == "l2" and precision == "exact" and mask is None and packed is None and not return_certificate:
        return _nearest(x, codes)  # the defaults: a microsecond less
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, PRECISIONS)
    if mask is not None:
        mask = _mask_of_heads(mask, x, codes)
    search = _nearest_counted if return_certificate else _nearest
    return search(x, codes, mask, packed, metric, precision == "exact")


def _codes_of(codebook: PreparedCodebook, metric: str) -> tuple[Tensor, Tensor | None]:
    """The codebook, and its packed form unless a graph is traced, which may outlive it."""
    if codebook.metric != metric:
        raise ValueError(f"codebook: expected one prepared for metric {metric!r}, got {codebook.metric!r}")
    if torch.compiler.is_compiling():
        return codebook.codebook, None
    codebook.check()
    return codebook.codebook, codebook.packed


def _mask_of_heads(mask: Tensor, x: Tensor, codebook: Tensor) -> Tensor:
    """(...) for x (..., D); for x (..., H, D) either (..., H) or (...), which counts for every head."""
    if codebook.ndim == 3 and isinstance(mask, Tensor) and mask.shape == x.shape[:-2] != x.shape[:-1]:
        mask = mask[..., None].expand(x.shape[:-1])
    check_mask(mask, x)
    return mask


class Quantized(NamedTuple):
    """What `quantize` returns.

    quantized: (..., D) the codes chosen, dtype of x; zero where masked.
    indices: (...) int64; -1 where masked. (..., H) where there are heads.
    loss: scalar float32 (float64 for float64 input).
    counts: (K,) int64, how often each code was chosen; (H, K) where there are heads.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    counts: Tensor

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of the codes chosen, (H,) for heads: 1 if vectors share one, K if all are used alike."""
        share = self.counts.double() / self.counts.sum(-1, keepdim=True).clamp(min=1)
        return torch.exp(-torch.special.xlogy(share, share).sum(-1))


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


class _Lookup(Function):
    """quantized and (codebook_weight + beta) ||x - code||^2 per vector, with the gradients of van den Oord et al."""

    @staticmethod
    def forward(x, codebook, indices, estimator, beta, codebook_weight):
        quantized, error, counts = _lookup(x, codebook, indices)
        return quantized, error * (beta + codebook_weight), counts

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, codebook, indices, ctx.estimator, ctx.beta, ctx.codebook_weight = inputs
        if any(ctx.needs_input_grad):
            # Half the memory between forward and backward, where the caller drops the indices.
            kept = indices.to(torch.int32) if codebook.shape[0] < 2**31 else indices
            ctx.save_for_backward(x, codebook, kept)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_quantized, grad_error, _):
        x, codebook, kept = ctx.saved_tensors
        indices = kept.to(torch.int64)
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
    codebook: Tensor | PreparedCodebook,
    *,
    metric: str = "l2",
    precision: str = "exact",
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

    Under "cosine" everything after the search happens on the unit sphere, as in vector-quantize-pytorch with
    `use_cosine_sim`: x and the codes are divided by their norms, `quantized` is the code chosen at unit length, the
    losses compare the two unit vectors, and gradients go through both divisions. The codes are normalised once a call
    (once in all where they are prepared and need no gradient), not once a row. Zero vectors stay zero.

    Args:
        x: (..., D) float64, float32, bfloat16 or float16, any strides; (..., H, D) for H heads.
        codebook: (K, D), dtype and device of x; (H, K, D) gives each head a codebook of its own. Or what `prepare` made
            of it.
        metric: "l2", "dot" (largest product; losses and values are those of "l2") or "cosine".
        precision: "exact" or "fast", as in `nearest_code`.
        beta: weight of the commitment term.
        codebook_weight: weight of the codebook term.
        estimator: what the gradient of `quantized` does. "ste": it passes straight through to x. "rotation": it is
            turned and scaled as the vector was to reach its code (Fifty et al. 2024). "none": it goes to the codes
            chosen, as that of an embedding.
        mask: (...) bool, or (..., H), True where a vector counts. Elsewhere the index is -1 and the output zero; there
            is no loss, no count and no gradient.
        indices: (...) or (..., H) int64, the code of each vector where that is not to be the nearest.

    Returns:
        Quantized(quantized, indices, loss, counts), with a property `perplexity`.

    Raises:
        TypeError: not float tensors, or of two dtypes; a mask that is not bool, indices that are not int64.
        ValueError: ranks, D, H, shapes or devices that do not fit, an empty codebook, an unknown metric, precision or
            estimator, a codebook prepared for another metric.
        RuntimeError: the codebook changed since it was prepared.
    """
    codes, packed = _codes_of(codebook, metric) if isinstance(codebook, PreparedCodebook) else (codebook, None)
    check_codebook(x, codes)
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, PRECISIONS)
    check_choice("estimator", estimator, ESTIMATORS)
    elements = max(x.numel(), 1)
    if mask is not None:
        mask = _mask_of_heads(mask, x, codes)
        elements = (mask.sum() * x.shape[-1]).clamp(min=1)
    if indices is None:
        indices = _nearest(x.detach(), codes.detach(), mask, packed, metric, precision == "exact")
    else:
        check_int64("indices", indices, x.shape[:-1], "(...) of x")
        check_device("x", x, indices=indices)
        if mask is not None:
            indices = torch.where(mask, indices, -1)
    if metric == "cosine":
        x = unit_vectors(x)
        codes = unit_vectors(codes) if packed is None else codebook.units()
    flat, numbers = codes, indices
    if codes.ndim == 3:
        # One codebook of H K codes, head by head.
        H, K, D = codes.shape
        flat = codes.reshape(H * K, D)
        numbers = indices + torch.arange(0, H * K, K, device=x.device)
        # A number beyond its own codebook stays one beyond all of them, so that it is found out.
        numbers = torch.where(indices < 0, indices, torch.where(indices < K, numbers, H * K))
    quantized, error, counts = _Lookup.apply(x, flat, numbers, estimator, float(beta), float(codebook_weight))
    return Quantized(quantized, indices, ordered_sum(error) / elements, counts.view(codes.shape[:-1]))


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
        TypeError: dtypes other than these, a codebook_size that is no int.
        ValueError: shapes or devices that do not fit, an index out of range.
    """
    check_float("x", x)
    if x.ndim < 1:
        raise ValueError(f"x: expected at least one dimension (..., D), got {describe(x)}")
    check_int64("indices", indices, x.shape[:-1], "(...) of x")
    check_whole("codebook_size", codebook_size, 1)
    if weights is not None:
        check_float("weights", weights)
        if weights.shape != indices.shape:
            raise ValueError(f"weights: expected the shape of indices, {tuple(indices.shape)}, got {describe(weights)}")
    check_device("x", x, indices=indices, weights=weights)
    return _codebook_stats(x.detach(), indices, None if weights is None else weights.detach(), codebook_size)
