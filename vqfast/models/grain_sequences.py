"""Images of codes of several grains as sequences of (content, position, grain), packed without padding.

The sequence of an image has a segment for each grain, coarse to fine: [start] codes [end] (arXiv 2305.11718, 3.2).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vqfast.ops import pack


@dataclass(frozen=True)
class Vocabulary:
    """`size` symbols, then padding, end, and a start for each of `starts` classes.

    No sequence holds padding; it stands for what follows the last token, and keeps the released numbering.
    """

    size: int
    starts: int = 1

    @property
    def pad(self) -> int:
        return self.size

    @property
    def eos(self) -> int:
        return self.size + 1

    @property
    def sos(self) -> int:
        """The start of class 0; that of class c is c further."""
        return self.size + 2

    def __len__(self) -> int:
        return self.size + 2 + self.starts


@dataclass(frozen=True)
class GrainSequences:
    """B sequences end to end, T tokens together.

    content: (T,) int64. position: (T,) int64, place on the grid of its own grain. grain: (T,) int64.
    cu_seqlens: (B + 1,) int32, where each sequence starts, and T. max_length: no sequence is longer.
    """

    content: Tensor
    position: Tensor
    grain: Tensor
    cu_seqlens: Tensor
    max_length: int

    def index(self) -> Tensor:
        """(T,) int64: the place of each token in its sequence."""
        token = torch.arange(len(self.content), device=self.content.device)
        starts = self.cu_seqlens[:-1].long()
        return token - starts[torch.searchsorted(starts, token, right=True) - 1]

    def following(self, content_pad: int, position_pad: int, grain: int) -> tuple[Tensor, Tensor, Tensor]:
        """Content, position and grain of each token's successor; those given after a sequence's last."""
        last = self.cu_seqlens[1:].long() - 1
        shifted = (values.roll(-1) for values in (self.content, self.position, self.grain))
        return tuple(
            values.index_fill_(0, last, end)
            for values, end in zip(shifted, (content_pad, position_pad, grain), strict=True)
        )

    def split(self) -> Iterator["GrainSequences"]:
        """Each sequence alone. Waits for the device."""
        bounds = self.cu_seqlens.tolist()
        for start, end in zip(bounds, bounds[1:], strict=False):
            part = slice(start, end)
            cu_seqlens = self.cu_seqlens.new_tensor([0, end - start])
            yield GrainSequences(self.content[part], self.position[part], self.grain[part], cu_seqlens, end - start)


def grain_sequences(
    codes: Tensor, grains: Tensor, starts: Tensor, content: Vocabulary, positions: tuple[Vocabulary, ...], order: str
) -> GrainSequences:
    """The sequences of images. Waits for the device once, for the number of tokens.

    Args:
        codes: (B, H, W) int64 on the finest grid; of a coarser cell's codes the first is read.
        grains: (B, h, w) int64, 0 the coarsest; a cell of grain g holds 4^g codes.
        starts: (B,) int64, which start each sequence has.
        content: vocabulary of the codes.
        positions: vocabulary of the places of each grain, coarse to fine.
        order: of the codes within a grain, see `vqfast.ops.pack`.
    """
    B, device = len(codes), codes.device
    G = len(positions)
    packed = pack(codes, grains, order=order)
    counts = torch.stack([(grains == g).flatten(1).sum(1) * 4**g for g in range(G)], dim=1)  # (B, G)
    ends = (counts + 2).flatten().cumsum(0)
    T = int(ends[-1]) if B else 0
    real = T - 2 * G * B

    # Two more tokens for each segment behind: its start and end; one for the start of this one.
    image = torch.searchsorted(packed.cu_seqlens[1:], torch.arange(real, device=device), right=True)
    target = torch.arange(1, real + 1, device=device) + 2 * (G * image + packed.grain_ids[:real])
    first, last = (ends.view(B, G) - counts - 2), ends.view(B, G) - 1

    def specials(vocabularies: tuple[Vocabulary, ...]) -> tuple[Tensor, Tensor]:
        sos, eos = (torch.tensor([getattr(v, name) for v in vocabularies], device=device) for name in ("sos", "eos"))
        return sos + starts[:, None], eos.expand(B, G)

    def sequence(symbols: Tensor, vocabularies: tuple[Vocabulary, ...]) -> Tensor:
        sos, eos = specials(vocabularies)
        return (
            symbols.new_empty(T)
            .index_put_((target,), symbols[:real])
            .index_put_((first,), sos)
            .index_put_((last,), eos)
        )

    grain = torch.arange(G, device=device).repeat(B).repeat_interleave((counts + 2).flatten(), output_size=T)
    return GrainSequences(
        sequence(packed.values, (content,) * G),
        sequence(packed.positions, positions),
        grain,
        packed.cu_seqlens + 2 * G * torch.arange(B + 1, device=device, dtype=torch.int32),
        positions[-1].size + 2 * G,
    )
