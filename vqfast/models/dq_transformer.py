"""DQ-Transformer (arXiv 2305.11718): where the next code goes, then what it is, coarse to fine."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.models.batch import entry
from vqfast.models.conditioning import batch_labels, check_guidance, drop_labels, sampling_labels
from vqfast.models.dq_sampling import draw_tokens
from vqfast.models.drawing import batches, evaluating
from vqfast.models.grain_sequences import GrainSequences, Vocabulary, grain_sequences
from vqfast.nn.attention import Attend, CausalTransformer, PackedAttention, attend_causal, init_weights
from vqfast.nn.constants import register_constant
from vqfast.nn.sampling_filters import DrawOptions
from vqfast.ops.checks import check_int64


@dataclass
class DQTransformerConfig:
    """Everything that makes a DQTransformer; the defaults are the paper's base model, unconditional.

    codebook_size: K of the auto-encoder. grid: (H, W) of its finest codes. num_grains: 2 or 3 in the paper; a cell of
        the coarsest grain covers 2^(num_grains - 1) codes a side.
    order: of the codes within a grain: "row" or "region", see `vqfast.ops.pack`.
    dim, heads: of both stacks. position_depth, content_depth: blocks of each.
    dropout: of embeddings, and of what attention and MLP add.
    max_length: longest sequence that there are places for; None for the longest that the grid can have.
    num_classes: None for an unconditional model. class_dropout: share of labels dropped in training, which guidance
        and samples without a class need; above 0 it adds a start for no class.
    """

    codebook_size: int = 1024
    grid: tuple[int, int] = (32, 32)
    num_grains: int = 2
    order: str = "row"
    dim: int = 1024
    heads: int = 8
    position_depth: int = 6
    content_depth: int = 18
    dropout: float = 0.1
    max_length: int | None = 2048
    num_classes: int | None = None
    class_dropout: float = 0.0

    def __post_init__(self):
        self.grid = tuple(self.grid)  # JSON has lists only
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid: expected two positive numbers (H, W), got {self.grid}")
        if self.codebook_size < 1:
            raise ValueError(f"codebook_size: expected at least 1, got {self.codebook_size}")
        if self.num_grains < 1 or any(side % self.cell for side in self.grid):
            raise ValueError(
                f"num_grains: expected at least 1, with 2^(num_grains - 1) a divisor of the grid {self.grid}, "
                f"got {self.num_grains}"
            )
        if self.order not in ("row", "region"):
            raise ValueError(f"order: expected 'row' or 'region', got {self.order!r}")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, or None, got {self.num_classes}")
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout: expected a share in 0..1, got {self.class_dropout}")
        if self.max_length is not None and self.max_length < self.longest:
            raise ValueError(f"max_length: expected at least {self.longest}, all cells at their finest, or None, "
                             f"got {self.max_length}")  # fmt: skip

    @property
    def cell(self) -> int:
        """Finest codes along the edge of a cell of the grain map."""
        return 2 ** (self.num_grains - 1)

    @property
    def cells(self) -> tuple[int, int]:
        """(h, w) of the grain map."""
        return self.grid[0] // self.cell, self.grid[1] // self.cell

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: every cell at the finest grain, two special tokens a grain."""
        return self.grid[0] * self.grid[1] + 2 * self.num_grains

    @property
    def starts(self) -> int:
        """Kinds of start tokens: one for each class, one for none where the model may have to do without."""
        return 1 if self.num_classes is None else self.num_classes + (self.class_dropout > 0)

    @property
    def content(self) -> Vocabulary:
        return Vocabulary(self.codebook_size, self.starts)

    @property
    def positions(self) -> tuple[Vocabulary, ...]:
        """Of each grain, coarse to fine."""
        h, w = self.cells
        return tuple(Vocabulary(h * w * 4**g, self.starts) for g in range(self.num_grains))


class DQTransformer(nn.Module):
    """A generative model of images whose cells have codes of different grains.

    The position stack reads (content, position) of every token and predicts the position of the next; the content
    stack reads its output with that position and predicts the content there. Contents share one embedding, positions
    have one for each grain, and each token has that of its grain.

    Batches are mappings: "codes", (B, H, W) int64 on the finest grid, of which a coarser cell's first is read;
    "grains", (B, h, w) int64, 0 the coarsest; with classes also "label", (B,) int64.

    Sequences are packed: none is padded, none sees another. On a CPU in eval mode each is computed alone, so that what
    it yields has the same bits in any batch; in training it has them to the rounding of a matrix product.

    Args:
        config: the model's make.
    """

    def __init__(self, config: DQTransformerConfig):
        super().__init__()
        self.config = c = config
        self.content_embedding = nn.Embedding(len(c.content), c.dim)
        # One table for all grains, one after the other.
        self.position_embedding = nn.Embedding(sum(map(len, c.positions)), c.dim)
        self.grain_embedding = nn.Embedding(c.num_grains, c.dim)
        self.index_embedding = nn.Embedding(c.max_length or c.longest, c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.position_stack = CausalTransformer(c.dim, c.position_depth, c.heads, c.dropout)
        self.content_stack = CausalTransformer(c.dim, c.content_depth, c.heads, c.dropout)
        # One head for the positions of every grain: the finest has the most.
        self.position_head = nn.Sequential(nn.LayerNorm(c.dim), nn.Linear(c.dim, len(c.positions[-1]), bias=False))
        self.content_head = nn.Sequential(nn.LayerNorm(c.dim), nn.Linear(c.dim, len(c.content), bias=False))
        sizes = [len(v) for v in c.positions]
        register_constant(self, "_position_offset", [sum(sizes[:grain]) for grain in range(c.num_grains)])
        self.apply(init_weights)

    @property
    def device(self) -> torch.device:
        return self.content_embedding.weight.device

    # ---- the network: its input, and what it does with one or many tokens --------------------------------------------

    def embed_position(self, position: Tensor, grain: Tensor) -> Tensor:
        """(..., dim) of positions (...) on the grids of their grains (...)."""
        return self.position_embedding(position + self._position_offset[grain])

    def embed(self, content: Tensor, position: Tensor, grain: Tensor, index: Tensor) -> Tensor:
        """Input of the position stack, (..., dim); index: place in the sequence."""
        x = self.content_embedding(content) + self.embed_position(position, grain)
        return self.dropout(x + self.index_embedding(index) + self.grain_embedding(grain))

    def forward(self, tokens: GrainSequences) -> tuple[Tensor, Tensor]:
        """Logits of the next position, (T, V_position), and of the next content given it, (T, V_content)."""
        if tokens.content.device.type == "cpu" and not self.training:
            # One by one: the bits of a matrix product's row depend on how many rows there are. Training, which sees but
            # their sum, is near three times as fast together.
            parts = [self._logits(part, attend_causal) for part in tokens.split()]
            return tuple(torch.cat(logits) for logits in zip(*parts, strict=True))
        return self._logits(tokens, PackedAttention(tokens.cu_seqlens, tokens.max_length))

    def _logits(self, tokens: GrainSequences, attend: Attend) -> tuple[Tensor, Tensor]:
        _, next_position, next_grain = self.following(tokens)
        x = self.embed(tokens.content, tokens.position, tokens.grain, tokens.index())
        hidden = self.position_stack(x, attend)
        content = self.content_stack(hidden + self.embed_position(next_position, next_grain), attend)
        return self.position_head(hidden), self.content_head(content)

    def following(self, tokens: GrainSequences) -> tuple[Tensor, Tensor, Tensor]:
        """Content, position and grain of each token's successor, (T,) each; padding after a sequence's last."""
        c = self.config
        return tokens.following(c.content.pad, c.positions[-1].pad, c.num_grains - 1)

    # ---- training ----------------------------------------------------------------------------------------------------

    def sequences(self, codes: Tensor, grains: Tensor, labels: Tensor | None = None) -> GrainSequences:
        """The sequences of images; labels (B,), -1 or None for no class."""
        c, B = self.config, len(codes)
        return grain_sequences(codes, grains, self.start_of(labels, B), c.content, c.positions, c.order)

    def start_of(self, labels: Tensor | None, batch: int) -> Tensor:
        """(batch,) int64: which start token each label stands for."""
        if self.config.num_classes is None:
            return torch.zeros(batch, dtype=torch.int64, device=self.device)
        if labels is None:
            labels = torch.full((batch,), -1, device=self.device)
        return torch.where(labels < 0, self.config.num_classes, labels)

    def loss(self, tokens: GrainSequences, counts: Tensor | None = None) -> dict[str, Tensor]:
        """Cross-entropy of contents, plus the mean over grains of that of positions, in nats.

        A grain's end, and the start of the next, count among its positions and contents; padding does not count.

        Args:
            tokens: the sequences.
            counts: (num_grains,) float, by how many positions of each grain to divide, and by their sum for the
                contents; None for as many as there are.

        Returns:
            Scalars: loss, content, position; with gradient.
        """
        position_logits, content_logits = self(tokens)
        content, position, grain = self.following(tokens)
        pad = torch.tensor([v.pad for v in self.config.positions], device=grain.device)[grain]
        position_loss = F.cross_entropy(position_logits.float(), position, reduction="none")
        of_grain = [(grain == g) & (position != pad) for g in range(self.config.num_grains)]
        if counts is None:
            counts = torch.stack([chosen.sum() for chosen in of_grain])
        sums = torch.stack([torch.where(chosen, position_loss, 0).sum() for chosen in of_grain])
        content_sum = F.cross_entropy(
            content_logits.float(), content, ignore_index=self.config.content.pad, reduction="sum"
        )
        content_loss, position_loss = content_sum / counts.sum(), (sums / counts).mean()
        return {"loss": content_loss + position_loss, "content": content_loss, "position": position_loss}

    def loss_counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Positions of each grain that a batch's sequences predict, (num_grains,) float: what `loss` divides by.

        Those of its codes, its end, and, but for the first grain, its start.
        """
        grains = entry(batch, "grains", self)
        codes = torch.stack([(grains == g).sum() * 4**g for g in range(self.config.num_grains)])
        specials = torch.full_like(codes, 2 * len(grains))
        specials[0] = len(grains)
        return (codes + specials).float()

    def training_step(self, batch: Mapping[str, Tensor], step: int = 0) -> dict[str, Tensor]:
        """Loss of one batch; see `loss`. Without gradient all but "loss".

        Args:
            batch: see the class; "loss_counts", where it is there, in place of the batch's own: see vqfast.train.parts.
            step: not used.

        Raises:
            TypeError, ValueError: codes or grains other than the configuration's, labels missing or out of range.
        """
        codes, grains, labels = self._read(batch)
        scalars = self.loss(self.sequences(codes, grains, labels), batch.get("loss_counts"))
        return {name: value if name == "loss" else value.detach() for name, value in scalars.items()}

    def _read(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        c, codes, grains = self.config, entry(batch, "codes", self), entry(batch, "grains", self)
        B = len(codes)
        check_int64('batch["codes"]', codes, (B, *c.grid), "(B, H, W)")
        check_int64('batch["grains"]', grains, (B, *c.cells), "(B, h, w)")
        for name, values, size in (("codes", codes, c.codebook_size), ("grains", grains, c.num_grains)):
            # Values of another device's tensor would have to be waited for.
            if values.device.type == "cpu" and values.numel() and not 0 <= values.min() <= values.max() < size:
                raise ValueError(
                    f'batch["{name}"]: expected values in 0..{size - 1}, got {values.min()}..{values.max()}'
                )
        labels = batch_labels(batch, c.num_classes, or_none=c.class_dropout > 0)
        if labels is not None and self.training and c.class_dropout > 0:
            labels = drop_labels(labels, c.class_dropout)
        return codes, grains, labels

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        n: int,
        labels: Tensor | int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        position_temperature: float = 1.0,
        position_top_k: int | None = None,
        position_top_p: float | None = None,
        derive_finest: bool = False,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Draw n images of codes, each of which covers its whole grid.

        Args:
            n: how many, at least 1.
            labels: (n,) int64 classes, or one class for all; None draws without a class.
            temperature: divides the logits of the contents.
            top_k, top_p: draw among the most likely contents only, see vqfast.nn.sampling_filters.filter_logits.
            guidance_scale: strength of classifier-free guidance, of positions and contents; 1 is none.
            position_temperature, position_top_k, position_top_p: the same of the positions.
            derive_finest: take what no coarser grain has taken, in the order of training, as the finest grain's
                positions, instead of drawing them.
            batch_size: images at a time; None takes all n at once.
            generator: source of the random numbers.
            progress: show a bar.

        Returns:
            codes (n, H, W) int64 on the finest grid, a coarser code repeated over what it covers, and grains
            (n, h, w) int64.

        Raises:
            TypeError, ValueError: labels missing, not wanted or out of range; guidance without labels, or of a model
                trained without class_dropout; temperature or filters out of range.
        """
        c = self.config
        parts = batches(n, batch_size)
        content = DrawOptions(temperature, top_k, top_p)
        position = DrawOptions(position_temperature, position_top_k, position_top_p, prefix="position_")
        labels = sampling_labels(labels, n, c.num_classes, c.class_dropout, self.device)
        check_guidance(guidance_scale, labels, c.num_classes, c.class_dropout)
        starts = self.start_of(labels, n)
        # Guidance needs each image twice: with its class, and with none.
        none = self.start_of(None, n) if guidance_scale != 1.0 else None
        drawn = []
        with evaluating(self):
            for part in parts:
                tokens = draw_tokens(
                    self,
                    starts[part],
                    None if none is None else none[part],
                    content,
                    position,
                    guidance_scale=guidance_scale,
                    derive_finest=derive_finest,
                    generator=generator,
                    progress=progress,
                )
                drawn.append(tokens.images())
        codes, grains = zip(*drawn, strict=True)
        return torch.cat(codes), torch.cat(grains)
