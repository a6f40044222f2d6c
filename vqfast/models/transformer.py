"""A transformer denoiser: adaptive layer norm on noise level and class, rotary positions on the grid."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.models.conditioning import ClassEmbedding, as_grid, check_labels, level_features

# Longest wavelength of positions, over 2 pi: grids have tens of cells a side, not a text's thousands.
_POSITION_SCALE = 100.0


def grid_angles(h: int, w: int, frequencies: int, device: torch.device) -> Tensor:
    """(h * w, 2 * frequencies) float32: row times each frequency, then column times each."""
    rate = _POSITION_SCALE ** -(torch.arange(frequencies, device=device) / frequencies)
    rows = torch.arange(h, device=device)[:, None, None] * rate
    columns = torch.arange(w, device=device)[None, :, None] * rate
    shape = (h, w, frequencies)
    return torch.cat([rows.expand(shape), columns.expand(shape)], dim=-1).reshape(h * w, -1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021): x (B, heads, L, D), its D / 2 planes turned by angles (L, D / 2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Block(nn.Module):
    """Attention and MLP, each normed, shifted, scaled and gated by the condition.

    adaLN-Zero (Peebles and Xie 2023, DiT): the gates start at 0, so that the block starts as the identity.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * dim, dim)
        )
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def _attend(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, head_dim)
        attended = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        return self.out(attended.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, condition: Tensor, angles: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self._attend(self.norm(x) * (1 + scale1) + shift1, angles)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class Transformer(nn.Module):
    """Bidirectional transformer over codes: codes and noise level to logits of the clean codes.

    Positions are fixed functions of row and column (added to the embedding, and rotary in attention), so a
    trained model takes any grid. The head starts at 0: before training, every code is as likely.

    Args:
        codebook_size: K.
        grid: (H, W) of codes given as (B, L).
        T: number of noise levels.
        dim: width; a multiple of 4 * heads.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of the MLP relative to `dim`.
        mask_state: whether x_t has a state K, for masked codes, which is embedded and never predicted.
        num_classes: None for an unconditional model.
        class_dropout: share of labels dropped in training, for classifier-free guidance.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        codebook_size: int,
        *,
        grid: tuple[int, int] = (16, 16),
        T: int = 4000,
        dim: int = 512,
        depth: int = 12,
        heads: int = 8,
        mlp_ratio: int = 4,
        mask_state: bool = False,
        num_classes: int | None = None,
        class_dropout: float = 0.0,
    ):
        super().__init__()
        for name, value in (("heads", heads), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if dim < 1 or dim % (4 * heads):
            raise ValueError(f"dim: expected a multiple of 4 * heads = {4 * heads} (rows and columns), got {dim}")
        if depth < 1:
            raise ValueError(f"depth: expected at least 1, got {depth}")
        self.codebook_size = codebook_size
        self.grid = (grid[0], grid[1])
        self.T = T
        self.dim = dim
        self.heads = heads
        self.embedding = nn.Embedding(codebook_size + mask_state, dim)
        self.time_mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.classes = None if num_classes is None else ClassEmbedding(num_classes, dim, class_dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, codebook_size)
        for layer in (self.modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of the clean codes.

        Args:
            x_t: (B, L) int64 codes on `grid`, or (B, H, W) of any size.
            t: (B,) int64 noise levels in 1..T.
            labels: (B,) int64 classes, -1 or None for no class.

        Returns:
            (B, L, K), contiguous.

        Raises:
            TypeError, ValueError: codes or labels other than these.
        """
        codes = as_grid(x_t, self.grid)
        B, H, W = codes.shape
        dtype = self.head.weight.dtype
        condition = self.time_mlp(level_features(t, self.T, self.dim).to(dtype))
        if self.classes is not None:
            condition = condition + self.classes(labels, B)
        elif labels is not None:
            check_labels(labels, B, None)
        condition = F.silu(condition)

        position = grid_angles(H, W, self.dim // 4, codes.device)
        x = self.embedding(codes.flatten(1)) + torch.cat([position.sin(), position.cos()], dim=-1).to(dtype)
        rotary = grid_angles(H, W, self.dim // (4 * self.heads), codes.device)
        for block in self.blocks:
            x = block(x, condition, rotary)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.head(self.norm(x) * (1 + scale) + shift)
