"""Checkpoints of VQ-DDM's released code (arXiv 2112.01799)."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vqfast.models.vqddm import VQDDM, VQDDMConfig

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


def vqddm_config(
    original: Mapping[str, Tensor], *, grid: tuple[int, int] = (16, 16), parameterisation: str = "x0"
) -> VQDDMConfig:
    """The configuration that the shapes of a VQ-DDM checkpoint's tensors tell.

    Args:
        original: as for `vqddm_unet_state_dict`.
        grid: (H, W) of the codes; tensors do not tell it.
        parameterisation: "x0" for CelebA and LSUN, "residual" for the released class for ImageNet; nor this.

    Raises:
        ValueError: no U-Net in it.
    """
    net = vqddm_unet_state_dict(original)
    K, dim = net["embedding.weight"].shape
    widths = [
        value.shape[0] for name, value in net.items() if re.fullmatch(r"downs\.\d+\.res1\.block1\.conv\.weight", name)
    ]
    return VQDDMConfig(
        K,
        grid=grid,
        dim=dim,
        mults=tuple(width // dim for width in widths),
        T=_levels(original),
        schedule="cosine_released",
        parameterisation=parameterisation,
    )


def vqddm_state_dict(original: Mapping[str, Tensor], config: VQDDMConfig) -> dict[str, Tensor]:
    """A VQ-DDM checkpoint under the names of `vqfast.models.vqddm.VQDDM`.

    Args:
        original: as for `vqddm_unet_state_dict`; its running losses come along where it has them.
        config: of the model, from `vqddm_config`.

    Returns:
        State dict to load with strict=True.

    Raises:
        ValueError: no U-Net in it, or one with tensors missing, of another shape or too many (named).
    """
    converted = {f"denoiser.{name}": tensor for name, tensor in vqddm_unet_state_dict(original).items()}
    plain = {name.removeprefix("module."): tensor for name, tensor in original.items()}
    history, count = plain.get("_denoising.Lt_history"), plain.get("_denoising.Lt_count")
    converted["diffusion.loss_history"] = torch.zeros(config.T) if history is None else history.float()
    converted["diffusion.loss_count"] = torch.zeros(config.T).long() if count is None else count.long()
    expected = VQDDM(config).state_dict()
    for problem, names in {
        "lacks": expected.keys() - converted.keys(),
        "has no place for": converted.keys() - expected.keys(),
        "has another shape of": {
            name for name in expected.keys() & converted.keys() if expected[name].shape != converted[name].shape
        },
    }.items():
        if names:
            raise ValueError(f"original: the checkpoint {problem} {', '.join(sorted(names)[:4])}")
    return converted


def _levels(original: Mapping[str, Tensor]) -> int:
    """T, from the length of a table, or the published one."""
    for name, tensor in original.items():
        if name.endswith("_denoising.log_alpha"):
            return len(tensor)
    return 4000
