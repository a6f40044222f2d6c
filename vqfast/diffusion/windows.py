"""Grids larger than the one that a denoiser was trained on, by windows that overlap."""

from torch import Tensor

from vqfast.diffusion.sampler import Denoiser


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover 0..size-1, the last flush with the end."""
    starts = list(range(0, size - window + 1, stride))
    return starts if starts[-1] == size - window else [*starts, size - window]


class WindowedDenoiser:
    """A denoiser of a larger grid: each token's prediction is the mixture of those of the windows that hold it.

    Unleashing Transformers (Bond-Taylor et al. 2022), section 4.3: probabilities are averaged. With `known` of `sample`
    this is outpainting.

    Args:
        denoiser: of codes (B, h * w) of one window.
        grid: (H, W), the larger grid, read row by row.
        window: (h, w), at most the grid.
        stride: rows and columns between windows, 1..window; default half a window.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        grid: tuple[int, int],
        window: tuple[int, int],
        stride: tuple[int, int] | None = None,
    ):
        if any(w < 1 or w > g for w, g in zip(window, grid, strict=True)):
            raise ValueError(f"window: expected sizes in 1..grid {tuple(grid)}, got {tuple(window)}")
        stride = tuple(max(w // 2, 1) for w in window) if stride is None else stride
        if any(s < 1 or s > w for s, w in zip(stride, window, strict=True)):
            raise ValueError(f"stride: expected steps in 1..window {tuple(window)}, got {tuple(stride)}")
        self.denoiser, self.grid, self.window = denoiser, tuple(grid), tuple(window)
        self.corners = [
            (top, left)
            for top in window_starts(grid[0], window[0], stride[0])
            for left in window_starts(grid[1], window[1], stride[1])
        ]

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log-probabilities of the clean codes, (B, H * W, K), from codes x_t (B, H * W) at levels t (B,)."""
        (H, W), (h, w) = self.grid, self.window
        if x_t.ndim != 2 or x_t.shape[1] != H * W:
            raise ValueError(f"x_t: expected (B, {H * W}) for the grid {H} x {W}, got {tuple(x_t.shape)}")
        codes = x_t.unflatten(1, (H, W))
        total, count = None, codes.new_zeros(1, H, W, 1)
        for top, left in self.corners:
            here = slice(None), slice(top, top + h), slice(left, left + w)
            p = self.denoiser(codes[here].flatten(1), t, labels).float().softmax(-1).unflatten(1, (h, w))
            total = p.new_zeros(*codes.shape, p.shape[-1]) if total is None else total
            total[here] += p
            count[here] += 1
        return (total / count).log().flatten(1, 2)
