"""Checkpoints of DQ-VAE's released code (Huang et al. 2023, arXiv 2305.11718)."""

import re
from collections.abc import Mapping

from torch import Tensor

from vqfast.models.converters.taming_names import count, discriminator_shape, plain_names, renamed, take, taming_name
from vqfast.models.dqvae import DQVAE, DQVAEConfig

_GRAINS = {2: ("coarse", "fine"), 3: ("coarse", "median", "fine")}
_BUDGET = {2: (20.0,), 3: (1.0, 1.0)}  # the released code counts the term of two grains twice
_CODEBOOK = "quantize.codebook.weight"
_OWN = ("quantizer.idle", "quantizer.initialised", "router.histogram")
_TO_RELEASED = {
    "quantizer.codebook": _CODEBOOK,
    "quantizer.cluster_size": "quantize.codebook.cluster_size_ema",
    "quantizer.embed_avg": "quantize.codebook.embed_ema",
    "decoder.fourier.conv.": "decoder.position_bias_fourier.lff.ffm.conv.",
    "decoder.learned.rows": "decoder.position_bias_learned.row_embed.weight",
    "decoder.learned.columns": "decoder.position_bias_learned.col_embed.weight",
    "quant_proj.": "quant_conv.",
    "post_quant_proj.": "post_quant_conv.",
}


def dqvae_config(original: Mapping[str, Tensor]) -> DQVAEConfig:
    """The configuration that the shapes of a checkpoint's tensors tell.

    What they do not tell (shares, losses and their weights) is that of the released configurations. A checkpoint
    without a router is one of the entropy router; it does not hold the thresholds: until the model has been shown
    training images, the shares hold in each image.

    Args:
        original: state dict of the released DualGrainVQModel or TripleGrainVQModel.

    Raises:
        ValueError: not such a state dict.
    """
    found = plain_names(original)
    shape = lambda name: take(found, name).shape
    codes, code_dim = shape(_CODEBOOK)
    grid = shape("decoder.position_bias_learned.row_embed.weight")[0]
    grains = 3 if "encoder.conv_out_median.weight" in found else 2
    up, down = count(found, r"^decoder\.up\.(\d+)\."), count(found, r"^encoder\.down\.(\d+)\.")
    size = grid * 2 ** (up - 1)
    channels, in_channels = shape("encoder.conv_in.weight")[:2]
    gates = [name for name in found if re.match(r"encoder\.router\.gate\b.*weight", name)]
    width = lambda side, level: shape(f"{side}.{level}.block.0.conv1.weight")[0] // channels
    attends = lambda side, level: f"{side}.{level}.attn.0.q.weight" in found
    sides = {size // 2**level for level in range(down) if attends("encoder.down", level)}
    return DQVAEConfig(
        image_size=size,
        in_channels=in_channels,
        channels=channels,
        mults=tuple(width("encoder.down", level) for level in range(down)),
        decoder_mults=tuple(width("decoder.up", level) for level in range(up)),
        num_res_blocks=count(found, r"^encoder\.down\.0\.block\.(\d+)\."),
        attention_resolutions=tuple(sorted(sides)),
        codebook_size=codes - 1,
        code_dim=code_dim,
        z_channels=shape("encoder.conv_out_coarse.weight")[0],
        grains=grains,
        router="feature" if gates else "entropy",
        router_layers=len(gates) or 2,
        budget_weights=_BUDGET[grains],
        **discriminator_shape(found),
    )


def dqvae_state_dict(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DQ-VAE checkpoint under the names of `vqfast.models.dqvae.DQVAE`.

    The padding row of the released codebook, its last, is left out: packed sequences need none.

    Args:
        original: state dict of the released DualGrainVQModel or TripleGrainVQModel, alone or of a whole training.
            Without a discriminator in it the result has a fresh one.

    Returns:
        State dict to load with strict=True into DQVAE(dqvae_config(original)).

    Raises:
        ValueError: not such a state dict, or a tensor of it is missing or of another shape (named).
    """
    config = dqvae_config(original)
    found = plain_names(original)
    model = DQVAE(config)
    expected = model.state_dict()
    judged = any(name.startswith("discriminator.") for name in found)
    # What the original does not have stays as in a fresh model.
    fresh = {n for n in expected if n in _OWN or (n.startswith("discriminator.") and not judged)}
    wanted = {name: tensor for name, tensor in expected.items() if name not in fresh}
    wanted["quantizer.codebook"] = expected["quantizer.codebook"].new_empty(config.codebook_size + 1, config.code_dim)
    converted = renamed(found, wanted, lambda name: _released_name(name, model))
    converted["quantizer.codebook"] = converted["quantizer.codebook"][:-1]
    return converted | {name: expected[name] for name in fresh}


def _released_name(name: str, model: DQVAE) -> str:
    """The original's name of a tensor of ours."""
    grains = _GRAINS[model.config.grains]
    for ours, released in _TO_RELEASED.items():
        if name.startswith(ours):
            return released + name.removeprefix(ours)
    if router := re.match(r"^router\.norms\.(\d)\.(.*)$", name):
        return f"encoder.router.feature_norm_{grains[int(router[1])]}.{router[2]}"
    if name.startswith("router.gate."):
        if model.config.router_layers == 1:  # a bare layer there
            name = name.replace("gate.0.", "gate.")
        return f"encoder.{name}"
    if head := re.match(r"^encoder\.heads\.(\d)\.(\d)\.(.*)$", name):
        grain = grains[int(head[1])]
        if head[2] == "0":
            return taming_name(f"encoder.middle.{head[3]}", (), ()).replace(".mid.", f".mid_{grain}.")
        return f"encoder.{'norm' if head[2] == '1' else 'conv'}_out_{grain}.{head[3]}"
    return taming_name(name, model.config.attends, model.config.decoder_attends)
