"""How to train, whatever the model."""

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints


@dataclass(frozen=True)
class TrainConfig:
    """How to train, whatever the model."""

    steps: int = 20_000
    """Training steps."""
    batch_size: int = 64
    """Images that each process takes at once."""
    accumulation: int = 1
    """Batches whose gradients make one training step."""
    lr: float = 3e-4
    """Highest learning rate."""
    warmup: int = 200
    """Steps over which the learning rate rises from 0; then it falls to 0 along a cosine."""
    weight_decay: float = 0.01
    """Of AdamW."""
    beta1: float = 0.9
    """Of AdamW."""
    beta2: float = 0.99
    """Of AdamW."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 never clips."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that is kept for use; 0 keeps the weights themselves."""
    explosion: float = 1000.0
    """A loss this many times its running mean ends the training, as one that is not finite does; 0 never."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the network (mixed precision; the ops of vqfast accumulate in float32)."""
    compile: bool = False
    """Compile the model by torch.compile: minutes at the start, faster steps after."""
    gradient_checkpointing: bool = False
    """Compute the activations of blocks anew in the backward pass: less memory, slower steps."""
    sharding: Literal["none", "full"] = "none"
    """With several processes: a whole model in each (DDP), or parameters and optimiser spread over them (FSDP2); a
    discriminator stays whole."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""
    seed: int = 0
    """Of weights, order of images and noise."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 500
    """Steps between two looks at held-out images; 0 never looks."""
    save_every: int = 1000
    """Steps between two checkpoints; the last step always makes one."""
    keep_last: int = 2
    """Newest checkpoints to keep; the one with the lowest loss on held-out images is kept beside them."""
    workers: int = 0
    """Processes that prepare batches."""
    tensorboard: bool = True
    """Write what TensorBoard shows, in RUN/tensorboard; --no-tensorboard does not."""

    def __post_init__(self):
        for name, hint in get_type_hints(TrainConfig).items():
            choices, value = get_args(hint), getattr(self, name)
            if choices and value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
            if hint is int and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{name}: expected a whole number, got {value!r}")
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip_norm", "eval_every", "workers", "explosion", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("ema_decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a number above 0, got {self.lr}")


# What a resumed run may change: none of it alters the steps that were taken.
FREE_ON_RESUME = (
    "steps", "device", "log_every", "eval_every", "save_every", "keep_last", "workers", "tensorboard", "explosion",
)  # fmt: skip


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step `step`, counted from 0: a linear rise over `warmup` steps, then half a cosine down to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
