"""Weights that other code saved: tensors are read, nothing in the file is ever run."""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vqfast.train.errors import RunError

# Where trainers put the network in a checkpoint.
_NESTS = ("state_dict", "model", "model_state_dict")
# Classes of these, which a training checkpoint names beside its tensors, are read as plain dictionaries: they need not
# be installed, and nothing of them is run.
_TRAINERS = re.compile(r"^(pytorch_lightning|lightning|lightning_fabric|omegaconf)\.")


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of what torch.save wrote (.ckpt, .pt, .pth), on the CPU.

    A checkpoint of a training gives its network: what stands under "state_dict", "model" or "model_state_dict".

    Raises:
        RunError: no such file, not a checkpoint, one that names code to run, or one without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no such file")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for nest in _NESTS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(nest), Mapping):
            loaded = loaded[nest]
    tensors = {}
    if isinstance(loaded, Mapping):
        tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and torch.is_tensor(value)}
    if not tensors:
        raise RunError(f"{path}: holds no tensors by name")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> object:
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        stand_ins = [(OrderedDict, name) for name in named if _TRAINERS.match(name)]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise RunError(f"{path}: names code ({code.group(1)}), and only tensors are read from it") from error
        raise RunError(f"{path}: not a checkpoint that torch.save wrote, or one cut short") from error
