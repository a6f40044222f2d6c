"""Quantisation of images whose cells have different grains: every code is searched, counted and charged once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vqfast.ops.checks import check_choice, check_codebook, check_device, check_float, describe
from vqfast.ops.packing import Packed, check_num_grains, grains_of_grid, pack, unpack
from vqfast.ops.reduction import ordered_sum
from vqfast.ops.search import ESTIMATORS, codebook_stats, nearest_code, quantize
from vqfast.ops.transforms import Function, once_differentiable, transformed

_unpack = torch.ops.vqfast.unpack.default
_dynamic_lookup = torch.ops.vqfast.dynamic_lookup.default
_dynamic_lookup_backward = torch.ops.vqfast.dynamic_lookup_backward.default

ACCOUNTS = ("codes", "cells")


class DynamicQuantized(NamedTuple):
    """What `dynamic_quantize` returns.

    quantized: (B, Hf, Wf, D) codes on the fine grid, dtype of features.
    indices: (B, Hf, Wf) int64.
    loss: scalar float32 (float64 for float64 input).
    counts: (K,) int64, how often each code was chosen.
    packed: the indices as packed codes, of T tokens.
    chosen: (B, Hf, Wf) int64, each code once: its index at the top left of what it covers, -1 elsewhere. What a moving
        average adds up is codebook_stats(features, chosen, K).
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    counts: Tensor
    packed: Packed
    chosen: Tensor


def code_weights(grain_ids: Tensor, num_grains: int = 2) -> Tensor:
    """How many positions of the fine grid each token covers: 4^(G-1-g), 0 in the tail. int64, shape of grain_ids."""
    check_num_grains(num_grains)
    return torch.where(grain_ids >= 0, 4 ** (num_grains - 1 - grain_ids.clamp(0, num_grains - 1)), 0)


class _DynamicLookup(Function):
    """`_Lookup` of search.py on the fine grid, straight through."""

    @staticmethod
    def forward(features, codebook, indices, chosen, grains, num_grains, beta, codebook_weight):
        quantized, error, counts = _dynamic_lookup(features, codebook, indices, grains, num_grains)
        return quantized, error * (beta + codebook_weight), counts

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.num_grains, ctx.beta, ctx.codebook_weight = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_quantized, grad_error, _):
        features, codebook, indices, chosen, grains = ctx.saved_tensors
        grad_features = grad_codebook = None
        if ctx.needs_input_grad[0]:
            grad_features = _dynamic_lookup_backward(
                grad_quantized, grad_error * ctx.beta, features, codebook, indices, grains, ctx.num_grains
            )
        if ctx.needs_input_grad[1]:
            weights = grad_error * (2 * ctx.codebook_weight)
            counts, sums = codebook_stats(features, chosen, codebook.shape[0], weights=weights)
            grad_codebook = (counts[:, None] * codebook - sums).to(codebook.dtype)
        return grad_features, grad_codebook, *(None,) * 6


def _first_grain(num_grains: int, device: torch.device) -> Tensor:
    """(F, F) int64, F = 2^(G-1): the coarsest grain of which a code has its top left at this position of a cell."""
    along = torch.arange(2 ** (num_grains - 1), device=device)
    both = along[:, None] | along
    starts = [both % 2 ** (num_grains - 1 - grain) == 0 for grain in range(num_grains)]
    return num_grains - torch.stack(starts).sum(0)


def _holds_code(grains: Tensor, num_grains: int) -> Tensor:
    """(B, Hf, Wf) bool: whether a position of the fine grid is the top left of a code."""
    (B, Hc, Wc), F = grains.shape, 2 ** (num_grains - 1)
    return (grains[:, :, None, :, None] >= _first_grain(num_grains, grains.device)[:, None, :]).reshape(
        B, Hc * F, Wc * F
    )


def _in_place(
    features: Tensor, grains: Tensor, codebook: Tensor, num_grains: int, order: str, beta: float, codebook_weight: float
) -> DynamicQuantized:
    """On the host: a search of the vectors that are codes, where they lie. Nothing of their size is packed."""
    chosen = nearest_code(features, codebook, mask=_holds_code(grains, num_grains))
    codes = pack(chosen, grains, order=order)
    indices = unpack(codes, grains, num_grains=num_grains)
    quantized, error, counts = _DynamicLookup.apply(
        features, codebook, indices, chosen, grains, num_grains, float(beta), float(codebook_weight)
    )
    elements = int(codes.cu_seqlens[-1]) * features.shape[-1]
    return DynamicQuantized(quantized, indices, ordered_sum(error) / max(elements, 1), counts, codes, chosen)


def _in_packed_space(
    features: Tensor,
    grains: Tensor,
    codebook: Tensor,
    num_grains: int,
    order: str,
    beta: float,
    codebook_weight: float,
    estimator: str,
    capacity: int | None,
) -> DynamicQuantized:
    """Pack, search, look up, unpack."""
    packed = pack(features, grains, order=order, capacity=capacity)
    layout = packed[1:]
    result = quantize(
        packed.values,
        codebook,
        beta=beta,
        codebook_weight=codebook_weight,
        estimator=estimator,
        mask=packed.grain_ids >= 0,
    )
    # Not by _replace, here and below: torch 2.11 does not trace a result that was made so.
    codes = Packed(result.indices.clamp(min=0), *layout)
    indices = unpack(codes, grains, num_grains=num_grains)
    # One more, and each once: what is left out stays 0.
    chosen = _unpack(codes.values + 1, *layout, grains, num_grains, False) - 1
    quantized = unpack(packed._replace(values=result.quantized), grains, num_grains=num_grains)
    return DynamicQuantized(quantized, indices, result.loss, result.counts, codes, chosen)


def _check_account(name: str, value: str) -> None:
    if value not in ACCOUNTS:
        raise ValueError(f"{name}: expected one of {', '.join(ACCOUNTS)}, got {value!r}")


def dynamic_quantize(
    features: Tensor,
    grains: Tensor,
    codebook: Tensor,
    *,
    beta: float = 0.25,
    codebook_weight: float = 1.0,
    estimator: str = "ste",
    order: str = "row",
    normalise: str = "codes",
    counting: str = "codes",
    capacity: int | None = None,
) -> DynamicQuantized:
    """Quantise features in packed space: pack, search, look up, unpack (DQ-VAE, arXiv 2305.11718).

    loss = codebook_weight * mean |sg(x) - code|^2 + beta * mean |x - sg(code)|^2, where each code counts once however
    many positions it covers: the paper's weights 1 / 4^k over replicated positions.

    Args:
        features: (B, Hf, Wf, D) float, any strides (channel-first x.permute(0, 2, 3, 1) is read in place); a coarser
            code is the vector at the top left of what it covers.
        grains: (B, Hc, Wc) int64, 0 the coarsest.
        codebook: (K, D).
        beta, codebook_weight, estimator: as for `quantize`.
        order: of packed tokens, "row" or "region".
        normalise: "codes": means are over codes. "cells": sums over codes are divided by the positions of the fine grid
            instead, as the released code does.
        counting: "codes": a code chosen counts once. "cells": as often as it covers positions of the fine grid, as the
            released moving averages do (4 or 16 times for a coarse one).
        capacity: T; see `pack`. On CUDA all T rows are searched, for their number must not depend on the data: a
            capacity near the expected number of codes saves what the grains save. On the CPU only codes are searched.

    Returns:
        DynamicQuantized(quantized, indices, loss, counts, packed, chosen).

    Raises:
        TypeError, ValueError: as `pack` and `quantize`; an unknown option.
    """
    check_float("features", features)
    if features.ndim != 4:
        raise ValueError(f"features: expected shape (B, Hf, Wf, D), got {describe(features)}")
    _check_account("normalise", normalise)
    _check_account("counting", counting)
    check_choice("estimator", estimator, ESTIMATORS)
    num_grains = grains_of_grid(features.shape, grains, "features")
    check_device("features", features, grains=grains)
    check_codebook(features, codebook, "features")
    on_host = features.is_cpu and not (torch.compiler.is_compiling() or transformed())
    # Where nothing is dropped and gradients go straight through, only the search tells codes from what they cover.
    if on_host and capacity is None and estimator == "ste":
        out = _in_place(features, grains, codebook, num_grains, order, beta, codebook_weight)
    else:
        out = _in_packed_space(
            features, grains, codebook, num_grains, order, beta, codebook_weight, estimator, capacity
        )
    if normalise == "cells":
        loss = out.loss * (out.packed.cu_seqlens[-1] / max(out.indices.numel(), 1))
        out = DynamicQuantized(*out[:2], loss, *out[3:])
    if counting == "cells":
        weights = code_weights(out.packed.grain_ids, num_grains)
        counts = torch.zeros_like(out.counts).scatter_add_(0, out.packed.values, weights)
        out = DynamicQuantized(*out[:3], counts, *out[4:])
    return out


def grain_budget_loss(gates: Tensor, targets: Sequence[float], weights: Sequence[float]) -> Tensor:
    """sum_g weights[g-1] (r_g - targets[g-1])^2 over grains g >= 1: what keeps a router to its budget of codes.

    r_g = (mean over the batch of n_g - S) / ((4^g - 1) S), with S cells and n_g = sum over cells of all gates, that of
    grain g taken 4^g times: 0 where no cell has grain g, 1 where all have (DQ-VAE, arXiv 2305.11718). The
    released two-grain loss is weights = (2 gamma,), the three-grain one (1, gamma).

    Args:
        gates: (B, G, Hc, Wc) float, one-hot over G in the forward pass.
        targets: G - 1 wanted fractions.
        weights: G - 1.

    Returns:
        scalar in the dtype of gates, differentiable.

    Raises:
        TypeError: gates that are not float.
        ValueError: another number of targets or weights than G - 1.
    """
    check_float("gates", gates)
    if gates.ndim != 4:
        raise ValueError(f"gates: expected shape (B, G, Hc, Wc), got {describe(gates)}")
    G, cells = gates.shape[1], gates.shape[2] * gates.shape[3]
    if len(targets) != G - 1 or len(weights) != G - 1:
        raise ValueError(f"expected {G - 1} targets and weights, one a grain after the first, got {targets}, {weights}")
    totals = gates.sum((2, 3)).mean(0)
    loss = gates.new_zeros(())
    for g, (target, weight) in enumerate(zip(targets, weights, strict=True), 1):
        excess = totals.sum() + (4**g - 1) * totals[g] - cells
        loss = loss + weight * (excess / ((4**g - 1) * cells) - target).square()
    return loss
