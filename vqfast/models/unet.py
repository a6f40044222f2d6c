"""VQ-DDM's denoiser: a convolutional U-Net over a grid of codes (arXiv 2112.01799 and its released code)."""

import torch
from torch import Tensor, nn

from vqfast.models.conditioning import ClassEmbedding, as_grid, check_labels, level_features


class ConvBlock(nn.Module):
    """3 x 3 convolution, group norm, Mish."""

    def __init__(self, dim: int, dim_out: int, groups: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = nn.GroupNorm(groups, dim_out)
        self.activation = nn.Mish()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class ResnetBlock(nn.Module):
    """Two convolutions with the noise level added between them, around a shortcut."""

    def __init__(self, dim: int, dim_out: int, dim_time: int, groups: int):
        super().__init__()
        self.time = nn.Sequential(nn.Mish(), nn.Linear(dim_time, dim_out))
        self.block1 = ConvBlock(dim, dim_out, groups)
        self.block2 = ConvBlock(dim_out, dim_out, groups)
        self.shortcut = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.block1(x) + self.time(time)[:, :, None, None]
        return self.block2(h) + self.shortcut(x)


class LinearAttention(nn.Module):
    """x + gate * attention(x), linear in the number of cells; the gate starts at 0.

    Keys are a softmax over cells, queries are left as they are (Shen et al. 2018, Efficient Attention,
    without its softmax of the queries). The gate is ReZero's (Bachlechner et al. 2020).
    """

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(dim, 3 * heads * head_dim, 1, bias=False)
        self.out = nn.Conv2d(heads * head_dim, dim, 1)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)  # (B, heads, head_dim, H * W)
        context = v @ k.softmax(dim=-1).transpose(-1, -2)  # (B, heads, head_dim of v, head_dim of k)
        attended = (context @ q).flatten(1, 2).unflatten(-1, x.shape[2:])
        return x + self.gate * self.out(attended)


class Level(nn.Module):
    """Two residual blocks and attention at one resolution, then `resample` to the next."""

    def __init__(self, dim: int, dim_out: int, dim_time: int, groups: int, heads: int, head_dim: int, resample):
        super().__init__()
        self.res1 = ResnetBlock(dim, dim_out, dim_time, groups)
        self.res2 = ResnetBlock(dim_out, dim_out, dim_time, groups)
        self.attention = LinearAttention(dim_out, heads, head_dim)
        self.resample = resample

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The features at this resolution, and at the next."""
        x = self.attention(self.res2(self.res1(x, time), time))
        return x, self.resample(x)


class UNet(nn.Module):
    """Token U-Net: codes and noise level to logits of the clean codes.

    With the defaults and 1024 codes: 117,586,568 parameters, the published model.

    Args:
        codebook_size: K.
        grid: (H, W) of codes given as (B, L).
        T: number of noise levels.
        dim: width of the first level and of the embeddings; a multiple of `groups`.
        mults: width of each level relative to `dim`; each level after the first halves the grid.
        groups: of the group norms.
        heads, head_dim: of the linear attention.
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
        dim: int = 128,
        mults: tuple[int, ...] = (1, 2, 4, 8),
        groups: int = 8,
        heads: int = 4,
        head_dim: int = 32,
        mask_state: bool = False,
        num_classes: int | None = None,
        class_dropout: float = 0.0,
    ):
        super().__init__()
        if dim % groups or dim % 2 or dim < 4:
            raise ValueError(f"dim: expected an even number, at least 4 and a multiple of groups = {groups}, got {dim}")
        if not mults or min(mults) < 1:
            raise ValueError(f"mults: expected at least one level, of widths of at least 1, got {mults}")
        self.codebook_size = codebook_size
        self.grid = (grid[0], grid[1])
        self.T = T
        self.halvings = len(mults) - 1
        self._check_divisible(*self.grid)

        self.embedding = nn.Embedding(codebook_size + mask_state, dim)
        self.time_mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
        self.classes = None if num_classes is None else ClassEmbedding(num_classes, dim, class_dropout)

        widths = [dim, *(dim * m for m in mults)]
        sizes = (dim, groups, heads, head_dim)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, (narrow, wide) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            last = i == self.halvings
            halve = nn.Identity() if last else nn.Conv2d(wide, wide, 3, stride=2, padding=1)
            self.downs.append(Level(narrow, wide, *sizes, halve))
            if i > 0:  # the first level has no partner on the way up: its features are not concatenated
                double = nn.ConvTranspose2d(narrow, narrow, 4, stride=2, padding=1)
                self.ups.insert(0, Level(2 * wide, narrow, *sizes, double))
        self.mid_res1 = ResnetBlock(widths[-1], widths[-1], dim, groups)
        self.mid_attention = LinearAttention(widths[-1], heads, head_dim)
        self.mid_res2 = ResnetBlock(widths[-1], widths[-1], dim, groups)
        self.out_block = ConvBlock(widths[1], dim, groups)
        self.head = nn.Linear(dim, codebook_size)

    def _check_divisible(self, h: int, w: int) -> None:
        factor = 2**self.halvings
        if h % factor or w % factor or h < 1 or w < 1:
            raise ValueError(f"grid: expected multiples of {factor} for {self.halvings + 1} levels, got {h} x {w}")

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of the clean codes.

        Args:
            x_t: (B, L) int64 codes on `grid`, or (B, H, W) of any size that the levels can halve.
            t: (B,) int64 noise levels in 1..T.
            labels: (B,) int64 classes, -1 or None for no class.

        Returns:
            (B, L, K), contiguous.

        Raises:
            TypeError, ValueError: codes or labels other than these.
        """
        codes = as_grid(x_t, self.grid)
        B, H, W = codes.shape
        self._check_divisible(H, W)
        time = self.time_mlp(level_features(t, self.T, self.embedding.embedding_dim).to(self.head.weight.dtype))
        if self.classes is not None:
            time = time + self.classes(labels, B)
        elif labels is not None:
            check_labels(labels, B, None)

        # (B, dim, H, W) in channels-last memory, which the convolutions keep: the head reads rows of `dim`.
        x = self.embedding(codes).permute(0, 3, 1, 2)
        skips = []
        for level in self.downs:
            skip, x = level(x, time)
            skips.append(skip)
        x = self.mid_res2(self.mid_attention(self.mid_res1(x, time)), time)
        for level in self.ups:
            _, x = level(torch.cat([x, skips.pop()], dim=1), time)
        x = self.out_block(x).permute(0, 2, 3, 1).flatten(1, 2)
        return self.head(x)
