"""How evenly a codebook is used, and how many codes images have."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqfast.ops.checks import check_whole, describe


def codebook_usage(codes: Tensor, codebook_size: int, *, times: int = 1) -> float:
    """Share of the codebook that occurs in `codes`, 0..1.

    Args:
        codes: any shape, integers in [0, codebook_size).
        codebook_size: K.
        times: how often a code must occur to count; ReFiT's measure takes 10 (arXiv 2112.01799).

    Raises:
        TypeError: codes that are no tensor of integers.
        ValueError: a code out of range, times below 1.
    """
    check_whole("times", times, 1)
    return _usage(_counts(codes, codebook_size), times)


def perplexity(codes: Tensor, codebook_size: int) -> float:
    """exp of the entropy of the codes' frequencies: the number of codes in even use, 1..codebook_size.

    0 for no codes.

    Raises:
        TypeError: codes that are no tensor of integers.
        ValueError: a code out of range.
    """
    return _perplexity(_counts(codes, codebook_size))


@dataclass(frozen=True)
class CodeCounts:
    """How often each code occurs in some images; two of them add up to those of both sets.

    counts: (K,) int64. images: how many. least, most: codes of an image.
    """

    counts: Tensor
    images: int
    least: int
    most: int

    @classmethod
    def of(cls, codes: Tensor, lengths: Tensor, codebook_size: int) -> "CodeCounts":
        """Of the codes of images, one after the other in any shape, and how many each has, (N,) int64."""
        return cls(_counts(codes, codebook_size).cpu(), len(lengths), int(lengths.min()), int(lengths.max()))

    def __add__(self, other: "CodeCounts") -> "CodeCounts":
        return CodeCounts(
            self.counts + other.counts,
            self.images + other.images,
            min(self.least, other.least),
            max(self.most, other.most),
        )

    def figures(self) -> dict[str, float]:
        """Codes of an image (mean, least, most), usage, usage with a code counted from 10 times on, perplexity."""
        return {
            "codes_mean": self.counts.sum().item() / self.images,
            "codes_least": self.least,
            "codes_most": self.most,
            "codebook_size": len(self.counts),
            "codebook_usage": _usage(self.counts, 1),
            "codebook_usage_10": _usage(self.counts, 10),
            "perplexity": _perplexity(self.counts),
        }


def copied(codes: Tensor, training: Tensor) -> float:
    """Share of the code grids (N, ...) that occur among those of the training images (M, ...): 0..1."""
    known = set(map(tuple, training.flatten(1).tolist()))
    return sum(tuple(grid) in known for grid in codes.flatten(1).tolist()) / max(len(codes), 1)


def _usage(counts: Tensor, times: int) -> float:
    return (counts >= times).sum().item() / len(counts)


def _perplexity(counts: Tensor) -> float:
    if counts.sum() == 0:
        return 0.0
    return torch.exp(torch.special.entr(counts.double() / counts.sum()).sum()).item()


def _counts(codes: Tensor, codebook_size: int) -> Tensor:
    check_whole("codebook_size", codebook_size, 1)
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"codes: expected a tensor of integers, got {describe(codes)}")
    flat = codes.reshape(-1)
    if flat.numel() and not (0 <= int(flat.min()) and int(flat.max()) < codebook_size):
        raise ValueError(f"codes: expected values in 0..{codebook_size - 1}, got {int(flat.min())}..{int(flat.max())}")
    return torch.bincount(flat, minlength=codebook_size)
