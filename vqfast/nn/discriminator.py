"""PatchGAN, the discriminator of VQGAN, and the losses of the two players."""

import torch.nn.functional as F
from torch import Tensor, nn

_SLOPE = 0.2
_WIDEST = 8  # times `channels`


class PatchDiscriminator(nn.Module):
    """Says of each patch of an image whether it is real (Isola et al. 2017, section 3.2.2).

    `layers` halvings with 4 x 4 convolutions, the width doubling up to 8 times the first, then two more convolutions
    that keep the resolution. With 3 layers a logit sees 70 x 70 pixels; 2,765,633 parameters at the defaults.

    Args:
        in_channels: of the images.
        channels: of the first convolution.
        layers: number of halvings, at least 1.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, layers: int = 3):
        super().__init__()
        for name, value in (("in_channels", in_channels), ("channels", channels), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.smallest = 3 * 2**layers
        widths = [channels * min(2**n, _WIDEST) for n in range(layers + 1)]
        main = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(_SLOPE)]
        for n in range(1, layers + 1):
            stride = 2 if n < layers else 1
            # BatchNorm takes the mean away: a bias before it would do nothing.
            main.append(nn.Conv2d(widths[n - 1], widths[n], 4, stride=stride, padding=1, bias=False))
            main += [nn.BatchNorm2d(widths[n]), nn.LeakyReLU(_SLOPE)]
        main.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*main)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of any float dtype in [-1, 1] to logits (B, 1, h, w), above 0 for real.

        Raises:
            ValueError: images too small to leave a logit.
        """
        if min(images.shape[-2:]) < self.smallest:
            raise ValueError(f"images: expected at least {self.smallest} pixels a side, got {tuple(images.shape)}")
        return self.main(images.to(self.main[0].weight.dtype))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


GAN_LOSSES = ("hinge", "vanilla")


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """What the discriminator minimises, from its logits of real and of made images (any shape).

    hinge: (mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2 (Lim & Ye 2017, Geometric GAN);
    vanilla: (mean softplus(-real) + mean softplus(fake)) / 2 (Goodfellow et al. 2014).

    Raises:
        ValueError: another kind.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if kind == "vanilla":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    raise ValueError(f"kind: expected one of {', '.join(GAN_LOSSES)}, got {kind!r}")


def generator_loss(fake: Tensor) -> Tensor:
    """What the generator minimises: -mean of the logits of its images."""
    return -fake.mean()


def balance_weight(reconstruction_grad: Tensor, generator_grad: Tensor) -> Tensor:
    """lambda = |grad of the reconstruction loss| / (|grad of the generator loss| + 1e-4), at most 1e4: a scalar.

    Both gradients are those of the decoder's last layer (Esser et al. 2021, eq. 7); with this weight the two losses
    pull equally hard. The offset is the released code's; the paper has 1e-6.
    """
    return (reconstruction_grad.norm() / (generator_grad.norm() + 1e-4)).clamp(0, 1e4).detach()
