"""Definition of the product of rows with the transitions from one noise level to another, one matrix a step."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot


class Chain(NamedTuple):
    """T steps over K codes.

    steps, diagonal: (T, K, K) and None, or (T, K) and (T, K), see `step_matrix`; [i] leads from level i to i + 1.
    cumulative, blocks: (T // stride, K, K), Q_1 ... Q_{(i+1) stride} and Q_{i stride + 1} ... Q_{(i+1) stride}:
        products made ahead. The definition does without them.
    stride: levels between them.
    """

    steps: Tensor
    diagonal: Tensor | None
    cumulative: Tensor
    blocks: Tensor
    stride: int

    def step(self, index: int | Tensor) -> Tensor:
        """(..., K, K) of an index or of a tensor (...) of them."""
        return step_matrix(self.steps[index], None if self.diagonal is None else self.diagonal[index])

    def matrix(self, table: str, index: int | Tensor) -> Tensor:
        """Of table "steps", "cumulative" or "blocks"."""
        return self.step(index) if table == "steps" else getattr(self, table)[index]


def on_chain(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A product of (rows, s, t, chain, transpose, span) as the op has it, the chain's tables one after another."""

    def op(
        rows: Tensor,
        s: Tensor | None,
        t: Tensor,
        steps: Tensor,
        diagonal: Tensor | None,
        cumulative: Tensor,
        blocks: Tensor,
        stride: int,
        transpose: bool,
        span: int,
    ) -> Tensor:
        return product(rows, s, t, Chain(steps, diagonal, cumulative, blocks, stride), transpose, span)

    return op


def step_matrix(steps: Tensor, diagonal: Tensor | None) -> Tensor:
    """(..., K, K): matrices as they are, (..., K, K) without `diagonal`; or banded ones written out.

    A banded matrix is given by steps (..., K), its entries at distance 1..K - 1 from the diagonal in [..., 1:], and by
    its diagonal (..., K), which reads the same from both ends: turned by half a turn the matrix is itself, and so are
    products of such matrices. An entry below the smallest normal number, which has lost its digits, is 0: in a product
    each would cost a processor a hundred cycles.
    """
    if diagonal is None:
        return steps
    steps = torch.where(steps < torch.finfo(steps.dtype).tiny, 0, steps)
    # Windows of (w_{K-1} .. w_1, _, w_1 .. w_{K-1}), the last first, are the rows of a Toeplitz matrix.
    mirrored = torch.cat([steps.flip(-1), steps[..., 1:]], dim=-1)
    matrix = mirrored.unfold(-1, steps.shape[-1], 1).flip(-2).contiguous()
    matrix.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return matrix


@on_chain
def transition_matmul(rows: Tensor, s: Tensor | None, t: Tensor, chain: Chain, transpose: bool, span: int) -> Tensor:
    """rows Q_{s+1} ... Q_t, or rows (Q_{s+1} ... Q_t)^T, in the dtype of the chain.

    D3PM (Austin et al. 2021), eqs. 2 and 3: q(x_t | x_s = i) is row i of the product. The transposed product of the
    one-hot of x_t is q(x_t | x_s = j) for every j.

    Args:
        rows: (B, L, K) float, or (B, L) int64 codes in [0, K) for rows that are their one-hots.
        s, t: (B,) int64 levels, 0 <= s <= t <= T. s None for 0: products from the data on.
        chain: its steps.
        transpose: which product.
        span: t - s where it is the same number for every sample, else 0. A hint: results do not depend on it.

    Returns:
        (B, L, K), dtype of the chain.
    """
    K, dtype = chain.steps.shape[-1], chain.steps.dtype
    rows = one_hot(rows, K) if rows.dtype == torch.int64 else rows
    first = torch.zeros_like(t) if s is None else s
    product = torch.eye(K, dtype=dtype, device=rows.device).repeat(t.shape[0], 1, 1)
    for b in range(t.shape[0]):
        for level in range(int(first[b]), int(t[b])):
            product[b] = product[b] @ chain.step(level)
    return rows.to(dtype) @ (product.mT if transpose else product)
