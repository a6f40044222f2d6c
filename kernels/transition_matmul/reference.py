"""Definition of the product of rows with the transitions from one noise level to another, one matrix a step."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def step_matrix(steps: Tensor, diagonal: Tensor | None) -> Tensor:
    """(..., K, K): matrices as they are, (..., K, K) without `diagonal`; or banded ones written out.

    A banded matrix is given by steps (..., K), its entries at distance 1..K - 1 from the diagonal in [..., 1:], and by
    its diagonal (..., K); it is symmetric.
    """
    if diagonal is None:
        return steps
    # Windows of (w_{K-1} .. w_1, _, w_1 .. w_{K-1}), the last first, are the rows of a Toeplitz matrix.
    mirrored = torch.cat([steps.flip(-1), steps[..., 1:]], dim=-1)
    matrix = mirrored.unfold(-1, steps.shape[-1], 1).flip(-2).contiguous()
    matrix.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return matrix


def transition_matmul(
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
    """rows Q_{s+1} ... Q_t, or rows (Q_{s+1} ... Q_t)^T, in the dtype of `steps`.

    D3PM (Austin et al. 2021), eqs. 2 and 3: q(x_t | x_s = i) is row i of the product. The transposed product of the
    one-hot of x_t is q(x_t | x_s = j) for every j.

    Args:
        rows: (B, L, K) float, or (B, L) int64 codes in [0, K) for rows that are their one-hots.
        s, t: (B,) int64 levels, 0 <= s <= t <= T. s None for 0: products from the data on.
        steps, diagonal: (T, K, K) and None, or (T, K) and (T, K), see `step_matrix`; [i] leads from level i to i + 1.
        cumulative, blocks: (T // stride, K, K), Q_1 ... Q_{(i+1) stride} and Q_{i stride + 1} ... Q_{(i+1) stride}:
            products made ahead. The definition does without them.
        stride: levels between them.
        transpose: which product.
        span: t - s where it is the same number for every sample, else 0. A hint: results do not depend on it.

    Returns:
        (B, L, K), dtype of `steps`.
    """
    K = steps.shape[-1]
    rows = one_hot(rows, K) if rows.dtype == torch.int64 else rows
    first = torch.zeros_like(t) if s is None else s
    product = torch.eye(K, dtype=steps.dtype, device=steps.device).repeat(t.shape[0], 1, 1)
    for b in range(t.shape[0]):
        for level in range(int(first[b]), int(t[b])):
            product[b] = product[b] @ step_matrix(steps[level], None if diagonal is None else diagonal[level])
    return rows.to(steps.dtype) @ (product.mT if transpose else product)
