"""What a model offers to be trained, and one part of it with its optimiser.

A model has a dataclass `config` and

    training_step(batch: dict[str, Tensor], step: int) -> {"loss": scalar, ...scalars to log}

A model with several optimisers names them in `training_parts`, such as ("model", "discriminator"), and has

    training_step(batch, step, part="model")
    part_parameters(part) -> list[nn.Parameter]

Each step goes through the parts in that order: loss, backward, and an optimiser step before the next part begins.
Only the parameters of the part at work want gradients meanwhile, so that a generator's loss may pass through a
discriminator. A later part may use what the first left detached for the same batch; moving averages are taken in the
first part only. With accumulation every batch goes through the parts in turn, and the optimisers step after the last.

A step of several batches, taken in turn (accumulation) or by several processes, is the mean of their losses: it is the
same for both, and where a batch's loss is a mean over its examples, the same as of one large batch. Where it is a mean
over something that batches have different numbers of, a model that knows these beforehand offers

    loss_counts(batch) -> (n,) float tensor

and finds the mean of them over all batches of the step in batch["loss_counts"], to divide its sums by in place of its
own counts: the mean of the batches' losses is then again that of one large batch.

A model may also offer, for evaluation,

    evaluation_pictures(batch) -> {name: (N, C, H, W) float in [-1, 1]}
    histograms() -> {name: tensor of any shape}
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqfast.train.config import TrainConfig, learning_rate
from vqfast.train.processes import whole

WHOLE = "model"


def training_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of each part, in the order in which the parts take their step.

    Raises:
        ValueError: a part that trains nothing, or a parameter that belongs to two.
    """
    names = tuple(getattr(model, "training_parts", (WHOLE,)))
    whole = not hasattr(model, "training_parts")
    parts = {}
    owner: dict[int, str] = {}
    for name in names:
        parameters = model.parameters() if whole else model.part_parameters(name)
        parts[name] = [p for p in parameters if p.requires_grad]
        if not parts[name]:
            raise ValueError(f"training_parts: expected parameters to train in part {name!r}, got none")
        for parameter in parts[name]:
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(f"training_parts: {owner[id(parameter)]!r} and {name!r} share a parameter")
    return parts


class PartStep(nn.Module):
    """Makes a part's `training_step` a forward pass, which is what compilers and distributed wrappers hook."""

    def __init__(self, model: nn.Module, part: str):
        super().__init__()
        self.model = model
        self._part = {"part": part} if hasattr(model, "training_parts") else {}

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        return self.model.training_step(batch, step, **self._part)


class Part:
    """One part of a model in training: AdamW, warm-up and cosine, clipping, loss scaling for fp16.

    Args:
        name: of the part.
        parameters: what its optimiser moves.
        step: the part's `PartStep`, wrapped for several processes or not.
        config: how to train.
        device: where the parameters are.
    """

    def __init__(
        self, name: str, parameters: list[nn.Parameter], step: nn.Module, config: TrainConfig, device: torch.device
    ):
        self.name, self.parameters, self.step = name, parameters, step
        self._config = config
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            # Fused, the optimiser itself skips a step whose scaled gradients overflowed; else the host has to look.
            fused=device.type == "cuda",
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self, step: int) -> Tensor:
        """Take the optimiser's step and return the norm of the gradient before clipping, a scalar on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self._config, step)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self._config.clip_norm or float("inf"))
        norm = whole(norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm


@contextmanager
def only(part: Part, parts: list[Part]) -> Iterator[None]:
    """Inside, no parameter of another part wants a gradient."""
    others = [parameter for other in parts if other is not part for parameter in other.parameters]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
