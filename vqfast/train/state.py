"""Everything that the next step of a training depends on, as named tensors; the position in the data is the step.

Random numbers are not among it: those of a batch depend on the seed and on the batch's place alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqfast.train.average import WeightAverage
from vqfast.train.parts import Part
from vqfast.train.processes import local, spread_like, whole


def training_tensors(model: nn.Module, parts: Sequence[Part], average: WeightAverage | None) -> dict[str, Tensor]:
    """Optimisers, and the weights in training where those to use are another average.

    With sharded parameters every process must call this at the same time.
    """
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for number, state in part.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{part.name}.{number}.{name}"] = whole(torch.as_tensor(value))
    if average is not None:
        tensors |= {f"model.{name}": value for name, value in model_tensors(model).items()}
    return tensors


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state dict on the host, unsharded."""
    return {name: whole(value.detach()).to("cpu", copy=True) for name, value in model.state_dict().items()}


def training_values(parts: Sequence[Part]) -> dict[str, Any]:
    """The plain values that go with the tensors."""
    return {"scaler": {part.name: part.scaler.state_dict() for part in parts if part.scaler.is_enabled()}}


def restore(
    model: nn.Module,
    parts: Sequence[Part],
    average: WeightAverage | None,
    weights: dict[str, Tensor],
    tensors: dict[str, Tensor],
    values: dict[str, Any],
) -> None:
    """Put a training back where it was.

    Raises:
        KeyError, ValueError, RuntimeError: the tensors are not those of such a training.
    """
    load_whole(model, weights)
    if average is not None:
        for value, parameter in zip(average.values, parts[0].parameters, strict=True):
            value.copy_(local(parameter.detach()))
        load_whole(model, under("model.", tensors))
    for part in parts:
        found = under(f"optimizer.{part.name}.", tensors)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in found.items():
            number, entry = name.split(".", 1)
            state.setdefault(int(number), {})[entry] = spread_like(value, part.parameters[int(number)])
        part.optimizer.load_state_dict(part.optimizer.state_dict() | {"state": state})
        if part.scaler.is_enabled() and part.name in values.get("scaler", {}):
            part.scaler.load_state_dict(values["scaler"][part.name])


@torch.no_grad()
def load_whole(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a state dict of full tensors into a model that may be sharded."""
    reference = model.state_dict()
    model.load_state_dict({n: spread_like(v, reference[n]) if n in reference else v for n, v in weights.items()})


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
