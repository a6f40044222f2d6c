"""Definition of nearest-code search: which code is nearest to each vector by distance, product or cosine."""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24
# Squares of cosines closer than this, relative to themselves, tie: kEqualCosines of csrc/include/exact_distance.h.
_EQUAL_COSINES = 2.0**-96

# A number in twice the precision of float64: two float64 tensors whose exact sum it is.
Double2 = tuple[Tensor, Tensor]


def nearest(x: Tensor, codebook: Tensor, mask: Tensor | None = None, metric: str = "l2") -> Tensor:
    """Index of the code nearest to each vector.

    Args:
        x: (..., D) vectors, or (..., H, D) for H codebooks.
        codebook: (K, D) codes, or (H, K, D).
        mask: (...) or (..., H) bool, True where a vector counts.
        metric: "l2", least squared distance, from float64 differences; "dot", largest product, or "cosine", largest
            cosine, from products in twice float64.

    Returns:
        (...) or (..., H) int64, -1 where masked. Ties go to the lowest index. A row that is not finite gets 0; a code
        that is not finite loses to any finite one. The cosine of a zero vector with anything is 0.
    """
    if codebook.ndim == 3:
        heads = [nearest(x[..., h, :], codebook[h], None, metric) for h in range(codebook.shape[0])]
        indices = torch.stack(heads, -1)
    else:
        search = _nearest_by_distance if metric == "l2" else _nearest_by_product
        indices = search(x.reshape(-1, x.shape[-1]), codebook, metric).reshape(x.shape[:-1])
    return indices if mask is None else torch.where(mask, indices, -1)


def _nearest_by_distance(rows: Tensor, codebook: Tensor, metric: str) -> Tensor:
    codes = codebook.double()
    out = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, codes.numel()))
    for start in range(0, rows.shape[0], step):
        difference = rows[start : start + step, None].double() - codes
        distance = difference.square().sum(-1)
        out[start : start + step] = distance.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(-1)
    return out


def _scaled_to_one(vectors: Tensor, largest: Tensor) -> Tensor:
    """Times the power of two that brings `largest` to [1/2, 1): exact, and no product overflows."""
    exponent = torch.frexp(largest).exponent.clamp(-1000, 1000)
    return torch.ldexp(vectors, -exponent)


def _sum(a: Tensor, b: Tensor) -> Double2:
    """a + b without error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _split(a: Tensor) -> Double2:
    """Two halves of 26 bits each (Veltkamp)."""
    product = a * (2.0**27 + 1)
    high = product - (product - a)
    return high, a - high


def _product(a: Tensor, b: Tensor) -> Double2:
    """a * b without error (Dekker)."""
    product = a * b
    (a1, a2), (b1, b2) = _split(a), _split(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _add(a: Double2, b: Double2) -> Double2:
    high, rest = _sum(a[0], b[0])
    return _sum(high, rest + (a[1] + b[1]))


def _multiply(a: Double2, b: Double2) -> Double2:
    high, rest = _product(a[0], b[0])
    return _sum(high, rest + (a[0] * b[1] + a[1] * b[0]))


def _divide(a: Double2, b: Double2) -> Double2:
    first = a[0] / b[0]
    part = _multiply((first, torch.zeros_like(first)), b)
    rest = _add(a, (-part[0], -part[1]))
    second = rest[0] / b[0]
    part = _multiply((second, torch.zeros_like(second)), b)
    rest = _add(rest, (-part[0], -part[1]))
    return _add((first, second), (rest[0] / b[0], torch.zeros_like(first)))


def _dot(a: Tensor, b: Tensor) -> Double2:
    """Sum over the last dimension of a * b, which broadcast."""
    shape = torch.broadcast_shapes(a.shape, b.shape)[:-1]
    total = a.new_zeros(shape), a.new_zeros(shape)
    for d in range(a.shape[-1]):
        total = _add(total, _product(a[..., d], b[..., d]))
    return total


def _nearest_by_product(rows: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """rows: (N, D). Cosines are compared by p |p| / n, p = x . c and n = ||c||^2: free of the root that would round."""
    possible = codebook.isfinite().all(-1)
    codes = torch.where(possible[:, None], codebook.double(), 0)
    size = codes.abs().amax(-1, keepdim=True)
    codes = _scaled_to_one(codes, size if metric == "cosine" else size.amax())
    square = _dot(codes, codes)
    finite = rows.isfinite().all(-1)
    out = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    step = max(1, _CHUNK_ELEMENTS // (8 * codes.shape[0]))
    for start in range(0, rows.shape[0], step):
        x = torch.where(finite[start : start + step, None], rows[start : start + step].double(), 0)
        x = _scaled_to_one(x, x.abs().amax(-1, keepdim=True))
        high, low = _dot(x[:, None], codes[None])
        if metric == "cosine":
            sign = high.sign()
            high, low = _divide(_multiply((high, low), (high, low)), square)
            # A zero code: 0 / 0.
            high, low = (torch.where(square[0] > 0, v * sign, 0) for v in (high, low))
        high = torch.where(possible, high, -torch.inf)
        most = high.amax(-1, keepdim=True)
        most_low = torch.where(high == most, low, -torch.inf).amax(-1, keepdim=True)
        behind = (most - high) + (most_low - low)
        slack = _EQUAL_COSINES * most.abs() if metric == "cosine" else 0
        # The first of those that are not behind; argmax of booleans is that of the first. All -inf: index 0.
        out[start : start + step] = (behind <= slack).to(torch.int8).argmax(-1)
    return torch.where(finite, out, 0)
