"""Drawing from a DQ-Transformer: a token a step for every image, both stacks with a cache of keys and values."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast.models.drawing import token_steps
from vqfast.nn.attention import KVCache
from vqfast.nn.sampling_filters import DrawOptions, draw, guide
from vqfast.ops import Packed, position_mask, unpack

if TYPE_CHECKING:
    from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig

# Steps between two looks at how far the images are: a look waits for the device.
_LOOK_EVERY = 16


class DrawnTokens:
    """The tokens of B images as they are drawn, and what may come next.

    Args:
        config: of the model.
        starts: (B,) which start each image has.
    """

    def __init__(self, config: "DQTransformerConfig", starts: Tensor):
        self.config, self.starts = config, starts
        shape, device = (len(starts), config.longest), starts.device
        self.content = torch.zeros(shape, dtype=torch.int64, device=device)
        self.position = torch.full(shape, -1, device=device)
        self.grain = torch.full(shape, -1, device=device)
        self.size = torch.tensor([v.size for v in config.positions], device=device)
        self.eos = torch.tensor([v.eos for v in config.positions], device=device)
        self.sos = torch.tensor([v.sos for v in config.positions], device=device)
        self.length = 0
        first = torch.zeros_like(starts)
        self.append(config.content.sos + starts, self.sos[first] + starts, first)

    def append(self, content: Tensor, position: Tensor, grain: Tensor) -> None:
        """The next token of each image, (B,) each."""
        for drawn, new in ((self.content, content), (self.position, position), (self.grain, grain)):
            drawn[:, self.length] = new
        self.length += 1

    def newest(self) -> tuple[Tensor, Tensor, Tensor]:
        """Content, position and grain of the last token, (B,) each."""
        last = self.length - 1
        return self.content[:, last], self.position[:, last], self.grain[:, last]

    def allowed(self, grain: Tensor) -> Tensor:
        """(B, V) bool: positions that may come next at grain (B,), such that every cell ends with its codes."""
        c, seen = self.config, slice(self.length)
        vocabulary = len(c.positions[-1])
        return position_mask(
            self.position[:, seen],
            self.grain[:, seen],
            grain,
            cells=c.cells,
            num_grains=c.num_grains,
            vocab_size=vocabulary,
        )

    def complete(self) -> Tensor:
        """(B,) bool: the last grain has ended."""
        return ((self.grain == self.config.num_grains - 1) & (self.position == self.eos[-1])).any(1)

    def images(self) -> tuple[Tensor, Tensor]:
        """Codes (B, H, W) and grains (B, h, w). Waits for the device."""
        B, (h, w) = len(self.starts), self.config.cells
        lies = (self.grain >= 0) & (self.position < self.size[self.grain])  # special tokens lie nowhere
        content, position, grain = self.content[lies], self.position[lies], self.grain[lies]
        lengths = lies.sum(1)
        image = torch.arange(B, device=lies.device).repeat_interleave(lengths)
        edge = 2**grain
        row, column = position // (w * edge) // edge, position % (w * edge) // edge
        grains = grain.new_zeros(B, h, w).index_put_((image, row, column), grain)
        packed = Packed(content, F.pad(lengths.cumsum(0), (1, 0)).int(), position, grain)
        return unpack(packed, grains, num_grains=self.config.num_grains), grains


@torch.no_grad()
def draw_tokens(
    model: "DQTransformer",
    starts: Tensor,
    without: Tensor | None,
    content: DrawOptions,
    position: DrawOptions,
    *,
    guidance_scale: float = 1.0,
    derive_finest: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> DrawnTokens:
    """Draw the tokens of images, each complete; see `DQTransformer.sample`.

    Every image has a token in each step, whatever segment it is at: one does not wait for another, nor is it padded
    for one. What is behind an image's last end is padding.

    Args:
        model: in evaluation mode.
        starts: (B,) int64, which start each image has.
        without: (B,) int64, the starts of no class, for guidance; None without guidance.
        content, position: how each is drawn.
    """
    c, B = model.config, len(starts)
    tokens = DrawnTokens(c, starts)
    rows = B if without is None else 2 * B
    position_cache = KVCache(model.position_stack, rows, c.longest)
    content_cache = KVCache(model.content_stack, rows, c.longest)
    order = _training_order(c, starts.device)
    all_at_finest = c.num_grains == 1

    def both(symbol: Tensor, is_start: Tensor | None = None) -> Tensor:
        """With guidance also the rows without the class, whose start tokens are others."""
        if without is None:
            return symbol
        other = symbol if is_start is None else torch.where(is_start, symbol + without - starts, symbol)
        return torch.cat([symbol, other])

    for index in token_steps(c.longest - 1, progress):
        if index % _LOOK_EVERY == 0:
            if bool(tokens.complete().all()):
                break
            all_at_finest = all_at_finest or bool((tokens.newest()[2] == c.num_grains - 1).all())
        last_content, last_position, last_grain = tokens.newest()
        is_start = last_position >= tokens.sos[last_grain]
        x = model.embed(
            both(last_content, is_start),
            both(last_position, is_start),
            both(last_grain),
            torch.tensor(index, device=starts.device),
        )
        hidden = model.position_stack.step(x, position_cache)

        opens = (last_position == tokens.eos[last_grain]) & (last_grain < c.num_grains - 1)
        grain = last_grain + opens
        allowed = tokens.allowed(grain)
        if derive_finest:
            place = order[allowed[:, order].int().argmax(1)]
        if not (derive_finest and all_at_finest):
            logits = guide(model.position_head(hidden), guidance_scale)
            drawn = draw(logits.masked_fill(~allowed, -torch.inf), position, generator)
            place = torch.where(grain == c.num_grains - 1, place, drawn) if derive_finest else drawn
        place = torch.where(opens, tokens.sos[grain] + starts, place)

        y = hidden + model.embed_position(both(place, opens), both(grain))
        logits = guide(model.content_head(model.content_stack.step(y, content_cache)), guidance_scale)
        code = draw(logits[:, : c.codebook_size], content, generator)
        # Special contents stand in the order of special positions.
        special = place - tokens.size[grain]
        tokens.append(torch.where(special >= 0, c.codebook_size + special, code), place, grain)
    return tokens


def _training_order(config: "DQTransformerConfig", device: torch.device) -> Tensor:
    """Positions of the finest grain, and its special ones behind, in the order in which training gives them."""
    ids = torch.arange(len(config.positions[-1]), device=device)
    if config.order == "row":
        return ids
    (h, w), edge, size = config.cells, config.cell, config.positions[-1].size
    by_cell = ids[:size].view(h, edge, w, edge).transpose(1, 2).flatten()
    return torch.cat([by_cell, ids[size:]])
