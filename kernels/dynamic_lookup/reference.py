"""Definition of codebook lookup on the fine grid: what packing, lookup and unpacking come to."""

import torch
from torch import Tensor

from vqfast.kernels.lookup.reference import lookup, lookup_backward
from vqfast.kernels.pack.reference import pack
from vqfast.kernels.unpack.reference import unpack, unpack_backward


def _packed(values: Tensor, grains: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    packed, *layout = pack(values, grains, False, values.shape[0] * values.shape[1] * values.shape[2])
    return packed, tuple(layout)


def _codes(indices: Tensor, grains: Tensor) -> Tensor:
    codes, (_, _, grain_ids) = _packed(indices, grains)
    return torch.where(grain_ids >= 0, codes, -1)


def dynamic_lookup(
    features: Tensor, codebook: Tensor, indices: Tensor, grains: Tensor, num_grains: int
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Args:
        features: (B, Hf, Wf, D) on the fine grid; that of a code is the one at the top left of what it covers.
        codebook: (K, D) codes, dtype of features.
        indices: (B, Hf, Wf) int64 in [0, K), the same over what a code covers.
        grains: (B, Hc, Wc) int64, 0 the coarsest; Hf / Hc = Wf / Wc = 2^(num_grains - 1).

    Returns:
        quantized (B, Hf, Wf, D) in the dtype of features: codebook[indices];
        squared_error (B, Hf, Wf) float32 (float64 for float64 features): ||x - code||^2 at the top left, else zero;
        counts (K,) int64, how many codes of the grain map have each index.
    """
    vectors, layout = _packed(features, grains)
    quantized, error, counts = lookup(vectors, codebook, _codes(indices, grains))
    return (
        unpack(quantized, *layout, grains, num_grains, True),
        unpack(error, *layout, grains, num_grains, False),
        counts,
    )


def dynamic_lookup_backward(
    grad_quantized: Tensor,
    grad_error: Tensor,
    features: Tensor,
    codebook: Tensor,
    indices: Tensor,
    grains: Tensor,
    num_grains: int,
) -> Tensor:
    """Gradient of a straight-through `dynamic_lookup` to its features.

    At the top left of what a code covers: the sum of grad_quantized over it, plus 2 grad_error (x - code); else zero.

    Args:
        grad_quantized: (B, Hf, Wf, D).
        grad_error: (B, Hf, Wf).
        features, codebook, indices, grains, num_grains: as given to `dynamic_lookup`.

    Returns:
        (B, Hf, Wf, D) in the dtype of features.
    """
    vectors, layout = _packed(features, grains)
    grad = unpack_backward(grad_quantized, *layout, grains, num_grains)
    slope, _ = _packed(grad_error, grains)
    grad = lookup_backward(grad, slope, vectors, codebook, _codes(indices, grains))
    return unpack(grad, *layout, grains, num_grains, False)
