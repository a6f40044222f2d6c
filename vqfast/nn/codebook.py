"""Upkeep of codebooks on the device: moving averages, revival of dead codes, k-means and how it starts.

Nothing here reads a value back to the host or has a shape that depends on one, so all of it can be captured in a CUDA
graph. With torch.distributed started, `sync` makes the vectors of all processes count as one batch, and every process
comes to the same bits: what it needs from the others is summed in packed buffers, nothing is broadcast.

Codebooks may come stacked: where a shape begins with (..., K), leading dimensions are independent codebooks.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vqfast.ops import codebook_stats, nearest_code
from vqfast.ops.reduction import ordered_sum

STARTS = ("afkmc2", "random")


def process_count(sync: bool = True) -> int:
    """Number of processes whose vectors count as one batch."""
    return dist.get_world_size() if sync and dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(values: Tensor, sync: bool = True) -> Tensor:
    """Sum of `values` over processes, in place: one all-reduce, none in a process alone."""
    if process_count(sync) > 1:
        dist.all_reduce(values)
    return values


# ---- moving averages -------------------------------------------------------------------------------------------------


def packed_stats(
    vectors: Tensor, indices: Tensor, codebook_size: int, *, weights: Tensor | None = None, sync: bool = True
) -> Tensor:
    """For each code the weight that fell on it and the weighted sum of its vectors, over all processes.

    Args:
        vectors: (..., D).
        indices: (...) int64, -1 for a vector that counts for none.
        codebook_size: K.
        weights: (...) float weight of each vector, default 1.

    Returns:
        (K, 1 + D), the weights first; dtype of vectors, at least float32.
    """
    counts, sums = codebook_stats(vectors, indices, codebook_size, weights=weights)
    return sum_over_processes(torch.cat([counts[:, None], sums], dim=1), sync)


def averaged_codes(cluster_size: Tensor, embed_avg: Tensor, eps: float, *, cosine: bool = False) -> Tensor:
    """Codes of the moving averages, counts by Laplace smoothing (van den Oord et al. 2017, appendix A.1).

    Args:
        cluster_size: (..., K) average count of each code.
        embed_avg: (..., K, D) average sum of its vectors.
        eps: of the smoothing.
        cosine: scale the codes to unit length.

    Returns:
        (..., K, D).
    """
    total = cluster_size.sum(-1, keepdim=True)
    smoothed = (cluster_size + eps) / (total + cluster_size.shape[-1] * eps) * total
    codes = embed_avg / smoothed[..., None]
    return F.normalize(codes, dim=-1) if cosine else codes


# ---- revival of dead codes -------------------------------------------------------------------------------------------


def random_vectors(
    vectors: Tensor,
    count: int,
    *,
    mask: Tensor | None = None,
    sync: bool = True,
    turn: tuple[int, int] = (0, 1),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Different vectors drawn at random, each with a 1 after it; zeros in the places that no vector is left for, or for
    which one was drawn that is not finite.

    Batches take turns, those of all processes and of all passes before one step: summed over them, every place holds
    one vector of one batch. The sum is left to the caller, who has more to send.

    Args:
        vectors: (..., N, D).
        count: number of places.
        mask: (..., N) bool, which vectors may be drawn.
        turn: which pass this is (0, 1, ...), of how many.
        generator: of the draw, on the device of vectors.

    Returns:
        (..., count, D + 1).
    """
    shape, given = vectors.shape[:-1], min(count, vectors.shape[-2])
    # Not torch.rand, which takes no generator, not even None, where a traced shape is symbolic.
    chance = torch.empty(shape, device=vectors.device).uniform_(generator=generator)
    if mask is not None:
        chance = torch.where(mask, chance, 2.0)
    chance, chosen = chance.topk(given, dim=-1, largest=False)
    drawn = torch.take_along_dim(vectors, chosen[..., None], dim=-2)
    offered = ((chance < 2) & drawn.sum(-1).isfinite()).to(vectors.dtype)[..., None]
    # A vector that does not count may hold anything: zero times that is not always zero.
    drawn = F.pad(torch.cat([torch.where(offered > 0, drawn, 0), offered], dim=-1), (0, 0, 0, count - given))
    processes = process_count(sync)
    batches, batch = turn[1] * processes, turn[0] * processes + (dist.get_rank() if processes > 1 else 0)
    if batches > 1:
        own = torch.arange(count, device=vectors.device) % batches == batch
        drawn = torch.where(own[:, None], drawn, 0)
    return drawn


def revived(dead: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Give each dead code a candidate of its own, as far as they go.

    Args:
        dead: (..., K) bool.
        candidates: (..., K, D + 1), as `random_vectors` returns them, summed over processes.

    Returns:
        which codes are replaced (..., K) bool, and by what (..., K, D).
    """
    place = (dead.cumsum(-1) - 1).clamp(min=0)
    own = torch.take_along_dim(candidates, place[..., None], dim=-2)
    return dead & (own[..., -1] > 0), own[..., :-1]


# ---- k-means ---------------------------------------------------------------------------------------------------------


class KMeans(NamedTuple):
    """What `kmeans` returns.

    centres: (K, D) in the dtype of the vectors, at least float32.
    counts: (K,) the weight that fell on each centre in the last assignment.
    """

    centres: Tensor
    counts: Tensor


def kmeans(
    vectors: Tensor,
    codebook_size: int,
    *,
    start: str | Tensor = "afkmc2",
    iters: int = 10,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    cosine: bool = False,
    chain_length: int = 200,
    sync: bool = True,
    generator: torch.Generator | None = None,
) -> KMeans:
    """Lloyd's algorithm with the exact search and ordered sums: the same generator, the same bits.

    A cluster that loses all its vectors keeps its centre. Memory is O(N + K D) beyond the vectors.

    Args:
        vectors: (N, D) float, N >= 1.
        codebook_size: K.
        start: "afkmc2", "random" (different vectors; some twice where there are fewer than K) or centres (K, D).
        iters: iterations; 0 returns the start, with counts of 0.
        mask: (N,) bool, which vectors count.
        weights: (N,) float weight of each vector, at least 0.
        cosine: spherical k-means: vectors and centres are scaled to unit length.
        chain_length: of AFK-MC2.
        sync: the vectors of all processes count as one set.
        generator: of the start, on the device of vectors.

    Raises:
        TypeError: vectors that are not float.
        ValueError: a size out of range, shapes that do not fit, an unknown start, no vectors for a random start.
    """
    rows, weights = _rows_and_weights(vectors, mask, weights, cosine)
    if codebook_size < 1:
        raise ValueError(f"codebook_size: expected at least 1, got {codebook_size}")
    if iters < 0:
        raise ValueError(f"iters: expected at least 0, got {iters}")
    if isinstance(start, Tensor):
        if start.shape != (codebook_size, rows.shape[1]):
            raise ValueError(
                f"start: expected centres of shape {(codebook_size, rows.shape[1])}, got {tuple(start.shape)}"
            )
        centres = F.normalize(start.to(rows), dim=-1) if cosine else start.to(rows)
    elif start == "afkmc2":
        centres = afkmc2(rows, codebook_size, chain_length, weights=weights, sync=sync, generator=generator)
    elif start == "random":
        centres = _random_start(rows, codebook_size, weights, sync, generator)
    else:
        raise ValueError(f"start: expected one of {', '.join(STARTS)} or centres (K, D), got {start!r}")
    counts = rows.new_zeros(codebook_size)
    for _ in range(iters):
        stats = packed_stats(rows, nearest_code(rows, centres), codebook_size, weights=weights, sync=sync).to(rows)
        counts = stats[:, 0]
        held = counts > 0
        moved = stats[:, 1:] / torch.where(held, counts, 1)[:, None]
        if cosine:
            moved = F.normalize(moved, dim=-1)
        centres = torch.where(held[:, None], moved, centres)
    return KMeans(centres, counts)


def afkmc2(
    vectors: Tensor,
    codebook_size: int,
    chain_length: int = 200,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    sync: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """AFK-MC2, an approximate k-means++ start without a pass over the vectors per centre (Bachem et al. 2016).

    The first centre c is drawn evenly; each other is where a Markov chain of `chain_length` vectors ends, proposed
    with q(x) = d(x, c)^2 / (2 sum d^2) + 1 / (2 N) and accepted by d(x, centres so far)^2 / q(x) (algorithm 1 of
    'Fast and Provably Good Seedings for k-Means'). Vectors of weight w count w times in all three. Work is one pass
    over the vectors and O(chain_length K^2 D); memory is O(N) beyond the vectors. Across processes the chains take
    turns: centre i is one of process i mod P, whose chain sees its own vectors and all centres.

    Args:
        vectors: (N, D) float, N >= 1.
        codebook_size: K.
        chain_length: vectors a chain goes through.
        mask: (N,) bool, which vectors count.
        weights: (N,) float weight of each vector, at least 0.
        sync: the vectors of all processes count as one set.
        generator: of the draws, on the device of vectors.

    Returns:
        (K, D) vectors, in their dtype, at least float32. Some come twice where fewer than K differ.

    Raises:
        TypeError: vectors that are not float.
        ValueError: a size out of range, shapes that do not fit.
    """
    rows, weights = _rows_and_weights(vectors, mask, weights)
    for name, value in (("codebook_size", codebook_size), ("chain_length", chain_length)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if len(rows) == 0:
        raise ValueError("vectors: expected at least one, got none")
    weight = torch.ones(len(rows), device=rows.device) if weights is None else weights
    weight = weight.double() / ordered_sum(weight.double()).clamp(min=torch.finfo(torch.float64).tiny)
    centres = rows.new_empty(codebook_size, rows.shape[1])
    # An index of one element, not a scalar: indexing with a scalar tensor reads it on the host.
    centres[:1] = _from_process(rows[_draw(_masses(weight), 1, generator)], 0, sync)

    # cdist without a product: neither an N x D difference nor the cancellation of the expanded square.
    far = torch.cdist(rows, centres[:1], compute_mode="donot_use_mm_for_euclid_dist")[:, 0].double().square() * weight
    masses = _masses(far / ordered_sum(far).clamp(min=torch.finfo(torch.float64).tiny) + weight)
    for i in range(1, codebook_size):
        proposed = _draw(masses, chain_length, generator)
        candidates, so_far = rows[proposed], centres[:i]
        distance = (candidates - so_far[nearest_code(candidates, so_far)]).double().square().sum(-1)
        ratio = distance * weight[proposed] / masses[proposed].clamp(min=1)
        centres[i : i + 1] = _from_process(candidates[_end_of_chain(ratio, generator)], i, sync)
    return centres


def _rows_and_weights(
    vectors: Tensor, mask: Tensor | None, weights: Tensor | None, cosine: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Vectors of at least float32 and one weight for each, 0 (and a vector of 0) where masked; None for all ones."""
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
        raise TypeError(f"vectors: expected a float tensor (N, D), got {getattr(vectors, 'dtype', type(vectors))}")
    if vectors.ndim != 2:
        raise ValueError(f"vectors: expected shape (N, D), got {tuple(vectors.shape)}")
    for name, value in (("mask", mask), ("weights", weights)):
        if value is not None and value.shape != vectors.shape[:1]:
            raise ValueError(f"{name}: expected shape {tuple(vectors.shape[:1])}, got {tuple(value.shape)}")
    rows = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    if cosine:
        rows = F.normalize(rows, dim=-1)
    if mask is not None:
        rows = torch.where(mask[:, None], rows, 0)
        weights = mask.to(rows.dtype) if weights is None else torch.where(mask, weights, 0)
    return rows, weights


def _random_start(
    rows: Tensor, codebook_size: int, weights: Tensor | None, sync: bool, generator: torch.Generator | None
) -> Tensor:
    if len(rows) == 0 and process_count(sync) == 1:
        raise ValueError("vectors: expected at least one, got none")
    counted = None if weights is None else weights > 0
    drawn = random_vectors(rows, codebook_size, mask=counted, sync=sync, generator=generator)
    drawn = sum_over_processes(drawn, sync)
    # Places that got no vector repeat those that did, in their order.
    given = drawn[:, -1] > 0
    order = given.argsort(descending=True, stable=True)
    again = torch.arange(codebook_size, device=rows.device) % given.sum().clamp(min=1)
    return drawn[order[again], :-1]


def _from_process(vector: Tensor, turn: int, sync: bool) -> Tensor:
    """That vector of the process whose turn it is, on every process."""
    processes = process_count(sync)
    if processes == 1:
        return vector
    return sum_over_processes(vector.clone() if turn % processes == dist.get_rank() else torch.zeros_like(vector))


def _masses(share: Tensor) -> Tensor:
    """Running sums can be exact, whatever the order they are taken in, of whole numbers only: share (N,) in 2^-50."""
    return (share * 2.0**50).to(torch.int64)


def _draw(masses: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Indices (count,) drawn in proportion to masses (N,)."""
    upto = masses.cumsum(0)
    point = torch.rand(count, dtype=torch.float64, device=masses.device, generator=generator) * upto[-1]
    return torch.searchsorted(upto, point.to(torch.int64), right=True).clamp(max=len(masses) - 1)


def _end_of_chain(ratio: Tensor, generator: torch.Generator | None) -> Tensor:
    """Where a Metropolis-Hastings chain of independent proposals ends; ratio (m,) of target to proposal. (1,) int64.

    Whether t is accepted depends on where the chain stands, so for every s the first t > s that would be accepted from
    there is found at once, and log2(m) doublings of that jump lead from 0 to the end.
    """
    length = len(ratio)
    step = torch.arange(length, device=ratio.device)
    chance = torch.rand(length, dtype=ratio.dtype, device=ratio.device, generator=generator)
    accepted = (step > step[:, None]) & (ratio > chance * ratio[:, None])
    jump = torch.where(accepted, step, length).amin(1)
    jump = torch.where(jump < length, jump, step)
    for _ in range((length - 1).bit_length()):
        jump = jump[jump]
    return jump[:1]
