"""Names that taming-transformers gives to the blocks of an autoencoder, and that code which took them over shares."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Before the names: the wrapper of a distributed training, and the loss module that held the discriminator.
_PREFIX = re.compile(r"^(module\.)?(loss\.(?=discriminator\.))?")
_TO_TAMING = [
    (r"\.middle\.0\.", ".mid.block_1."),
    (r"\.middle\.1\.", ".mid.attn_1."),
    (r"\.middle\.2\.", ".mid.block_2."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.out\.", ".proj_out."),
]
_LEVEL = re.compile(r"^(encoder|decoder)\.(levels|downsamples|upsamples)\.(\d+)\.(.*)$")


def plain_names(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what a distributed training, or the loss module, puts before their names."""
    return {_PREFIX.sub("", name): tensor for name, tensor in original.items()}


def taming_name(name: str, encoder_attends: tuple[bool, ...], decoder_attends: tuple[bool, ...]) -> str:
    """The original's name of a tensor of an encoder or decoder of ours.

    Args:
        name: of ours.
        encoder_attends: whether each level attends, that of the images first.
        decoder_attends: the same of the decoder's levels, in the same order.
    """
    level = _LEVEL.match(name)
    if level:
        side, list_name, number, rest = level.groups()
        attends = encoder_attends if side == "encoder" else decoder_attends
        index = int(number)
        if side == "decoder":  # counted from the highest resolution there
            index = len(attends) - 1 - index
        if list_name == "levels":
            block, rest = rest.split(".", 1)
            kind = "block"
            if attends[index]:  # blocks and attention take turns
                kind, block = ("block", "attn")[int(block) % 2], str(int(block) // 2)
            rest = f"{kind}.{block}.{rest}"
        else:
            rest = f"{list_name.removesuffix('s')}.{rest}"
        name = f"{side}.{'down' if side == 'encoder' else 'up'}.{index}.{rest}"
    for pattern, replacement in _TO_TAMING:
        name = re.sub(pattern, replacement, name)
    return name


def renamed(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], original_name: Callable[[str], str]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint under our names.

    Args:
        found: the checkpoint.
        expected: our names, with tensors of the shapes wanted.
        original_name: from our name of a tensor to that in the checkpoint.

    Raises:
        ValueError: a tensor is missing or of another shape (named).
    """
    converted = {}
    for name, tensor in expected.items():
        if ".qkv." in name:
            # One convolution for queries, keys and values, where the original has three.
            parts = [original_name(name.replace(".qkv.", f".{part}.")) for part in "qkv"]
            third = tensor[: len(tensor) // 3]
            converted[name] = torch.cat([fitting(found, part, third) for part in parts])
        else:
            converted[name] = fitting(found, original_name(name), tensor)
    return converted


def take(found: Mapping[str, Tensor], name: str) -> Tensor:
    """That tensor of a checkpoint. Raises ValueError where it is missing."""
    if name not in found:
        raise ValueError(
            f"original: expected an autoencoder of taming's blocks, but {name} is missing; "
            f"got keys {', '.join(list(found)[:3])}, ..."
        )
    return found[name]


def fitting(found: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """That tensor of a checkpoint in the shape of `like`. Raises ValueError where it is missing or does not fit."""
    tensor = take(found, name)
    if tensor.numel() != like.numel() or (tensor.ndim == like.ndim and tensor.shape != like.shape):
        raise ValueError(f"original: expected {name} of shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
    # 1 x 1 convolutions are matrices in some versions, and in packed space.
    return tensor.reshape(like.shape)


def count(found: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number at the group of the pattern. Raises ValueError where nothing matches."""
    numbers = [int(match.group(1)) for name in found if (match := re.match(pattern, name))]
    if not numbers:
        raise ValueError(
            f"original: expected an autoencoder of taming's blocks, got keys {', '.join(list(found)[:3])}, ..."
        )
    return max(numbers) + 1


def discriminator_shape(found: Mapping[str, Tensor]) -> dict[str, int]:
    """disc_channels and disc_layers of the discriminator in a checkpoint; empty where it has none."""
    if "discriminator.main.0.weight" not in found:
        return {}
    weights = [tensor for name, tensor in found.items() if re.match(r"discriminator\.main\.\d+\.weight", name)]
    convolutions = sum(weight.ndim == 4 for weight in weights)
    return dict(disc_channels=found["discriminator.main.0.weight"].shape[0], disc_layers=convolutions - 2)
