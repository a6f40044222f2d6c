"""How evenly a codebook is used."""

import torch
from torch import Tensor


def codebook_usage(codes: Tensor, codebook_size: int, *, times: int = 1) -> float:
    """Share of the codebook that occurs in `codes`, 0..1.

    Args:
        codes: any shape, integers in [0, codebook_size).
        codebook_size: K.
        times: how often a code must occur to count; ReFiT's measure takes 10 (arXiv 2112.01799).
    """
    return (_counts(codes, codebook_size) >= times).sum().item() / codebook_size


def perplexity(codes: Tensor, codebook_size: int) -> float:
    """exp of the entropy of the codes' frequencies: the number of codes in even use, 1..codebook_size.

    0 for no codes.
    """
    counts = _counts(codes, codebook_size).double()
    if counts.sum() == 0:
        return 0.0
    return torch.exp(torch.special.entr(counts / counts.sum()).sum()).item()


def copied(codes: Tensor, training: Tensor) -> float:
    """Share of the code grids (N, ...) that occur among those of the training images (M, ...): 0..1."""
    known = set(map(tuple, training.flatten(1).tolist()))
    return sum(tuple(grid) in known for grid in codes.flatten(1).tolist()) / max(len(codes), 1)


def _counts(codes: Tensor, codebook_size: int) -> Tensor:
    flat = codes.reshape(-1)
    if flat.numel() and not (0 <= int(flat.min()) and int(flat.max()) < codebook_size):
        raise ValueError(f"codes: expected values in 0..{codebook_size - 1}, got {int(flat.min())}..{int(flat.max())}")
    return torch.bincount(flat, minlength=codebook_size)
