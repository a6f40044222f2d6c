"""VQGAN checkpoints of taming-transformers (Esser et al. 2021)."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vqfast.models.converters.taming_names import count, discriminator_shape, plain_names, renamed, take, taming_name
from vqfast.models.vqgan import VQGAN, VQGANConfig
from vqfast.nn.discriminator import PatchDiscriminator

_LPIPS_PREFIX = re.compile(r"^(module\.)?(loss\.)?(perceptual_loss\.)?")
_CODEBOOK = "quantize.embedding.weight"


def vqgan_config(original: Mapping[str, Tensor], image_size: int = 256) -> VQGANConfig:
    """The configuration that the shapes of a checkpoint's tensors tell.

    What they do not tell (losses, their weights) keeps its default, but for the released code's legacy loss.

    Args:
        original: state dict of taming's VQModel.
        image_size: side of the images that the model was trained on, in pixels; tensors do not tell it.

    Raises:
        ValueError: not such a state dict, or an image size that the levels do not divide.
    """
    found = plain_names(original)
    shape = lambda name: take(found, name).shape
    levels = count(found, r"^encoder\.down\.(\d+)\.")
    channels, in_channels = shape("encoder.conv_in.weight")[:2]
    attends = [f"encoder.down.{level}.attn.0.q.weight" in found for level in range(levels)]
    return VQGANConfig(
        image_size=image_size,
        in_channels=in_channels,
        channels=channels,
        mults=tuple(shape(f"encoder.down.{level}.block.0.conv1.weight")[0] // channels for level in range(levels)),
        num_res_blocks=count(found, r"^encoder\.down\.0\.block\.(\d+)\."),
        attention_resolutions=tuple(image_size // 2**level for level in range(levels) if attends[level]),
        codebook_size=shape(_CODEBOOK)[0],
        code_dim=shape(_CODEBOOK)[1],
        z_channels=shape("encoder.conv_out.weight")[0],
        legacy_loss=True,
        **discriminator_shape(found),
    )


def vqgan_state_dict(original: Mapping[str, Tensor], image_size: int = 256) -> dict[str, Tensor]:
    """A VQGAN checkpoint under the names of `vqfast.models.vqgan.VQGAN`.

    Args:
        original: state dict of taming's VQModel, alone or of a whole training: what is not VQGAN's (the perceptual
            network, optimisers) is left out. Without a discriminator in it the result has a fresh one.
        image_size: see `vqgan_config`.

    Returns:
        State dict to load with strict=True into VQGAN(vqgan_config(original, image_size)).

    Raises:
        ValueError: not such a state dict, or a tensor of it is missing or of another shape (named).
    """
    config = vqgan_config(original, image_size)
    found = plain_names(original)
    with torch.device("meta"):
        expected = VQGAN(config).state_dict()
    # What a training watches is not in the original, and is filled in below.
    watched = {name for name in expected if name.startswith("quantizer.") and name != "quantizer.codebook"}
    judged = any(name.startswith("discriminator.") for name in found)
    wanted = {n: t for n, t in expected.items() if n not in watched and (judged or not n.startswith("discriminator."))}
    converted = renamed(found, wanted, lambda name: _original_name(name, config))
    if not judged:
        fresh = PatchDiscriminator(config.in_channels, config.disc_channels, config.disc_layers).state_dict()
        converted |= {f"discriminator.{name}": tensor for name, tensor in fresh.items()}
    codebook = converted["quantizer.codebook"]
    return converted | {
        "quantizer.cluster_size": torch.ones(config.codebook_size),
        "quantizer.embed_avg": codebook.clone(),
        "quantizer.idle": torch.zeros(config.codebook_size, dtype=torch.int64),
        "quantizer.initialised": torch.tensor(True),
    }


def lpips_state_dict(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of LPIPS under the names of `vqfast.nn.perceptual.LPIPS`.

    Args:
        original: tensors of a whole training of taming's VQGAN, which holds LPIPS, or of LPIPS alone; names that are
            torchvision's and LPIPS's already stay.

    Returns:
        name to tensor; what is not LPIPS's is left out.
    """
    found = {}
    for name, tensor in original.items():
        name = _LPIPS_PREFIX.sub("", name)
        name = re.sub(r"^net\.slice\d\.(?=\d)", "features.", name)
        if name.startswith(("features.", "lin")):
            found[name] = tensor
    return found


def _original_name(name: str, config: VQGANConfig) -> str:
    return _CODEBOOK if name == "quantizer.codebook" else taming_name(name, config.attends, config.attends)
