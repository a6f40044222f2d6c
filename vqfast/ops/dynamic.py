"""Quantisation of images whose cells have different grains: every code is searched, counted and charged once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vqfast.ops.checks import check_choice, check_float, describe
from vqfast.ops.packing import Packed, check_num_grains, grains_of_grid, pack, unpack
from vqfast.ops.reduction import ordered_sum
from vqfast.ops.search import ESTIMATORS, codebook_stats, nearest_code, quantize

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
    vectors: (T, D) what was quantised, without gradient; zero in the tail. With
        torch.where(packed.grain_ids >= 0, packed.values, -1) it is what a moving average adds up by `codebook_stats`.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    counts: Tensor
    packed: Packed
    vectors: Tensor


def code_weights(grain_ids: Tensor, num_grains: int = 2) -> Tensor:
    """How many positions of the fine grid each token covers: 4^(G-1-g), 0 in the tail. int64, shape of grain_ids."""
    check_num_grains(num_grains)
    return torch.where(grain_ids >= 0, 4 ** (num_grains - 1 - grain_ids.clamp(0, num_grains - 1)), 0)


class _DynamicLookup(torch.autograd.Function):
    """`_Lookup` of search.py on the fine grid, straight through; `codes` are the same indices packed in `order`."""

    @staticmethod
    def forward(ctx, features, codebook, indices, grains, num_grains, codes, order, beta, codebook_weight):
        quantized, error, counts = _dynamic_lookup(features, codebook, indices, grains, num_grains)
        ctx.save_for_backward(features, codebook, indices, grains, codes)
        ctx.num_grains, ctx.order, ctx.beta, ctx.codebook_weight = num_grains, order, beta, codebook_weight
        ctx.mark_non_differentiable(counts)
        return quantized, error * (beta + codebook_weight), counts

    @staticmethod
    def backward(ctx, grad_quantized, grad_error, _):
        features, codebook, indices, grains, codes = ctx.saved_tensors
        grad_features = grad_codebook = None
        if ctx.needs_input_grad[0]:
            grad_features = _dynamic_lookup_backward(
                grad_quantized, grad_error * ctx.beta, features, codebook, indices, grains, ctx.num_grains
            )
        if ctx.needs_input_grad[1]:
            used, K = codes.shape[0], codebook.shape[0]
            weights = pack(grad_error * (2 * ctx.codebook_weight), grains, order=ctx.order, capacity=used).values
            vectors = pack(features, grains, order=ctx.order, capacity=used).values
            counts, sums = codebook_stats(vectors, codes, K, weights=weights)
            grad_codebook = (counts[:, None] * codebook - sums).to(codebook.dtype)
        return grad_features, grad_codebook, *(None,) * 7


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
        DynamicQuantized(quantized, indices, loss, counts, packed, vectors).

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
    on_cpu = features.device.type == "cpu" and not torch.compiler.is_compiling()
    # Where nothing is dropped and gradients go straight through, only the search needs packed vectors.
    on_grid = on_cpu and capacity is None and estimator == "ste"
    packed = pack(features.detach() if on_grid else features, grains, order=order, capacity=capacity)
    vectors, cu_seqlens, positions, grain_ids = packed
    T = vectors.shape[0]
    # On the CPU the number of codes is at hand: the tail is not searched.
    used = int(cu_seqlens[-1]) if on_cpu else T
    if on_grid:
        chosen = nearest_code(vectors[:used], codebook.detach())
    else:
        mask = None if on_cpu else grain_ids >= 0
        result = quantize(
            vectors[:used], codebook, beta=beta, codebook_weight=codebook_weight, estimator=estimator, mask=mask
        )
        chosen = result.indices.clamp(min=0)
    codes = packed._replace(values=torch.nn.functional.pad(chosen, (0, T - used)))
    indices = unpack(codes, grains, num_grains=num_grains)
    if on_grid:
        quantized, error, counts = _DynamicLookup.apply(
            features, codebook, indices, grains, num_grains, chosen, order, float(beta), float(codebook_weight)
        )
        loss = ordered_sum(error) / max(chosen.numel() * features.shape[-1], 1)
    else:
        tokens = Packed(result.quantized, cu_seqlens, positions[:used], grain_ids[:used])
        quantized, loss, counts = unpack(tokens, grains, num_grains=num_grains), result.loss, result.counts
    if normalise == "cells":
        loss = loss * (cu_seqlens[-1] / max(indices.numel(), 1))
    if counting == "cells":
        weights = code_weights(grain_ids, num_grains)
        counts = torch.zeros_like(counts).scatter_add_(0, codes.values, weights)
    return DynamicQuantized(quantized, indices, loss, counts, codes, vectors.detach())


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
