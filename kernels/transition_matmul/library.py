"""The products by the BLAS of the device, from those that were made ahead and the steps that are left.

By samples, where their levels can be looked at for nothing; by batches, where that would be a device sync.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vqfast.kernels.transition_matmul.reference import Chain, on_chain, step_matrix

# (..., K) rows times a (K, K) matrix.
Multiply = Callable[[Tensor, Tensor], Tensor]

# Matrices that a batch writes out at a time, in elements: 256 MB in float64.
_WRITTEN_OUT = 1 << 25


def _rows_to_make(chain_of_bands: bool, K: int) -> int:
    """Of a product of symmetric bands half of the rows are the others, turned by half a turn: see `_all_rows`."""
    return (K + 1) // 2 if chain_of_bands else K


def _all_rows(made: Tensor) -> Tensor:
    """(..., K, K) of the rows (..., `_rows_to_make`, K) of a product."""
    K = made.shape[-1]
    return made if made.shape[-2] == K else torch.cat([made, made[..., : K // 2, :].flip(-2, -1)], dim=-2)


def products_ahead(steps: Tensor, diagonal: Tensor | None, stride: int) -> tuple[Tensor, Tensor]:
    """cumulative and blocks (T // stride, K, K) of the reference, all blocks at once and then one after another."""
    K, n = steps.shape[-1], steps.shape[0] // stride
    made = _rows_to_make(diagonal is not None, K)

    def step(i: int) -> Tensor:
        at = slice(i, n * stride, stride)
        return step_matrix(steps[at], None if diagonal is None else diagonal[at])

    blocks = step(0)
    if stride > 1:
        blocks = blocks[:, :made]
        for i in range(1, stride):
            blocks = blocks @ step(i)
        blocks = _all_rows(blocks)
    cumulative = blocks.clone()
    for i in range(1, n):
        cumulative[i] = _all_rows(cumulative[i - 1, :made] @ blocks[i])
    return cumulative, blocks


def factors(s: int, t: int, stride: int, from_data: bool) -> Iterator[tuple[str, int]]:
    """The factors of Q_{s+1} ... Q_t in order: ("cumulative", i), ("blocks", i) or ("steps", i), rows of the tables."""
    level = s
    if from_data and t >= stride:
        yield "cumulative", t // stride - 1
        level = t - t % stride
    while level < t:
        if level % stride == 0 and level + stride <= t:
            yield "blocks", level // stride
            level += stride
        else:
            yield "steps", level
            level += 1


def chain_matrices(
    pairs: Iterable[tuple[int, int]], chain: Chain, from_data: bool, multiply: Multiply = torch.matmul
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Each pair (s, t) with its Q_{s+1} ... Q_t (K, K).

    A product whose factors begin with all of another's goes on from it.
    """
    K = chain.steps.shape[-1]
    made = _rows_to_make(chain.diagonal is not None, K)
    done: list[tuple[str, int]] = []
    product = torch.empty(0)
    for path, pair in sorted((list(factors(*pair, chain.stride, from_data)), pair) for pair in set(pairs)):
        if len(path) < 2:
            yield pair, chain.matrix(*path[0]) if path else torch.eye(K, dtype=chain.steps.dtype)
            continue
        if not done or path[: len(done)] != done:
            done, product = path[:1], chain.matrix(*path[0])[:made]
        for factor in path[len(done) :]:
            product = multiply(product, chain.matrix(*factor))
        done = path
        yield pair, _all_rows(product)


def by_samples(
    rows: Tensor,
    s: Tensor | None,
    t: Tensor,
    chain: Chain,
    transpose: bool,
    span: int,
    multiply: Multiply = torch.matmul,
) -> Tensor:
    """`transition_matmul` of the reference; samples of the same levels share their products. Reads s and t."""
    K, dtype = chain.steps.shape[-1], chain.steps.dtype
    codes = rows.dtype == torch.int64
    out = chain.steps.new_empty(*rows.shape[:2], K)
    levels = list(zip([0] * t.shape[0] if s is None else s.tolist(), t.tolist(), strict=True))
    if codes and 2 * rows.shape[1] >= K:
        # As many rows as the matrix has: they are picked from it.
        for pair, matrix in chain_matrices(levels, chain, s is None, multiply):
            matrix = matrix.T if transpose else matrix
            for b, other in enumerate(levels):
                if other == pair:
                    torch.index_select(matrix, 0, rows[b], out=out[b])
        return out
    for pair in dict.fromkeys(levels):
        members = [b for b, other in enumerate(levels) if other == pair]
        product = rows if len(members) == len(levels) else rows[members]
        path = list(factors(*pair, chain.stride, s is None))
        for i, factor in enumerate(path[::-1] if transpose else path):
            matrix = chain.matrix(*factor)
            matrix = matrix.T if transpose else matrix
            # The first factor of a one-hot is a row of it.
            product = matrix[product] if codes and i == 0 else multiply(product.to(dtype), matrix)
        out[members] = one_hot(product, K).to(dtype) if codes and not path else product.to(dtype)
    return out


def _slots(s: Tensor | None, t: Tensor, T: int, stride: int, span: int) -> list[tuple[str, Tensor]]:
    """`factors` of every sample at once: (table, (B,) index, -1 where a sample skips it), as many for any levels."""
    n, none = T // stride, torch.full_like(t, -1)
    if s is None:
        slots = [("cumulative", t // stride - 1)] if n else []
        base = t - t % stride
        return slots + [("steps", torch.where(base + i < t, base + i, none)) for i in range(min(stride - 1, T))]
    if 0 < span <= 2 * stride:
        return [("steps", s + i) for i in range(span)]
    first, last = (s + stride - 1) // stride * stride, t - t % stride  # the blocks between
    head = torch.minimum(first, t)
    slots = [("steps", torch.where(s + i < head, s + i, none)) for i in range(min(stride - 1, T))]
    for j in range(min(span // stride, n) if span else n):
        block = first // stride + j
        slots.append(("blocks", torch.where((block + 1) * stride <= t, block, none)))
    tail = torch.maximum(last, head)
    return slots + [("steps", torch.where(tail + i < t, tail + i, none)) for i in range(min(stride - 1, T))]


@on_chain
def by_batches(rows: Tensor, s: Tensor | None, t: Tensor, chain: Chain, transpose: bool, span: int) -> Tensor:
    """`transition_matmul` of the reference without a look at s or t: every sample goes through as many products."""
    (T, K), dtype = chain.steps.shape[:2], chain.steps.dtype
    product = (one_hot(rows, K) if rows.dtype == torch.int64 else rows).to(dtype)
    chunk = max(_WRITTEN_OUT // (K * K), 1)
    slots = _slots(s, t.clamp(0, T), T, chain.stride, span)
    for table, index in reversed(slots) if transpose else slots:
        some = index.clamp(min=0)
        parts = []
        for rows_here, here, skipped in zip(
            product.split(chunk), some.split(chunk), (index < 0).split(chunk), strict=True
        ):
            matrix = chain.matrix(table, here)
            parts.append(
                torch.where(skipped[:, None, None], rows_here, rows_here @ (matrix.mT if transpose else matrix))
            )
        product = torch.cat(parts)
    return product
