"""Causal self-attention of autoregressive transformers: over whole sequences, packed ones, or a cache of keys."""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

# Those before have another signature.
_VARLEN = varlen_attn is not None and {"window_size", "num_splits"} <= inspect.signature(varlen_attn).parameters.keys()

# How queries, keys and values, each (..., heads, head_dim), become the attended values of the same shape.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each token attends to itself and to those before it: (..., L, heads, head_dim), shape kept."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2)


class PackedAttention:
    """Causal attention within each of several sequences laid end to end, none seeing another.

    float16 and bfloat16 on CUDA go to torch's variable-length kernel, told not to split keys, so that the bits of a
    sequence do not depend on its batch. Everything else is laid out (B, max_length): the padding comes after a
    sequence's last token, where causal attention never looks.

    Args:
        cu_seqlens: (B + 1,) int32, where each sequence starts in the packed tokens; the last is their number.
        max_length: at least the length of the longest sequence.
    """

    def __init__(self, cu_seqlens: Tensor, max_length: int):
        self.cu_seqlens, self.max_length = cu_seqlens, max_length

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (T, heads, head_dim), T = cu_seqlens[-1]; the same shape back."""
        cu, longest = self.cu_seqlens, self.max_length
        if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and _VARLEN:
            return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), num_splits=1)
        token = torch.arange(len(q), device=q.device, dtype=cu.dtype)
        sequence = torch.searchsorted(cu[1:].contiguous(), token, right=True)
        place = (sequence, token - cu[sequence])
        padded = [x.new_zeros(len(cu) - 1, longest, *x.shape[1:]).index_put(place, x) for x in (q, k, v)]
        return attend_causal(*padded)[place]


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)) with GELU: the pre-norm block of GPT-2 (Radford et al. 2019).

    Dropout is on what attention and MLP add, not on attention weights: variable-length kernels have none.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, mlp_ratio: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (..., heads, head_dim)
        x = x + self.dropout(self.out(attend(q, k, v).flatten(-2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class KVCache:
    """Keys and values of the tokens that a stack has seen, for a batch whose sequences grow together.

    Memory: 2 * depth * batch * capacity * dim values, allocated once.

    Args:
        stack: whose tokens to keep.
        batch: number of sequences.
        capacity: most tokens of a sequence.
    """

    def __init__(self, stack: "CausalTransformer", batch: int, capacity: int):
        weight = stack.blocks[0].qkv.weight
        shape = (len(stack.blocks), batch, stack.heads, capacity, stack.dim // stack.heads)
        self.keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def attend(self, layer: int) -> Attend:
        """Attention of the newest token, whose key and value it keeps: q, k, v (B, heads, head_dim)."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[:, :, self.length], values[:, :, self.length] = k, v
            seen = slice(self.length + 1)
            return F.scaled_dot_product_attention(q[:, :, None], keys[:, :, seen], values[:, :, seen])[:, :, 0]

        return attend


class CausalTransformer(nn.Module):
    """A stack of blocks in which no token sees a later one.

    Args:
        dim: width, a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads.
        dropout: see `Block`.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(self, dim: int, depth: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads: expected at least 1, got {heads}")
        if dim < 1 or dim % heads:
            raise ValueError(f"dim: expected a multiple of heads = {heads}, got {dim}")
        if depth < 1:
            raise ValueError(f"depth: expected at least one block, got {depth}")
        self.dim, self.heads = dim, heads
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))

    def forward(self, x: Tensor, attend: Attend = attend_causal) -> Tensor:
        """Whole sequences, (..., L, dim); with `PackedAttention`, (T, dim). The same shape back."""
        for block in self.blocks:
            x = block(x, attend)
        return x

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """The next token of each sequence, (B, dim), after those in the cache, which it joins; (B, dim) back."""
        for layer, block in enumerate(self.blocks):
            x = block(x, cache.attend(layer))
        cache.length += 1
        return x


def init_weights(module: nn.Module) -> None:
    """GPT-2's start, for `Module.apply`: normal weights of deviation 0.02, biases 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
