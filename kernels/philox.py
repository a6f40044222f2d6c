"""Philox 4x32-10 (Salmon et al., 'Parallel Random Numbers: As Easy as 1, 2, 3', SC 2011) in plain torch.

The random numbers of every op are a pure function of (key, row, draw), so a seed gives the same sample on each
backend. The counter is (row low, row high, draw, key[1] low); the key is (key[0] low, key[0] high). The four 32-bit
words of a block make two 64-bit integers, low word first.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _split_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for a, b < 2**32 held in int64."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox(key: Tensor, rows: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    """Two 64-bit random integers for each row, as int64 bit patterns.

    Args:
        key: (2,) int64, from a torch.Generator.
        rows: (...) int64 counters.
        draw: which block of this row.
    """
    c0, c1 = rows & _MASK, (rows >> 32) & _MASK
    c2, c3 = torch.full_like(rows, draw), (key[1] & _MASK).expand_as(rows)
    k0, k1 = key[0] & _MASK, (key[0] >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _split_product(_M0, c0)
        high1, low1 = _split_product(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0 | (c1 << 32), c2 | (c3 << 32)


def uniform(bits: Tensor) -> Tensor:
    """Float64 in [0, 1) from the top 53 of 64 random bits."""
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def below(bits: Tensor, bound: int) -> Tensor:
    """Integer in [0, bound) from 64 random bits: the high word of bits * bound, for bound < 2**31."""
    high, low = (bits >> 32) & _MASK, bits & _MASK
    return (high * bound + ((low * bound) >> 32)) >> 32
