"""Packed codes as padded sequences with special tokens, a pair of (content, position) for each grain, and back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqfast.ops.checks import check_device, check_indices, check_int64, check_whole, checking, describe
from vqfast.ops.packing import Packed, check_cells, check_num_grains, check_packed


class Special(NamedTuple):
    """Special tokens after `size` ordinary ones; class c, where given, takes the place of sos as size + 2 + c."""

    pad: int
    eos: int
    sos: int


def special_tokens(size: int) -> Special:
    """pad, eos and sos of a vocabulary of `size` tokens: the three ids that follow them."""
    return Special(size, size + 1, size + 2)


class Padded(NamedTuple):
    """The sequences of one grain: [sos] codes eos pad pad ...

    content: (B, L) int64 codes; pad, eos, sos = K, K + 1, K + 2.
    position: (B, L) int64 on the grain's own grid of N positions; pad, eos, sos = N, N + 1, N + 2.
    """

    content: Tensor
    position: Tensor


def to_padded(
    packed: Packed,
    *,
    cells: tuple[int, int],
    codebook_size: int,
    num_grains: int = 2,
    sos: bool = False,
    trim: bool = False,
) -> tuple[Padded, ...]:
    """The codes of each grain as a batch of padded sequences, in the order of the tokens (the released permuter).

    Args:
        packed: values (T,) int64 codes.
        cells: (Hc, Wc).
        codebook_size: K.
        num_grains: G.
        sos: whether sequences start with sos.
        trim: cut each grain's sequences to the longest of the batch. That looks at the data: on CUDA it waits for the
            device. Else L is the most there can be, N_g + 1 (+ 1 with sos).

    Returns:
        G pairs, the coarsest grain first.

    Raises:
        TypeError, ValueError: dtypes, shapes or sizes that do not fit, a code that is none.
    """
    check_packed(packed)
    values, cu_seqlens, positions, grain_ids = packed
    Hc, Wc = check_cells(cells)
    check_num_grains(num_grains)
    check_whole("codebook_size", codebook_size, 1)
    check_int64("packed.values", values, positions.shape, "(T,)")
    # A code beyond K would be read as a special token.
    check_indices(values, codebook_size, name="packed.values")
    check_device("packed.values", values, cu_seqlens=cu_seqlens, positions=positions, grain_ids=grain_ids)
    B, T, bounds = cu_seqlens.shape[0] - 1, values.shape[0], cu_seqlens.long()
    image = torch.searchsorted(bounds[1:].contiguous(), torch.arange(T, device=values.device), right=True)
    content_tokens, segments = special_tokens(codebook_size), []
    for g in range(num_grains):
        size = Hc * Wc * 4**g
        position_tokens, length = special_tokens(size), size + 1 + sos
        member = (grain_ids == g) & (image < B)
        # Tokens of this grain before each token of the batch, and before each image.
        before = torch.nn.functional.pad(member.long().cumsum(0), (1, 0))
        first = before[bounds]
        column = before[:-1] - first[image.clamp(max=max(B - 1, 0))] + sos if B else before[:-1]
        slot = torch.where(member & (column < length - 1), image * length + column, B * length)
        end = torch.arange(B, device=values.device) * length + (first.diff() + sos).clamp(max=length - 1)

        def sequence(tokens: Tensor, special: Special, slot: Tensor = slot, end: Tensor = end, length: int = length):
            out = tokens.new_full((B * length + 1,), special.pad)
            out[slot] = tokens
            out[end] = special.eos
            out = out[:-1].reshape(B, length)
            if sos:
                out[:, 0] = special.sos
            return out

        segment = Padded(sequence(values, content_tokens), sequence(positions, position_tokens))
        if trim and B:
            longest = int(first.diff().max()) + 1 + sos
            segment = Padded(*(part[:, :longest] for part in segment))
        segments.append(segment)
    return tuple(segments)


def _check_special(g: int, position: Tensor, size: int) -> None:
    """[sos] positions eos pad ...: nothing special in the middle, nothing but pad after the end."""
    L = position.shape[1]
    column = torch.arange(L, device=position.device)
    ordinary = (position >= 0) & (position < size)
    ended = (position == size + 1).cumsum(1) > 0
    bad = (ended & ordinary) | (~ended & ~ordinary & (column > 0)) | (position < 0)
    if not bool(bad.any()):
        return
    image, at = bad.nonzero()[0].tolist()
    raise ValueError(
        f"segments: expected [sos] positions eos pad in grain {g}, got {int(position[image, at])} "
        f"(pad, eos, sos = {size}, {size + 1}, {size + 2}) in image {image}, at entry {at}"
    )


def from_padded(segments: Sequence[Any], *, cells: tuple[int, int]) -> tuple[Packed, Tensor]:
    """Padded sequences as packed codes, and the grain map that they make. Special tokens are dropped wherever they are.

    A cell has the grain of its tokens (the finest if they have several), or 0 if it has none. In checked mode a
    special token between others is an error; `unpack` then checks that the codes cover each image once.

    Args:
        segments: a pair (content, position), (B, L_g) int64 each, for every grain, the coarsest first.
        cells: (Hc, Wc).

    Returns:
        Packed of capacity B * Hf * Wf, tokens in their order, and grains (B, Hc, Wc): unpack(packed, grains,
        num_grains=len(segments)) is the grid.

    Raises:
        TypeError, ValueError: dtypes, shapes or sizes that do not fit.
    """
    num_grains, (Hc, Wc) = len(segments), check_cells(cells)
    check_num_grains(num_grains)
    contents, positions, grain_ids, owners = [], [], [], []
    for g, (content, position) in enumerate(segments):
        if not isinstance(position, Tensor) or position.ndim != 2:
            raise ValueError(f"segments: expected positions of shape (B, L), got {describe(position)} for grain {g}")
        check_int64("segments", position, (segments[0][1].shape[0], position.shape[1]), "(B, L)")
        check_int64("segments", content, position.shape, "(B, L)")
        check_device("segments", segments[0][1], segments=position)
        size = Hc * Wc * 4**g
        if not torch.compiler.is_compiling() and checking():
            _check_special(g, position, size)
        ordinary = (position >= 0) & (position < size)
        row, column = position // (Wc * 2**g), position % (Wc * 2**g)
        contents.append(content)
        positions.append(torch.where(ordinary, position, -1))
        grain_ids.append(torch.where(ordinary, g, -1))
        owners.append(torch.where(ordinary, row // 2**g * Wc + column // 2**g, Hc * Wc))
    content, position, grain = (torch.cat(part, 1) for part in (contents, positions, grain_ids))
    B = content.shape[0]
    grains = grain.new_zeros(B, Hc * Wc + 1).scatter_reduce_(1, torch.cat(owners, 1), grain, "amax")
    capacity = B * Hc * Wc * 4 ** (num_grains - 1)
    kept = (grain >= 0).reshape(-1)
    rank = kept.long().cumsum(0) - 1
    slot = torch.where(kept & (rank < capacity), rank, capacity)

    def packed(part: Tensor, fill: int) -> Tensor:
        out = part.new_full((capacity + 1,), fill)
        out[slot] = part.reshape(-1)
        return out[:capacity]

    ends = (grain >= 0).sum(1).cumsum(0).clamp(max=capacity)
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int()
    grid = grains[:, :-1].reshape(B, Hc, Wc)
    return Packed(packed(content, 0), cu_seqlens, packed(position, -1), packed(grain, -1)), grid
