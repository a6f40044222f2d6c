"""Definition of codebook lookup: the codes chosen, the squared error of the choice, how often each was chosen."""

import torch
from torch import Tensor


def lookup(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Args:
        x: (..., D) vectors.
        codebook: (K, D) codes, dtype of x.
        indices: (...) int64 in [0, K), or -1 for a position that is masked.

    Returns:
        quantized (..., D) in the dtype of x, zero where masked;
        squared_error (...) float32 (float64 for float64 input): ||x - code||^2, zero where masked;
        counts (K,) int64.
    """
    kept = indices >= 0
    accumulate = torch.promote_types(x.dtype, torch.float32)
    quantized = codebook[indices.clamp(min=0)] * kept[..., None].to(codebook.dtype)
    error = (x.to(accumulate) - quantized.to(accumulate)).square().sum(-1)
    # One slot more than there are codes takes the masked positions: no boolean index, so no host sync.
    slot = torch.where(kept, indices, codebook.shape[0]).reshape(-1)
    counts = torch.zeros(codebook.shape[0] + 1, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, slot, torch.ones_like(slot))
    return quantized, torch.where(kept, error, 0), counts[:-1]


def lookup_backward(grad_quantized: Tensor, grad_error: Tensor, x: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """Gradient of a straight-through lookup to its input: grad_quantized + 2 grad_error (x - code).

    Args:
        grad_quantized: (..., D) gradient of `quantized`, passed straight through.
        grad_error: (...) gradient of `squared_error`.
        x, codebook, indices: as given to `lookup`.

    Returns:
        (..., D) in the dtype of x; zero where masked.
    """
    kept = (indices >= 0)[..., None]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    difference = x.to(accumulate) - codebook[indices.clamp(min=0)].to(accumulate)
    grad = grad_quantized.to(accumulate) + 2 * grad_error.to(accumulate)[..., None] * difference
    return torch.where(kept, grad, 0).to(x.dtype)
