"""What a transition family does to a token in a step, in Triton: shared by the ops that draw and by the loss.

The names are those of `reference.Step`; numbers are float64 scalars. README.md derives the formulas.
"""

import triton
import triton.language as tl

from vqfast.kernels.philox_triton import below, uniform


@triton.jit
def log1p(y):
    """log(1 + y) for y > -1 to full relative precision: the rounding of 1 + y is put back to first order."""
    w = 1 + y
    return tl.log(w) + (y - (w - 1)) / w


@triton.jit
def shares(levels_ptr, level, T, inside, MASKED: tl.constexpr):
    """Of a clean token at `level`, brought into 0..T: still itself, replaced, in the mask state. One level or many."""
    level = tl.minimum(tl.maximum(level, 0), T)
    if MASKED:
        kept = tl.load(levels_ptr + 2 * level, mask=inside, other=1.0)
        masked = tl.load(levels_ptr + 2 * level + 1, mask=inside, other=0.0)
    else:
        kept = tl.load(levels_ptr + level, mask=inside, other=1.0)
        masked = kept * 0
    return kept, tl.maximum((1 - kept) - masked, 0.0), masked


@triton.jit
def noise_of(noise_ptr, code, K):
    """Probability of a code in the noise; noise_ptr: None for 1 / K each."""
    if noise_ptr is None:
        return 1 / K.to(tl.float64)
    else:
        return tl.load(noise_ptr + code)


@triton.jit
def noise_code(cumulative_ptr, bits, K):
    """A code of the noise from 64 random bits: the first whose cumulative probability exceeds the uniform number."""
    if cumulative_ptr is None:
        return below(bits, K)
    else:
        mark = uniform(bits)
        step = 1
        while step < K:
            step *= 2
        # Bisection: `first` codes or more have a cumulative probability of at most the mark.
        first = below(bits, K) * 0
        while step > 0:
            beyond = first + step
            inside = beyond < K
            cumulative = tl.load(cumulative_ptr + beyond - 1, mask=inside, other=2.0)
            first = tl.where(cumulative <= mark, beyond, first)
            step //= 2
        return first


@triton.jit
def noised(part, code, x0, kept, replaced, masked, K):
    """A clean token at a level of the chain with these shares: kept, `code` or the mask, as the number `part` says."""
    gone = (masked > 0) & (part >= kept + replaced)
    return tl.where(part < kept, x0, tl.where(gone, K.to(tl.int64), code))


@triton.jit
def step_of(levels_ptr, noise_ptr, T, t, s, x_t, K, MASKED: tl.constexpr, MARGINAL: tl.constexpr):
    """signal, spread, stay, move, flip, shift, masked, certain; the noise at s is spread * noise_of."""
    alpha_t, rho_t, gamma_t = shares(levels_ptr, t, T, True, MASKED)
    alpha_s, rho_s, gamma_s = shares(levels_ptr, s, T, True, MASKED)
    kept = alpha_s + rho_s
    a = alpha_t / alpha_s
    masked = x_t >= K
    m = noise_of(noise_ptr, tl.minimum(x_t, K - 1), K)
    move = tl.where(masked, 1.0, tl.maximum((alpha_t + rho_t) / kept - a, 0.0) * m)
    certain = move == 0
    flip = tl.where(masked & (gamma_t > 0), (gamma_t - gamma_s) / tl.where(gamma_t > 0, gamma_t, 1.0), 1.0)
    shift = alpha_t * 0
    if MARGINAL:
        plain = masked | certain
        shift = tl.where(plain, 0.0, log1p(alpha_t / tl.where(plain, 1.0, rho_t * m)))
    return alpha_s / kept, rho_s / kept, tl.where(masked, 0.0, a), move, flip, shift, masked, certain
