"""Uniform forward process in Triton: one thread a token, integer arithmetic and one float64 comparison."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.philox_triton import below, philox, uniform

_BLOCK = 512


@triton.jit(do_not_specialize=["tokens", "L", "T", "K"])
def _q_sample_kernel(x0_ptr, t_ptr, alpha_bar_ptr, key_ptr, out_ptr, tokens, L, T, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < tokens
    t = tl.load(t_ptr + row // L, mask=inside, other=0)
    alpha_bar = tl.load(alpha_bar_ptr + tl.minimum(tl.maximum(t, 0), T), mask=inside, other=1.0)
    stay, code = philox(key_ptr, row, 0)
    x0 = tl.load(x0_ptr + row, mask=inside, other=0)
    tl.store(out_ptr + row, tl.where(uniform(stay) < alpha_bar, x0, below(code, K)), mask=inside)


def uniform_q_sample(x0: Tensor, t: Tensor, alpha_bar: Tensor, codebook_size: int, key: Tensor) -> Tensor:
    x0 = x0.contiguous()
    out = torch.empty_like(x0)
    tokens = x0.numel()
    if tokens:
        _q_sample_kernel[(triton.cdiv(tokens, _BLOCK),)](
            x0,
            t.contiguous(),
            alpha_bar.contiguous(),
            key.contiguous(),
            out,
            tokens,
            x0.shape[1],
            alpha_bar.shape[0] - 1,
            codebook_size,
            BLOCK=_BLOCK,
        )
    return out
