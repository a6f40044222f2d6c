"""DQ-VAE: images to codes of variable length, more of them where there is detail (Huang et al. 2023, arXiv 2305.11718).

An encoder gives features on two or three grids, a router chooses for each cell of the coarsest which of them is used,
and only the features chosen are quantised, all with one codebook.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.models.adversarial import Adversarial, AdversarialConfig
from vqfast.models.autoencoder import AutoencoderConfig, check_images, check_sizes, codebook_scalars
from vqfast.models.batch import entry
from vqfast.models.dqvae_networks import GrainEncoder, PositionalDecoder
from vqfast.nn.perceptual import LPIPS
from vqfast.nn.routers import (
    EntropyRouter,
    FeatureRouter,
    FixedRouter,
    RandomRouter,
    Routing,
    check_shares,
    code_lengths,
    counts_for_codes,
    ranked_grains,
    select_grains,
)
from vqfast.nn.vector_quantize import VectorQuantize
from vqfast.ops import code_weights, grain_budget_loss, pack, unpack
from vqfast.ops.checks import check_indices, describe

ROUTERS = ("feature", "entropy", "random", "fixed")
# By the number of grains.
PUBLISHED_SHARES = {2: (0.5,), 3: (0.3, 0.3)}
PUBLISHED_BUDGET = {2: (10.0,), 3: (1.0, 1.0)}


@dataclass(frozen=True)
class DQVAEConfig(AutoencoderConfig, AdversarialConfig):
    """Shape of a DQ-VAE and how it learns. The defaults are the published two-grain model for 256 pixels (F = 8, 16).

    The coarsest grid has image_size / 2^(len(mults) - 1) cells a side, the finest 2^(grains - 1) times as many.
    """

    image_size: int = 256
    """Side of the square images, in pixels."""
    channels: int = 128
    """Base width; a multiple of norm_groups."""
    mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width of each level of the encoder as a multiple of the base; each after the first halves the resolution."""
    decoder_mults: tuple[int, ...] | None = None
    """Those of the decoder, which starts at the finest grid. Default: the encoder's levels up to there."""
    attention_resolutions: tuple[int, ...] = (16, 32)
    """Resolutions (in pixels) at which positions attend to each other; the blocks next to the codes always do."""
    codebook_size: int = 1024
    """Number of codes."""
    code_dim: int = 256
    """Size of a code."""
    z_channels: int = 256
    """Width of the features that the encoder gives and the decoder takes."""
    decay: float = 0.99
    """Of the codebook's moving averages."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss."""
    threshold_ema_dead_code: float = 1.0
    """A code whose average count a batch falls below this is replaced; 0 never replaces any."""
    counting: str = "codes"
    """What the moving averages count: codes once each, or positions of the finest grid, a coarse code 4 or 16 times, as
    the released code does."""
    grains: int = 2
    """Numbers of codes that a cell can have: 2 for 1 or 4, 3 for 1, 4 or 16."""
    shares: tuple[float, ...] | None = None
    """Share of the cells that each finer grain is to get, (median, ..., fine). Default: as published, half of them fine
    with two grains, 0.3 and 0.3 with three."""
    router: str = "feature"
    """Who chooses the grains: feature (learned), entropy (of the grey levels), random, or fixed (the finest)."""
    router_layers: int = 2
    """Feature router: layers of its MLP, 1 or 2."""
    entropy_per: str = "dataset"
    """Entropy router: shares over the whole data set, or in each image."""
    entropy_thresholds: tuple[float, ...] | None = None
    """Entropy router: fixed entropies in place of shares."""
    budget_weights: tuple[float, ...] | None = None
    """Feature router: weight of the squared miss of each share. Default: as published, 10 with two grains (which the
    released code counts twice), 1 and 1 with three."""
    disc_weight: float = 1.0
    """Weight of the generator's loss, or of the adaptive weight; 0 trains without a discriminator."""
    disc_weight_max: float | None = 0.75
    """Largest weight of the generator's loss."""

    def __post_init__(self):
        AutoencoderConfig.__post_init__(self)
        AdversarialConfig.__post_init__(self)
        for name in ("decoder_mults", "shares", "entropy_thresholds", "budget_weights"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_sizes(self, "z_channels")
        if not 2 <= self.grains <= min(3, len(self.mults)):
            raise ValueError(f"grains: expected 2 or 3, and a level of mults for each, got {self.grains}")
        if self.freeze_encoder:
            raise ValueError("freeze_encoder: a DQ-VAE's router learns with its encoder; expected False, got True")
        if self.router not in ROUTERS:
            raise ValueError(f"router: expected one of {', '.join(ROUTERS)}, got {self.router!r}")
        if self.counting not in ("codes", "positions"):
            raise ValueError(f"counting: expected 'codes' or 'positions', got {self.counting!r}")
        for name, published in (("shares", PUBLISHED_SHARES), ("budget_weights", PUBLISHED_BUDGET)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, published[self.grains])
        finer, levels = self.grains - 1, len(self.mults) - self.grains + 1
        for name in ("shares", "budget_weights"):
            if len(getattr(self, name)) != finer:
                raise ValueError(f"{name}: expected one for each of {finer} finer grains, got {getattr(self, name)}")
        check_shares(self.shares)
        if min(self.budget_weights) < 0:
            raise ValueError(f"budget_weights: expected at least 0, got {self.budget_weights}")
        if self.decoder_mults is not None and (len(self.decoder_mults) != levels or min(self.decoder_mults) < 1):
            raise ValueError(
                f"decoder_mults: expected {levels} levels, from the image to the finest grid, each at least 1, "
                f"got {self.decoder_mults}"
            )

    @property
    def fine_grid_size(self) -> int:
        """Codes a side where all cells have the finest grain."""
        return self.grid_size * 2 ** (self.grains - 1)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's levels, that of the images first."""
        mults = self.decoder_mults or self.mults[: len(self.mults) - self.grains + 1]
        return tuple(self.channels * mult for mult in mults)

    @property
    def decoder_attends(self) -> tuple[bool, ...]:
        """Whether each of the decoder's levels attends, that of the images first."""
        return tuple(self.image_size // 2**n in self.attention_resolutions for n in range(len(self.decoder_widths)))


class DynamicCodes(NamedTuple):
    """Images as codes of variable length.

    codes: (B, Hf, Wf) int64 on the finest grid, each code repeated over the square that it covers.
    grains: (B, Hc, Wc) int64, 0 the coarsest. `vqfast.ops.pack(codes, grains)` gives the codes as sequences.
    """

    codes: Tensor
    grains: Tensor

    @property
    def lengths(self) -> Tensor:
        """Codes of each image, (B,) int64."""
        return code_lengths(self.grains)


def grain_pictures(grains: Tensor, num_grains: int, image_size: int) -> Tensor:
    """Grain maps (B, Hc, Wc) as pictures (B, 1, S, S), from -1 where codes are coarsest to 1 where they are finest."""
    side = image_size // grains.shape[1]
    shade = 2 * grains.float() / max(num_grains - 1, 1) - 1
    return shade.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]


class DQVAE(Adversarial):
    """Encoder, router, codebook kept by moving averages, decoder, and the discriminator that they are trained against.

    Where a step has several batches, taken in turn or by several processes, the codebook takes one step by all their
    codes alike. The commitment loss is a mean over each batch's codes, and the budget is compared with each batch's
    share: the router says only in the pass how many codes there are. With different numbers of codes in the batches
    that is not quite what one large batch of the same images would give.

    Args:
        config: the model's make.
        perceptual: LPIPS with its weights, or None. Not part of the state dict.

    Raises:
        ValueError: a configuration that does not fit together.
    """

    def __init__(self, config: DQVAEConfig, perceptual: LPIPS | None = None):
        super().__init__()
        self.config = c = config
        shared = dict(blocks=c.num_res_blocks, dropout=c.dropout, groups=c.norm_groups)
        self.encoder = GrainEncoder(
            c.in_channels, c.channels, c.widths, c.z_channels, c.grains, attention=c.attends, **shared
        )
        self.router = _router(c)
        # 1 x 1 convolutions in the paper: in packed space each code is a row.
        self.quant_proj = nn.Linear(c.z_channels, c.code_dim)
        self.quantizer = VectorQuantize(
            c.code_dim,
            c.codebook_size,
            decay=c.decay,
            commitment_weight=c.commitment_weight,
            threshold_ema_dead_code=c.threshold_ema_dead_code,
        )
        self.post_quant_proj = nn.Linear(c.code_dim, c.z_channels)
        self.decoder = PositionalDecoder(
            c.z_channels,
            c.fine_grid_size,
            c.decoder_widths[::-1],
            c.in_channels,
            attention=c.decoder_attends[::-1],
            middle_attention=True,
            **shared,
        )
        self._add_judges(perceptual)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) to features (B, z_channels, Hc * 2^g, Wc * 2^g), coarsest first.

        Raises:
            ValueError: images of another shape than the configuration's.
        """
        check_images(images, self.config)
        return self.encoder(images)

    def encode(
        self,
        images: Tensor,
        *,
        target_codes: int | Sequence[int] | None = None,
        target_error: float | None = None,
    ) -> DynamicCodes:
        """Images (B, C, H, W) to codes.

        Args:
            images: float in [-1, 1].
            target_codes: number of codes for each image, or for all: from one a cell to all fine. The cells that the
                router would soonest give more codes get them. Where a number cannot be reached (a finer grain adds 3,
                12, ... codes) the image gets the largest below it.
            target_error: for each image the smallest number of codes with which the mean squared error of its
                reconstruction (values clipped to [-1, 1]) is below this. Found by bisection, as if the error fell with
                each code. An image that stays above it with all cells fine gets these, and nothing is raised: its
                `lengths` are fine_grid_size^2, and the error of `decode_codes` tells how far it came.

        Raises:
            ValueError: both targets, or one out of range.
        """
        if target_codes is not None and target_error is not None:
            raise ValueError("target_codes, target_error: expected one of them, got both")
        with torch.no_grad():
            features = self.features(images)
            routing = self.router.decide(features, images)
            if target_codes is not None:
                routing = self._with_codes(routing, target_codes)
            elif target_error is not None:
                routing = self._with_error(routing, features, images, target_error)
            return self._encode(features, routing)

    def decode_codes(self, codes: Tensor | DynamicCodes) -> Tensor:
        """Codes (B, Hf, Wf) on the finest grid to images (B, C, H, W), about [-1, 1], not clipped.

        Raises:
            TypeError, ValueError: another dtype or shape, or a code that is none.
        """
        codes = codes.codes if isinstance(codes, DynamicCodes) else codes
        check_indices(codes, self.config.codebook_size, name="codes")
        side = self.config.fine_grid_size
        if codes.shape[1:] != (side, side):
            raise ValueError(f"codes: expected shape (B, {side}, {side}), got {describe(codes)}")
        return self._decode(self.quantizer.get_codes_from_indices(codes))

    def reconstruct(self, images: Tensor, **targets) -> Tensor:
        """Images through the codes and back: (B, C, H, W). Targets as in `encode`."""
        return self.decode_codes(self.encode(images, **targets))

    @torch.no_grad()
    def evaluation_pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images of a batch, where their codes are, and what is left of them: each (B, C or 1, H, W)."""
        images = entry(batch, "image", self)
        codes = self.encode(images)
        return {
            "image": images,
            "grains": grain_pictures(codes.grains, self.config.grains, self.config.image_size),
            "reconstruction": self.decode_codes(codes),
        }

    def histograms(self) -> dict[str, Tensor]:
        """Moving-average count of each code, (K,), under "codebook"."""
        return {"codebook": self.quantizer.cluster_size}

    def quantize(self, selected: Tensor, grains: Tensor, freeze_codebook: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise features in packed space, so that a coarse code is searched, counted and paid for once.

        Args:
            selected: (B, z_channels, Hf, Wf), coarser features repeated, as `select_grains` returns them.
            grains: (B, Hc, Wc) int64.
            freeze_codebook: leave the codebook as it is, whatever the mode.

        Returns:
            quantized (B, Hf, Wf, code_dim), codes (B, Hf, Wf) int64, and the commitment loss: a mean over codes.
        """
        # On the CPU the number of codes is at hand: nothing is done for the tail.
        known = grains.device.type == "cpu" and not torch.compiler.is_compiling()
        capacity = int(code_lengths(grains).sum()) if known else None
        packed = pack(selected.permute(0, 2, 3, 1), grains, capacity=capacity)
        weights = None
        if self.config.counting == "positions":
            weights = code_weights(packed.grain_ids, self.config.grains).to(selected.dtype)[None]
        quantized, codes, loss = self.quantizer(
            self.quant_proj(packed.values)[None],
            mask=(packed.grain_ids >= 0)[None],
            weights=weights,
            freeze_codebook=freeze_codebook,
        )
        return (
            unpack(packed._replace(values=quantized[0]), grains, num_grains=self.config.grains),
            unpack(packed._replace(values=codes[0]), grains, num_grains=self.config.grains),
            loss,
        )

    def _model_step(self, images: Tensor, step: int) -> dict[str, Tensor]:
        c = self.config
        features = self.features(images)
        routing = self.router(features, images)
        quantized, _, commitment = self.quantize(select_grains(features, routing), routing.grains, False)
        terms = self._image_terms(images, self._decode(quantized).float(), step)
        loss, scalars = terms.loss + commitment, terms.scalars
        if c.router == "feature":
            gate = routing.gate
            if gate is None:  # of held-out images: what the decisions would cost
                gate = F.one_hot(routing.grains, c.grains).movedim(-1, 1).to(loss.dtype)
            budget = grain_budget_loss(gate, c.shares, c.budget_weights)
            loss, scalars = loss + budget, scalars | {"budget": budget.detach()}
        return {
            "loss": loss,
            **scalars,
            "codes": code_lengths(routing.grains).float().mean(),
            **codebook_scalars(self.quantizer, commitment=commitment),
        }

    def _encode(self, features: list[Tensor], routing: Routing) -> DynamicCodes:
        return DynamicCodes(self.quantize(select_grains(features, routing), routing.grains, True)[1], routing.grains)

    def _decode(self, quantized: Tensor) -> Tensor:
        """(B, Hf, Wf, code_dim) to images."""
        return self.decoder(self.post_quant_proj(quantized).permute(0, 3, 1, 2))

    def _with_codes(self, routing: Routing, target_codes: int | Sequence[int]) -> Routing:
        batch, cells = len(routing.grains), routing.grains[0].numel()
        targets = [target_codes] * batch if isinstance(target_codes, int) else [int(n) for n in target_codes]
        if len(targets) != batch:
            raise ValueError(
                f"target_codes: expected one number, or one for each of {batch} images, got {len(targets)}"
            )
        counts = [counts_for_codes(target, cells, self.config.shares) for target in targets]
        counts = torch.tensor(counts, device=routing.scores.device)
        return routing._replace(grains=ranked_grains(routing.scores, counts))

    def _with_error(self, routing: Routing, features: list[Tensor], images: Tensor, target_error: float) -> Routing:
        """Bisection over the numbers of codes that can be reached, all images at once, without a host sync."""
        if not target_error > 0:
            raise ValueError(f"target_error: expected a mean squared error above 0, got {target_error}")
        cells = routing.grains[0].numel()
        targets = range(cells, cells * 4 ** (self.config.grains - 1) + 1, 3)
        ladder = dict.fromkeys(counts_for_codes(target, cells, self.config.shares) for target in targets)
        ladder = torch.tensor(list(ladder), device=images.device)
        low = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        high = torch.full_like(low, len(ladder) - 1)
        for _ in range(len(ladder).bit_length()):
            middle = (low + high) // 2
            tried = routing._replace(grains=ranked_grains(routing.scores, ladder[middle]))
            output = self.decode_codes(self._encode(features, tried)).clamp(-1, 1)
            enough = (output - images).square().mean(dim=(1, 2, 3)) < target_error
            high = torch.where(enough, middle, high)
            low = torch.where(enough, low, (middle + 1).minimum(high))
        return routing._replace(grains=ranked_grains(routing.scores, ladder[high]))


def _router(config: DQVAEConfig) -> nn.Module:
    c = config
    if c.router == "feature":
        return FeatureRouter(c.z_channels, c.grains, c.router_layers, c.norm_groups)
    if c.router == "entropy":
        return EntropyRouter(c.downsampling, c.shares, c.entropy_per, c.entropy_thresholds)
    if c.router == "random":
        return RandomRouter(c.shares)
    return FixedRouter(c.grains - 1, c.grains)
