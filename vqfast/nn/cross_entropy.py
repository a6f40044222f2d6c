"""Cross entropy of given codes under the softmax over distances, without an array of vectors by codes."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits that exist at once: rows of a tile times its codes.
_ROWS, _CODES = 4096, 1024
_CLOSEST = 1e-4  # distances below this count as this: the gradient of a distance has no limit at 0


def code_cross_entropy(x: Tensor, codebook: Tensor, indices: Tensor, *, cosine: bool = False) -> Tensor:
    """-log softmax_k(-||x - c_k||) at the given code, of each vector; the tiles of logits are made again in backward.

    Args:
        x: (..., D) float; below float32 it is widened.
        codebook: (K, D), dtype and device of x.
        indices: (...) int64; -1 for a vector that does not count.
        cosine: the logits are <x, c_k> instead; the caller scales both to unit length.

    Returns:
        (...) float32 or float64, 0 where the index is -1. Differentiable in x and codebook.
    """
    wide = torch.promote_types(x.dtype, torch.float32)  # cdist knows no half precision
    rows, codebook, given = x.reshape(-1, x.shape[-1]).to(wide), codebook.to(wide), indices.reshape(-1)
    losses = [
        _CodeCrossEntropy.apply(part, codebook, index, cosine)
        for part, index in zip(rows.split(_ROWS), given.split(_ROWS), strict=True)
    ]
    return torch.cat(losses).view(indices.shape)


def _distances(rows: Tensor, codes: Tensor) -> Tensor:
    # cdist without a product: the expanded square loses small distances far from the origin.
    return torch.cdist(rows, codes, compute_mode="donot_use_mm_for_euclid_dist").clamp_(min=_CLOSEST)


def _logits(rows: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    return rows @ codes.T if cosine else -_distances(rows, codes)


class _CodeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, codebook, indices, cosine):
        total = torch.full((len(rows),), -torch.inf, dtype=rows.dtype, device=rows.device)
        for codes in codebook.split(_CODES):
            total = torch.logaddexp(total, _logits(rows, codes, cosine).logsumexp(1))
        own = F.embedding(indices.clamp(min=0), codebook)
        logit = (rows * own).sum(1) if cosine else -(rows - own).norm(dim=1).clamp(min=_CLOSEST)
        ctx.save_for_backward(rows, codebook, indices, total)
        ctx.cosine = cosine
        return torch.where(indices >= 0, total - logit, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, codebook, indices, total = ctx.saved_tensors
        grad = torch.where(indices >= 0, grad, 0)
        grad_rows, grad_codes = torch.zeros_like(rows), []
        for k, codes in zip(range(0, len(codebook), _CODES), codebook.split(_CODES), strict=True):
            logits = _logits(rows, codes, ctx.cosine)
            share = torch.exp(logits - total[:, None])
            own = torch.arange(k, k + len(codes), device=rows.device) == indices[:, None]
            slope = (share - own.to(share.dtype)) * grad[:, None]  # of the loss, to the logits
            if ctx.cosine:
                grad_rows += slope @ codes
                grad_codes.append(slope.T @ rows)
                continue
            # d(-||x - c||) = (c - x) / ||x - c|| dx, and the opposite for the code; logits are minus the distance.
            slope = torch.where(logits < -_CLOSEST, slope / -logits, 0)
            grad_rows += slope @ codes - slope.sum(1, keepdim=True) * rows
            grad_codes.append(slope.T @ rows - slope.sum(0)[:, None] * codes)
        return grad_rows, torch.cat(grad_codes), None, None
