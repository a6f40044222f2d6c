"""The autoregressive baseline: a GPT over the codes of an image, row by row (Esser et al. 2021, VQGAN)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.models.batch import entry
from vqfast.models.conditioning import (
    ClassEmbedding,
    batch_labels,
    check_guidance,
    flat_codes,
    known_codes,
    sampling_labels,
)
from vqfast.models.drawing import batches, evaluating, token_steps
from vqfast.nn.attention import CausalTransformer, KVCache, init_weights
from vqfast.nn.sampling_filters import DrawOptions, draw, guide
from vqfast.ops.checks import check_indices


@dataclass
class RasterGPTConfig:
    """Everything that makes a RasterGPT; the defaults have the size of the DQ-Transformer's base model.

    codebook_size: K of the auto-encoder. grid: (H, W) of its codes.
    dim, depth, heads: of the transformer.
    dropout: of embeddings, and of what attention and MLP add.
    num_classes: None for an unconditional model. class_dropout: share of labels dropped in training, which guidance
        and samples without a class need.
    """

    codebook_size: int = 1024
    grid: tuple[int, int] = (16, 16)
    dim: int = 1024
    depth: int = 24
    heads: int = 8
    dropout: float = 0.1
    num_classes: int | None = None
    class_dropout: float = 0.1

    def __post_init__(self):
        self.grid = tuple(self.grid)  # JSON has lists only
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid: expected two positive numbers (H, W), got {self.grid}")
        if self.codebook_size < 1:
            raise ValueError(f"codebook_size: expected at least 1, got {self.codebook_size}")


class RasterGPT(nn.Module):
    """A generative model of grids of codes: each is predicted from those above it and to its left in its row.

    Batches are mappings: "codes", (B, H, W) or (B, L) int64; with classes also "label", (B,) int64.

    Args:
        config: the model's make.
    """

    def __init__(self, config: RasterGPTConfig):
        super().__init__()
        self.config = c = config
        self.code_embedding = nn.Embedding(c.codebook_size, c.dim)
        self.index_embedding = nn.Embedding(c.grid[0] * c.grid[1], c.dim)
        # What stands before the first code.
        if c.num_classes is None:
            self.start = nn.Embedding(1, c.dim)
        else:
            self.start = ClassEmbedding(c.num_classes, c.dim, c.class_dropout)
        self.dropout = nn.Dropout(c.dropout)
        self.stack = CausalTransformer(c.dim, c.depth, c.heads, c.dropout)
        self.head = nn.Sequential(nn.LayerNorm(c.dim), nn.Linear(c.dim, c.codebook_size, bias=False))
        self.apply(init_weights)

    @property
    def device(self) -> torch.device:
        return self.code_embedding.weight.device

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of every code given those before it.

        Args:
            codes: (B, H, W) or (B, L) int64.
            labels: (B,) int64 classes, -1 or None for no class.

        Returns:
            (B, L, K).

        Raises:
            TypeError, ValueError: codes that are not on the grid or out of range; labels other than these.
        """
        codes = flat_codes("codes", codes, self.config.grid)
        check_indices(codes, self.config.codebook_size, name="codes")
        x = torch.cat([self._start(labels, len(codes))[:, None], self.code_embedding(codes[:, :-1])], dim=1)
        return self.head(self.stack(self.dropout(x + self.index_embedding.weight)))

    def _start(self, labels: Tensor | None, batch: int) -> Tensor:
        """(batch, dim)."""
        if self.config.num_classes is None:
            return self.start.weight.expand(batch, -1)
        return self.start(labels, batch)

    def training_step(self, batch: Mapping[str, Tensor], step: int = 0) -> dict[str, Tensor]:
        """Cross-entropy of one batch in nats per code, as "loss", and in bits, as "bits_per_dim", without gradient.

        Raises:
            TypeError, ValueError: codes that are not on the grid, or labels that are missing or out of range.
        """
        codes = flat_codes('batch["codes"]', entry(batch, "codes", self), self.config.grid)
        logits = self(codes, batch_labels(batch, self.config.num_classes))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())
        return {"loss": loss, "bits_per_dim": loss.detach() / math.log(2)}

    @torch.no_grad()
    def bits_per_dim(self, codes: Tensor, labels: Tensor | int | None = None) -> Tensor:
        """-log2 p(codes) per code, (B,) float64.

        Args:
            codes: (B, H, W) or (B, L) int64.
            labels: (B,) int64, or one class for all.
        """
        c = self.config
        codes = flat_codes("codes", codes, c.grid)
        labels = sampling_labels(labels, len(codes), c.num_classes, c.class_dropout, self.device)
        with evaluating(self):
            nats = F.cross_entropy(self(codes, labels).transpose(1, 2).double(), codes, reduction="none")
        return nats.mean(1) / math.log(2)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        labels: Tensor | int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw n grids of codes, one code a step, with a cache of keys and values.

        Args:
            n: how many, at least 1.
            labels: (n,) int64 classes, or one class for all; None draws without a class.
            temperature: divides the logits.
            top_k, top_p: draw among the most likely codes only, see vqfast.nn.sampling_filters.filter_logits.
            guidance_scale: strength of classifier-free guidance; 1 is none.
            batch_size: grids at a time; None takes all n at once.
            generator: source of the random numbers.
            progress: show a bar.

        Returns:
            (n, H, W) int64.

        Raises:
            TypeError, ValueError: labels missing, not wanted or out of range; guidance without labels, or of a model
                trained without class_dropout; temperature or filters out of range.
        """
        return self._draw(
            n, None, labels, batch_size, guidance_scale, DrawOptions(temperature, top_k, top_p), generator, progress
        )

    @torch.no_grad()
    def inpaint(
        self,
        codes: Tensor,
        mask: Tensor,
        labels: Tensor | int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw codes where `mask` is true; the others come back as they are.

        Codes are drawn in raster order, those that are given take their place in it: a code is drawn given all before
        it, known or drawn, and blind to what is known after it. Raster order has no better way without a search.

        Args:
            codes: (B, H, W) or (B, L) int64; under the mask any value.
            mask: bool, of the shape of `codes`, or (H, W) or (L,) for all of them: true where to draw.
            labels and the rest: as for `sample`.

        Returns:
            (B, H, W) int64.

        Raises:
            TypeError, ValueError: as `sample`; a mask that is not bool or does not fit.
        """
        known = known_codes(codes, mask, self.config.grid, self.config.codebook_size).to(self.device)
        options = DrawOptions(temperature, top_k, top_p)
        return self._draw(len(known), known, labels, batch_size, guidance_scale, options, generator, progress)

    def _draw(self, n, known, labels, batch_size, guidance_scale, options, generator, progress) -> Tensor:
        """(n, H, W) codes; known: (n, L) with -1 where to draw, None to draw all."""
        c = self.config
        parts = batches(n, batch_size)
        labels = sampling_labels(labels, n, c.num_classes, c.class_dropout, self.device)
        check_guidance(guidance_scale, labels, c.num_classes, c.class_dropout)
        drawn = []
        with evaluating(self):
            for rows in parts:
                size = rows.stop - rows.start
                x = self._start(None if labels is None else labels[rows], size)
                if guidance_scale != 1.0:
                    x = torch.cat([x, self._start(None, size)])
                given = None if known is None else known[rows]
                drawn.append(self._sequence(x, given, options, guidance_scale, generator, progress))
        return torch.cat(drawn).view(n, *c.grid)

    def _sequence(self, x: Tensor, known: Tensor | None, options: DrawOptions, guidance_scale, generator, progress):
        """(B, L) codes after starts x, (B, dim), or with guidance (2 B, dim); known: as for `_draw`."""
        L = len(self.index_embedding.weight)
        cache, codes = KVCache(self.stack, len(x), L), []
        for index in token_steps(L, progress):
            hidden = self.stack.step(x + self.index_embedding.weight[index], cache)
            code = draw(guide(self.head(hidden), guidance_scale), options, generator)
            if known is not None:
                code = torch.where(known[:, index] < 0, code, known[:, index])
            codes.append(code)
            x = self.code_embedding(code)
            if guidance_scale != 1.0:
                x = torch.cat([x, x])
        return torch.stack(codes, dim=1)
