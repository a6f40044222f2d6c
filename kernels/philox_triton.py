"""Philox 4x32-10 in Triton: the same bits as vqfast.kernels.philox."""

import triton
import triton.language as tl


@triton.jit
def philox(key_ptr, rows, draw: tl.constexpr):
    """Two 64-bit random integers (uint64) for each of the int64 counters `rows`; key_ptr: (2,) int64."""
    key0, key1 = tl.load(key_ptr), tl.load(key_ptr + 1)
    k0, k1 = key0.to(tl.uint32), (key0 >> 32).to(tl.uint32)
    c0, c1 = rows.to(tl.uint32), (rows >> 32).to(tl.uint32)
    c2, c3 = c0 * 0 + draw, c0 * 0 + key1.to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        high0, high1 = (product0 >> 32).to(tl.uint32), (product1 >> 32).to(tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1.to(tl.uint32), high0 ^ c3 ^ k1, product0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    first = c0.to(tl.uint64) | (c1.to(tl.uint64) << 32)
    second = c2.to(tl.uint64) | (c3.to(tl.uint64) << 32)
    return first, second


@triton.jit
def uniform(bits):
    """Float64 in [0, 1) from the top 53 of 64 random bits."""
    return (bits >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def below(bits, bound):
    """int64 in [0, bound) from 64 random bits: the high word of bits * bound, for bound < 2**31."""
    bound = bound.to(tl.uint64)
    high, low = bits >> 32, bits & 0xFFFFFFFF
    return ((high * bound + ((low * bound) >> 32)) >> 32).to(tl.int64)
