"""The search by a library's float32 product: scores written out, reduced, certified, and where open searched again.

Against few rows a large codebook takes longer to pack than to multiply. Nothing is packed here, nor centred: scores are
b_k + x . c_k with b_k = -||c_k||^2 / 2 (0 for dot) as the formula says, and data far from the origin leaves every row
open. The certificate is that of the fused kernels (README.md, "The bound"), with these terms:

    gamma_{D+8} (||x|| C + C^2)     D products, D sums, the bias and its sum, in any order; b_k rounded in D + 8 steps;
                                    C is the largest norm of a code, both norms with sqrt(D) 2^-62 for squares below
                                    the smallest number
    2^-118 (D + 4) (1 + ||x|| + C)  what underflows
    a factor 1.01                   the norms are themselves rounded sums in float32
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Scores that are written out at a time: 4 MB.
_SCORES = 1 << 20
# Features up to which the rounding of the norms is within the factor.
_MOST_FEATURES = 1 << 16


def serves(x: Tensor, codebook: Tensor, mask: Tensor | None, prepared: Tensor | None, metric: str, exact: bool) -> bool:
    """Whether `by_product` takes such a search: float32, one head, nothing prepared, and products in float32 too."""
    return (
        prepared is None
        and mask is None
        and exact
        and x.dtype == torch.float32
        and codebook.ndim == 2
        and metric != "cosine"
        and codebook.shape[1] <= _MOST_FEATURES
        # torch.set_float32_matmul_precision and its like let a library round its inputs to bfloat16.
        and torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    )


def by_product(x: Tensor, codebook: Tensor, metric: str, search: Callable[[Tensor], Tensor]) -> Tensor:
    """`nearest` of the reference, for what `serves` is true of.

    Args:
        x: (..., D) float32.
        codebook: (K, D) float32.
        metric: "l2" or "dot".
        search: x (M, D) -> (M,), the same for the rows that the scores leave open.

    Returns:
        (...) int64.
    """
    codebook, rows = codebook.detach(), x.detach().reshape(-1, x.shape[-1])
    K, D = codebook.shape
    N, norms = rows.shape[0], torch.linalg.vector_norm(codebook, dim=1)
    lost, steps = D**0.5 * 2.0**-62, D + 8
    largest, size = norms.max().double() + lost, torch.linalg.vector_norm(rows, dim=1).double() + lost
    gamma = steps * 2.0**-24 / (1 - steps * 2.0**-24)
    bound = 1.01 * gamma * (size * largest + largest**2) + 2.0**-118 * steps * (1 + size + largest)
    # Where a score might overflow.
    bound.masked_fill_(~(size * largest + largest**2 < 1e37), torch.inf)
    bias = norms.square_().mul_(-0.5) if metric == "l2" else None
    indices, settled = x.new_empty(N, dtype=torch.int64), x.new_empty(N, dtype=torch.bool)
    chunk = max(_SCORES // K, 1)
    scores = x.new_empty(min(chunk, N), K)
    for first in range(0, N, chunk):
        here = slice(first, min(first + chunk, N))
        n = here.stop - first
        # With `out`: autocast leaves such products alone.
        if bias is None:
            torch.mm(rows[here], codebook.T, out=scores[:n])
        else:
            torch.addmm(bias, rows[here], codebook.T, out=scores[:n])
        least = (scores[:n].amax(1) - 2 * bound[here]).float()
        least = torch.nextafter(least, torch.full_like(least, -torch.inf))
        row, code = (scores[:n] >= least[:, None]).nonzero(as_tuple=True)
        settled[here] = torch.bincount(row, minlength=n) == 1
        indices[here].scatter_(0, row, code)
    open_rows = (~settled).nonzero()[:, 0]
    if open_rows.numel():
        indices[open_rows] = search(rows[open_rows])
    return indices.reshape(x.shape[:-1])
