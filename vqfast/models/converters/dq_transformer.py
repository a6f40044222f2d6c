"""Checkpoints of the released DQ-Transformer (CrossmodalGroup/DynamicVectorQuantization)."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_STACK_NAMES = [
    (r"^(position|content)_transformer\.", r"\1_stack.blocks."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.attn\.proj\.", ".out."),
    (r"^content_emb\.", "content_embedding."),
    (r"^seg_emb\.", "grain_embedding."),
]
_STACK_PARTS = ("position_stack.", "content_stack.", "position_head.", "content_head.", "content_emb", "grain_emb")


def dq_transformer_state_dict(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released DQ-Transformer under the names of `vqfast.models.dq_transformer.DQTransformer`.

    Args:
        original: state dict of the released code's transformer over two grains, with or without classes, alone or
            inside a training checkpoint (under `transformer.`; what else that holds is left out).

    Returns:
        State dict to load with strict=True.

    Raises:
        ValueError: no such transformer in it.
    """
    prefix = "transformer." if "transformer.pos_emb" in original else ""
    state = {name.removeprefix(prefix): value for name, value in original.items() if name.startswith(prefix)}
    needed = ("pos_emb", "content_coarse_pos_emb.weight", "content_fine_pos_emb.weight", "content_emb.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"original: expected a DQ-Transformer of two grains, which has {', '.join(missing)}")
    converted = {
        "index_embedding.weight": state.pop("pos_emb")[0],
        "position_embedding.weight": torch.cat(
            [state.pop(f"content_{grain}_pos_emb.weight") for grain in ("coarse", "fine")]
        ),
    }
    for key, tensor in state.items():
        name = key
        for pattern, replacement in _STACK_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".attn.mask") or not name.startswith(_STACK_PARTS):
            continue
        if (part := re.fullmatch(r"(.*)\.attn\.query\.(weight|bias)", name)) is not None:
            fused = [state[key.replace(".query.", f".{kind}.")] for kind in ("query", "key", "value")]
            converted[f"{part[1]}.qkv.{part[2]}"] = torch.cat(fused)
        elif ".attn." not in name:
            converted[name] = tensor
    return converted
