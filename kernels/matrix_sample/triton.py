"""Steps through matrices in Triton: a program takes a tile of rows of one sample from logits to the result.

The tile's posterior is in registers; its prediction is made from the logits, a few codes at a time, wherever a product
asks for it, so that no float64 row but the result of a product is ever held. `kernels/matrix_loss` goes on from here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.fusion_triton import FUSED
from vqfast.kernels.matrix_loss.reference import LEAST_EVIDENCE, rows_of
from vqfast.kernels.philox_triton import philox, uniform

# Rows of a tile: the least that a product takes. Codes of the prediction at a time.
ROWS, CHUNK = 16, 16
_NONE = tl.constexpr(2147483647)


@triton.jit
def scores_of(logits_ptr, other_ptr, rows, reads, k, K, guidance):
    """(ROWS, codes) float64 scores, -inf beyond K, 0 in rows that are not read; other_ptr: unconditional, or None."""
    at = rows[:, None] * K + k[None, :]
    inside = reads[:, None] & (k[None, :] < K)
    beyond = tl.where(k[None, :] < K, 0.0, float("-inf"))
    scores = tl.where(inside, tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float64), beyond)
    if other_ptr is None:
        return scores
    else:
        other = tl.where(inside, tl.load(other_ptr + at, mask=inside, other=0.0).to(tl.float64), beyond)
        impossible = (scores == float("-inf")) | (other == float("-inf"))
        return tl.where(impossible, float("-inf"), other + guidance * (scores - other))


@triton.jit
def log_evidence(evidence_ptr, rows, reads, k, K):
    """What the marginal rule takes off a score, see `evidence`."""
    return tl.load(evidence_ptr + rows[:, None] * K + k[None, :], mask=reads[:, None] & (k[None, :] < K), other=0.0)


@triton.jit
def log_of(x):
    """log x, -inf at 0."""
    return tl.where(x == 0, float("-inf"), tl.log(tl.where(x == 0, 1.0, x)))


@triton.jit
def matrix_rows(matrix_ptr, codes, k, K):
    """Rows `codes` of a (K, K) matrix, 0 beyond K. codes: (n,); k: (m,)."""
    inside = (codes[:, None] < K) & (k[None, :] < K)
    return tl.load(matrix_ptr + codes[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def code_of(codes_ptr, rows, reads, K):
    """An index that is out of range is brought into it: a kernel cannot raise."""
    return tl.minimum(tl.maximum(tl.load(codes_ptr + rows, mask=reads, other=0), 0), K - 1)


@triton.jit
def _in_order(bits):
    """An integer in the order of the floats whose bits it is; its own inverse."""
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


@triton.jit
def _mean(low, high):
    """Rounded up, with no overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _kept(scores, k, least, last):
    """As in kernels/p_sample: of a larger score than `least`, or of that and no later than `last`; NaN is kept."""
    return ((scores < least[:, None]) | ((scores == least[:, None]) & (k[None, :] > last[:, None]))) == 0


@triton.jit
def _last_of(scores, k, K, least, n):
    """(ROWS,): the code of the nth score that equals `least`; _NONE where there are no more than n."""
    ties = (scores == least[:, None]) & (k[None, :] < K)
    rank = tl.cumsum(ties.to(tl.int32), 1)
    nth = tl.min(tl.where(ties & (rank >= n[:, None]), k[None, :], _NONE), 1)
    more = (tl.sum(ties.to(tl.int32), 1) > n) & (least > float("-inf"))
    return tl.where(more, nth, _NONE)


@triton.jit
def _likely(scores, k, K, weights, top_k, top_p, TOP_K: tl.constexpr, TOP_P: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS,) `least` and `last` of the codes that a truncated draw may take, by bisection over the bits of a score.

    scores: at most 0, less their largest; weights their exponentials.
    """
    lowest = _in_order(tl.full((ROWS,), float("-inf"), tl.float64).to(tl.int64, bitcast=True))
    least = tl.full((ROWS,), float("-inf"), tl.float64)
    last = tl.full((ROWS,), _NONE, tl.int32)
    if TOP_K:
        low, high = lowest, tl.zeros((ROWS,), tl.int64)
        for _ in range(64):
            middle = _mean(low, high)
            score = _in_order(middle).to(tl.float64, bitcast=True)
            enough = tl.sum(((scores >= score[:, None]) & (k[None, :] < K)).to(tl.int32), 1) >= top_k
            low = tl.where(enough, middle, low)
            high = tl.where(enough | (middle <= low), high, middle - 1)
        least = _in_order(low).to(tl.float64, bitcast=True)
        above = tl.sum((scores > least[:, None]).to(tl.int32), 1)
        last = _last_of(scores, k, K, least, (top_k - above).to(tl.float64))
    if TOP_P:
        kept = tl.where(_kept(scores, k, least, last), weights, 0.0)
        share = top_p * tl.sum(kept, 1)
        low, high = lowest, tl.zeros((ROWS,), tl.int64)
        for _ in range(64):
            middle = _mean(low, high)
            score = _in_order(middle).to(tl.float64, bitcast=True)
            enough = tl.sum(tl.where(scores >= score[:, None], kept, 0.0), 1) >= share
            low = tl.where(enough, middle, low)
            high = tl.where(enough | (middle <= low), high, middle - 1)
        found = _in_order(low).to(tl.float64, bitcast=True)
        above = tl.sum(tl.where(scores > found[:, None], kept, 0.0), 1)
        n = tl.ceil((share - above) / tl.exp(found))
        last = tl.minimum(tl.where(least == found, last, _NONE), _last_of(scores, k, K, found, n))
        least = found
    return least, last


@triton.jit
def _prediction(logits_ptr, other_ptr, evidence_ptr, rows, reads, k, K, guidance, largest, factor, least, last, top,
                TRUNCATED: tl.constexpr):  # fmt: skip
    """(ROWS, codes): log p(x_0 = k) as the options and the rule have it, up to a number a row."""
    log_p = (scores_of(logits_ptr, other_ptr, rows, reads, k, K, guidance) - largest[:, None]) * factor
    if TRUNCATED:
        log_p = tl.where(_kept(log_p, k, least, last), log_p, float("-inf"))
    if evidence_ptr is not None:
        log_p -= log_evidence(evidence_ptr, rows, reads, k, K)
    return log_p - top[:, None]


@triton.jit(do_not_specialize=["L", "K", "top_k"])
def _matrix_sample_kernel(
    logits_ptr, other_ptr, x_t_ptr, s_ptr, prior_ptr, likelihood_ptr, evidence_ptr, known_ptr, key_ptr, out_ptr,
    L, K, tiles, stride_prior, stride_likelihood,
    factor: tl.float64, guidance: tl.float64, top_k, top_p: tl.float64,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    within = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    reads = within < L
    rows = sample * L + within
    prior_ptr += sample * stride_prior
    likelihood_ptr += sample * stride_likelihood
    at_data = tl.load(s_ptr + sample) <= 0
    k = tl.arange(0, BLOCK)
    guide = tl.full((), guidance, tl.float64)
    by = tl.full((), factor, tl.float64)

    scores = scores_of(logits_ptr, other_ptr, rows, reads, k, K, guide)
    largest = tl.max(scores, 1)
    scores = (scores - largest[:, None]) * by
    least = tl.full((ROWS,), float("-inf"), tl.float64)
    last = tl.full((ROWS,), _NONE, tl.int32)
    if TOP_K or TOP_P:
        least, last = _likely(scores, k, K, tl.exp(scores), top_k, top_p, TOP_K, TOP_P, ROWS)
    top = tl.zeros((ROWS,), tl.float64)
    if evidence_ptr is not None:
        if TOP_K or TOP_P:
            scores = tl.where(_kept(scores, k, least, last), scores, float("-inf"))
        top = tl.max(scores - log_evidence(evidence_ptr, rows, reads, k, K), 1)

    # Made anew, for it would be in registers during the product.
    if at_data:
        log_model = _prediction(
            logits_ptr, other_ptr, evidence_ptr, rows, reads, k, K, guide, largest, by, least, last, top, TOP_K or TOP_P
        )
    else:
        product = tl.zeros((ROWS, BLOCK), tl.float64)
        for start in range(0, K, CHUNK):
            codes = start + tl.arange(0, CHUNK)
            log_p = _prediction(
                logits_ptr, other_ptr, evidence_ptr, rows, reads, codes, K, guide, largest, by, least, last, top,
                TOP_K or TOP_P,
            )  # fmt: skip
            product = tl.dot(tl.exp(log_p), matrix_rows(prior_ptr, codes, k, K), product, out_dtype=tl.float64)
        log_model = log_of(product)
    log_f = log_of(matrix_rows(likelihood_ptr, code_of(x_t_ptr, rows, reads, K), k, K))
    log_weight = log_f + log_model
    weight = tl.exp(log_weight - tl.max(log_weight, 1)[:, None])
    known = tl.full((ROWS,), -1, tl.int64)
    if known_ptr is not None:
        known = tl.minimum(tl.load(known_ptr + rows, mask=reads, other=-1), K - 1)
        given = matrix_rows(prior_ptr, tl.maximum(known, 0), k, K)
        weight = tl.where(known[:, None] >= 0, given, weight)

    bits, _ = philox(key_ptr, rows, 0)
    cumulative = tl.cumsum(weight, 1)
    total = tl.sum(weight, 1)
    target = uniform(bits) * total
    first = tl.min(tl.where((cumulative > target[:, None]) & (weight > 0), k[None, :], _NONE), 1)
    final = tl.max(tl.where(weight > 0, k[None, :], 0), 1)
    x_t = tl.load(x_t_ptr + rows, mask=reads, other=0)
    drawn = tl.where(total > 0, tl.minimum(first, final).to(tl.int64), tl.where(known >= 0, known, x_t))
    tl.store(out_ptr + rows, tl.minimum(tl.maximum(drawn, 0), K - 1), mask=reads)


def strided(matrices: Tensor) -> tuple[Tensor, int]:
    """(B, K, K) as the kernels read it, with the elements from a sample to the next: 0 where one serves all."""
    if matrices.stride(0) == 0:
        return matrices[:1].contiguous(), 0
    return matrices.contiguous(), matrices.shape[1] * matrices.shape[2]


def widened(logits: Tensor) -> Tensor:
    """Contiguous, half precisions as float32: Triton 3.7 fails on float64 products of what was read in 16 bits."""
    return logits.contiguous() if logits.dtype == torch.float64 else logits.to(torch.float32).contiguous()


def evidence(x_t: Tensor, prior: Tensor, likelihood: Tensor) -> Tensor:
    """(B, L, K): log q(x_t | x_0 = k) for every k, infinite where x_t cannot come from k; the BLAS's product."""
    q = rows_of(likelihood, x_t.clamp(0, prior.shape[-1] - 1)) @ prior.mT
    return torch.where(q >= LEAST_EVIDENCE, q.log(), torch.inf).contiguous()


def launch_sizes(K: int) -> dict[str, int]:
    """Compile-time sizes of a tile, and warps: at most 16 numbers of a tile to a thread."""
    block = max(CHUNK, triton.next_power_of_2(K))
    return dict(ROWS=ROWS, CHUNK=CHUNK, BLOCK=block, num_warps=8 if block >= 128 else 4)


def matrix_sample(
    logits: Tensor,
    unconditional: Tensor | None,
    x_t: Tensor,
    s: Tensor,
    prior: Tensor,
    likelihood: Tensor,
    known: Tensor | None,
    marginal: bool,
    temperature: float,
    guidance: float,
    top_k: int,
    top_p: float,
    key: Tensor,
) -> Tensor:
    x_t = x_t.contiguous()
    out = torch.empty_like(x_t)
    if out.numel() == 0:
        return out
    B, L, K = logits.shape
    tiles = triton.cdiv(L, ROWS)
    (prior_rows, stride_prior), (likelihood_rows, stride_likelihood) = strided(prior), strided(likelihood)
    _matrix_sample_kernel[(B * tiles,)](
        widened(logits),
        None if unconditional is None else widened(unconditional),
        x_t,
        s.contiguous(),
        prior_rows,
        likelihood_rows,
        evidence(x_t, prior, likelihood) if marginal else None,
        None if known is None else known.contiguous(),
        key.contiguous(),
        out,
        L,
        K,
        tiles,
        stride_prior,
        stride_likelihood,
        min(1 / temperature, 1.7e308),
        guidance,
        top_k,
        top_p,
        TOP_K=0 < top_k < K,
        TOP_P=top_p < 1,
        **launch_sizes(K),
        **FUSED,
    )
    return out
