"""Two players: an autoencoder whose images must please a perceptual loss and a discriminator (Esser et al. 2021)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.models.batch import entry
from vqfast.nn.discriminator import GAN_LOSSES, PatchDiscriminator, balance_weight, discriminator_loss, generator_loss
from vqfast.nn.perceptual import LPIPS, SMALLEST

# Gradients of a mean over pixels fall below what float16 holds; a power of two changes no other format's bits.
_GRADIENT_SCALE = 2.0**10


@dataclass(frozen=True)
class AdversarialConfig:
    """What images are compared by, beside their pixels."""

    perceptual_weight: float = 1.0
    """Weight of LPIPS, where its weights are given to the model."""
    disc_channels: int = 64
    """Width of the discriminator's first convolution."""
    disc_layers: int = 3
    """Halvings in the discriminator."""
    disc_loss: str = "hinge"
    """What the discriminator minimises: hinge or vanilla."""
    disc_start: int = 0
    """First training step in which the discriminator learns and is heard."""
    disc_weight: float = 0.8
    """Weight of the generator's loss, or of the adaptive weight; 0 trains without a discriminator."""
    adaptive_disc_weight: bool = True
    """Weigh the generator's loss so that it pulls at the decoder's last layer as hard as the reconstruction does."""
    disc_weight_max: float | None = None
    """Largest weight of the generator's loss; no limit by default."""

    def __post_init__(self):
        if self.disc_loss not in GAN_LOSSES:
            raise ValueError(f"disc_loss: expected one of {', '.join(GAN_LOSSES)}, got {self.disc_loss!r}")
        for name in ("perceptual_weight", "disc_start", "disc_weight", "disc_weight_max"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")


class ImageTerms(NamedTuple):
    """What a player's image costs.

    loss: scalar, reconstruction + perceptual (weighted) + generator (weighted).
    scalars: its parts without gradient: reconstruction (mean |error|), perceptual, generator, disc_weight.
    """

    loss: Tensor
    scalars: dict[str, Tensor]


class Adversarial(nn.Module):
    """Adds a discriminator, and the turns of a training with two players, to an autoencoder.

    The autoencoder, the other base class, has `config` (with the fields of `AdversarialConfig`), `decoder.conv_out`,
    `reconstruct(images)` and `_model_step(images, step)`, its training step, whose loss holds that of `_image_terms`.

    Where a step has several batches, taken in turn or by several processes, each is judged by itself: the
    discriminator's batch norms normalise by its statistics, and the adaptive weight is of its gradients. One large
    batch of the same images is another training; so it is in the code released with VQGAN.

    Without `perceptual` there is no perceptual term: `has_perceptual_loss` says so, as does the printed module.
    """

    @property
    def training_parts(self) -> tuple[str, ...]:
        """Who takes turns: the model, and the discriminator unless its weight is 0."""
        return ("model", "discriminator") if self.config.disc_weight > 0 else ("model",)

    def _add_judges(self, perceptual: LPIPS | None) -> None:
        """Make the discriminator and take the perceptual loss in; called last in __init__.

        Raises:
            ValueError: images too small for either.
        """
        c = self.config
        self.discriminator = PatchDiscriminator(c.in_channels, c.disc_channels, c.disc_layers)
        if c.disc_weight == 0:
            self.discriminator.requires_grad_(False)
        elif c.image_size < self.discriminator.smallest:
            raise ValueError(
                f"disc_layers: {c.disc_layers} need images of at least {self.discriminator.smallest} pixels a side, "
                f"got image_size {c.image_size}"
            )
        if perceptual is not None and c.image_size < SMALLEST:
            raise ValueError(f"perceptual: needs images of at least {SMALLEST} pixels a side, got {c.image_size}")
        self.perceptual = perceptual
        # The images of the last batch and what the model made of them, for the discriminator's turn.
        self._made: tuple[Tensor, Tensor] | None = None

    @property
    def has_perceptual_loss(self) -> bool:
        return self.perceptual is not None and self.config.perceptual_weight > 0

    def part_parameters(self, part: str) -> list[nn.Parameter]:
        """What the optimiser of a part moves: the discriminator, or all else that is not frozen."""
        self._check_part(part)
        judges = set(self.discriminator.parameters())
        if part == "discriminator":
            return list(self.discriminator.parameters())
        return [p for p in self.parameters() if p.requires_grad and p not in judges]

    def training_step(self, batch: dict[str, Tensor], step: int, part: str = "model") -> dict[str, Tensor]:
        """Loss of one batch for one of the two players, and what to watch.

        The model's turn comes first; the discriminator then judges the images made in it, if the batch is the same.
        Without gradients (held-out images) the model's loss leaves the generator's term out: its adaptive weight is
        made of gradients.

        Args:
            batch: {"image": (B, C, H, W) float in [-1, 1]}.
            step: training steps done, against config.disc_start.
            part: "model" or "discriminator".

        Returns:
            Scalars. model: loss, the sum of its terms (weighted); each of these, disc_weight (0 before disc_start),
            usage (share of the codes chosen in the last 100 batches), perplexity. discriminator: loss (0 before
            disc_start), logits_real, logits_fake.

        Raises:
            ValueError: another part.
        """
        self._check_part(part)
        images = entry(batch, "image", self)
        if part == "discriminator":
            return self._discriminator_step(images, step)
        return self._model_step(images, step)

    def _image_terms(self, images: Tensor, output: Tensor, step: int) -> ImageTerms:
        """Judge what the model made of images; both (B, C, H, W), output float32."""
        c = self.config
        zero = output.new_zeros(())
        error = reconstruction = F.l1_loss(output, images)
        perceptual = zero
        if self.has_perceptual_loss:
            perceptual = self.perceptual(output, images).mean()
            error = error + c.perceptual_weight * perceptual
        loss = error
        generator = weight = zero
        if torch.is_grad_enabled() and step >= c.disc_start and c.disc_weight > 0:
            generator = generator_loss(self._judge(output))
            weight = zero + c.disc_weight
            if c.adaptive_disc_weight:
                weight = weight * self._balance(error, generator)
            if c.disc_weight_max is not None:
                weight = weight.clamp(max=c.disc_weight_max)
            loss = loss + weight * generator
        if self.training:
            self._made = images, output.detach()
        terms = {"reconstruction": reconstruction, "perceptual": perceptual, "generator": generator}
        return ImageTerms(loss, {name: term.detach() for name, term in terms.items()} | {"disc_weight": weight})

    def _discriminator_step(self, images: Tensor, step: int) -> dict[str, Tensor]:
        made, self._made = self._made, None
        if made is None or made[0] is not images:
            with torch.no_grad():
                made = images, self.reconstruct(images).float()
        real, fake = self.discriminator(images), self.discriminator(made[1])
        loss = discriminator_loss(real.float(), fake.float(), self.config.disc_loss)
        return {
            "loss": loss * float(step >= self.config.disc_start),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }

    def _judge(self, output: Tensor) -> Tensor:
        """Logits whose gradient goes to the images alone: the discriminator's own would be the wrong way round."""
        constant = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return torch.func.functional_call(self.discriminator, constant, (output,)).float()

    def _balance(self, error: Tensor, generator: Tensor) -> Tensor:
        """The adaptive weight, from gradients of this process and batch."""
        last = self.decoder.conv_out.weight
        of_error, of_generator = (
            torch.autograd.grad(loss * _GRADIENT_SCALE, last, retain_graph=True)[0].float() / _GRADIENT_SCALE
            for loss in (error, generator)
        )
        return balance_weight(of_error, of_generator)

    def _check_part(self, part: str) -> None:
        if part not in self.training_parts:
            raise ValueError(f"part: expected one of {', '.join(self.training_parts)}, got {part!r}")

    def extra_repr(self) -> str:
        return f"perceptual loss: {'on' if self.has_perceptual_loss else 'off (no weights given)'}"
