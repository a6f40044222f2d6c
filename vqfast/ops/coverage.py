"""Checks of grain maps and packed sequences that look at every value; errors name the image and the cell."""

from typing import Any

import torch
from torch import Tensor


def _first(bad: Tensor) -> tuple[int, int, int]:
    """Image, row and column of the first True of (B, H, W)."""
    image, y, x = bad.nonzero()[0].tolist()
    return image, y, x


def grains_in_range(grains: Tensor, num_grains: int) -> None:
    """grains (B, Hc, Wc) in 0..num_grains - 1."""
    if grains.numel() == 0:
        return
    smallest, largest = torch.aminmax(grains)
    if int(smallest) >= 0 and int(largest) < num_grains:
        return
    image, y, x = _first((grains < 0) | (grains >= num_grains))
    raise ValueError(
        f"grains: expected values in 0..{num_grains - 1} ({num_grains} grains), "
        f"got {int(grains[image, y, x])} at image {image}, cell ({y}, {x})"
    )


def capacity_holds(values: Any, grains: Tensor, region: bool, capacity: int) -> None:
    """All codes of the images fit."""
    ends = (4**grains).flatten(1).sum(1).cumsum(0)
    if len(ends) == 0 or int(ends[-1]) <= capacity:
        return
    image = int((ends > capacity).nonzero()[0, 0])
    before = int(ends[image - 1]) if image else 0
    # In the order of the sequence: coarse cells first.
    cells = grains[image].flatten()
    by_grain = torch.argsort(cells, stable=True)
    over = before + (4 ** cells[by_grain]).cumsum(0) > capacity
    y, x = divmod(int(by_grain[over.nonzero()[0, 0]]), grains.shape[2])
    raise ValueError(
        f"capacity: expected at least {int(ends[-1])} tokens, got {capacity}; image {image} does not fit, "
        f"from cell ({y}, {x}) on"
    )


def covers_once(
    values: Any,
    cu_seqlens: Tensor,
    positions: Tensor,
    grain_ids: Tensor,
    grains: Tensor,
    num_grains: int,
    replicate: bool,
) -> None:
    """Each code of each image's grain map is there once, and nothing else is."""
    if not replicate:  # the gradient of a packing that may have dropped tokens
        return
    grains_in_range(grains, num_grains)
    (B, Hc, Wc), T, factor = grains.shape, positions.shape[0], 2 ** (num_grains - 1)
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    if int(bounds[0]) != 0 or bool((lengths < 0).any()) or int(bounds[-1]) > T:
        raise ValueError(
            f"cu_seqlens: expected 0 <= ... <= {T} (tokens), none less than the one before, got {cu_seqlens.tolist()}"
        )
    used = int(bounds[-1])
    image = torch.repeat_interleave(torch.arange(B, device=grains.device), lengths)
    position, grain = positions[:used], grain_ids[:used]
    known = (grain >= 0) & (grain < num_grains)
    edge = 2 ** grain.clamp(0, num_grains - 1)
    bad = ~known | (position < 0) | (position >= Hc * Wc * edge * edge)
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"packed: expected a grain in 0..{num_grains - 1} and a position on its grid, got grain {int(grain[at])}, "
            f"position {int(position[at])} in image {int(image[at])}, token {at - int(bounds[int(image[at])])}"
        )
    y, x = position // (Wc * edge), position % (Wc * edge)
    wrong = grains[image, y // edge, x // edge] != grain
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        b, cell = int(image[at]), (int(y[at] // edge[at]), int(x[at] // edge[at]))
        raise ValueError(
            f"packed: image {b}, cell {cell} has grain {int(grains[b][cell])} in the grain map, "
            f"but a token of grain {int(grain[at])}"
        )
    scale = factor // edge
    place = (image * Hc * factor + y * scale) * Wc * factor + x * scale
    times = torch.zeros(B * Hc * Wc * factor**2, dtype=torch.int64, device=grains.device)
    times.index_add_(0, place, torch.ones_like(place))
    times = times.reshape(B, Hc * factor, Wc * factor)
    own = factor // 2 ** grains.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    rows = torch.arange(Hc * factor, device=grains.device)[:, None]
    columns = torch.arange(Wc * factor, device=grains.device)
    wanted = ((rows % own == 0) & (columns % own == 0)).long()
    if bool((times != wanted).any()):
        b, row, column = _first(times != wanted)
        problem = "is covered twice" if int(times[b, row, column]) > 1 else "is not covered"
        raise ValueError(
            f"packed: image {b}, cell ({row // factor}, {column // factor}) {problem}: expected each code once, "
            f"got {int(times[b, row, column])} tokens for the code at row {row}, column {column} of the fine grid"
        )
