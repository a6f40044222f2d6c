"""Checkpoints of the released code, renamed to the modules here."""

import re
from collections.abc import Mapping

from torch import Tensor

# A training checkpoint holds the network twice; the second copy is the same tensors.
_UNET_PREFIX = re.compile(r"^(module\.)?(_nn\.|_denoising\._denoise_fn\.)?")
_UNET_SKIP = re.compile(r"^(module\.)?_denoising\.(log_|Lt_)")
_UNET_NAMES = [
    (r"^mlp\.", "time_mlp."),
    (r"^(downs|ups)\.(\d+)\.0\.", r"\1.\2.res1."),
    (r"^(downs|ups)\.(\d+)\.1\.", r"\1.\2.res2."),
    (r"^(downs|ups)\.(\d+)\.2\.", r"\1.\2.attention."),
    (r"^(downs|ups)\.(\d+)\.3\.conv\.", r"\1.\2.resample."),
    (r"^mid_block([12])\.", r"mid_res\1."),
    (r"^mid_attn\.", "mid_attention."),
    (r"attention\.fn\.g$", "attention.gate"),
    (r"attention\.fn\.fn\.to_", "attention."),
    (r"\.mlp\.1\.", ".time.1."),
    (r"\.res_conv\.", ".shortcut."),
    (r"^final_conv\.0\.", "out_block."),
    (r"^final_conv\.1\.", "head."),
    (r"\bblock\.0\.", "conv."),
    (r"\bblock\.1\.", "norm."),
]


def vqddm_unet_state_dict(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net of a VQ-DDM checkpoint under the names of `vqfast.models.unet.UNet`.

    Args:
        original: state dict of the released code's unconditional U-Net, alone or inside a training checkpoint
            (under `_nn.` and `_denoising._denoise_fn.`; its schedule and loss tables are left out).

    Returns:
        State dict to load with strict=True.

    Raises:
        ValueError: no U-Net in it.
    """
    converted = {}
    for key, tensor in original.items():
        if _UNET_SKIP.match(key):
            continue
        name = _UNET_PREFIX.sub("", key)
        for pattern, replacement in _UNET_NAMES:
            name = re.sub(pattern, replacement, name)
        # The last convolution is 1 x 1: a linear layer over the channels of a cell.
        converted[name] = tensor.flatten(1) if name == "head.weight" else tensor
    if "embedding.weight" not in converted or "head.weight" not in converted:
        some = ", ".join(list(original)[:3])
        raise ValueError(f"original: expected a VQ-DDM U-Net with embedding and final_conv, got keys {some}, ...")
    return converted
