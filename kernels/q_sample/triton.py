"""Forward process in Triton: one thread a token, integer arithmetic and float64 comparisons."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.fusion_triton import FUSED
from vqfast.kernels.philox_triton import philox, uniform
from vqfast.kernels.posterior.triton import noise_code, noised, shares

_BLOCK = 512


@triton.jit(do_not_specialize=["tokens", "L", "T", "K"])
def _q_sample_kernel(
    x0_ptr, t_ptr, levels_ptr, cumulative_ptr, key_ptr, out_ptr, tokens, L, T, K,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < tokens
    t = tl.load(t_ptr + row // L, mask=inside, other=0)
    kept, replaced, masked = shares(levels_ptr, t, T, inside, MASKED)
    part, code = philox(key_ptr, row, 0)
    x0 = tl.load(x0_ptr + row, mask=inside, other=0)
    x_t = noised(uniform(part), noise_code(cumulative_ptr, code, K), x0, kept, replaced, masked, K)
    tl.store(out_ptr + row, x_t, mask=inside)


def q_sample(x0: Tensor, t: Tensor, levels: Tensor, noise: Tensor | None, codebook_size: int, key: Tensor) -> Tensor:
    x0 = x0.contiguous()
    out = torch.empty_like(x0)
    tokens = x0.numel()
    if tokens:
        _q_sample_kernel[(triton.cdiv(tokens, _BLOCK),)](
            x0,
            t.contiguous(),
            levels.contiguous(),
            None if noise is None else noise.cumsum(0),
            key.contiguous(),
            out,
            tokens,
            x0.shape[1],
            levels.shape[0] - 1,
            codebook_size,
            MASKED=levels.shape[1] == 2,
            BLOCK=_BLOCK,
            **FUSED,
        )
    return out
