"""Training for a given time, so that models whose steps differ in cost can be compared."""

import math
import time
from collections.abc import Callable

import torch
from torch import nn

from vqfast.data import CodeBatches, ShuffledSteps


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fit_for(
    model: nn.Module,
    codes: CodeBatches,
    seconds: float,
    *,
    batch_size: int,
    lr: float,
    seed: int = 0,
    report: Callable[[float], None] = lambda seconds: None,
) -> int:
    """Train a model with AdamW for a time; the learning rate falls to 0 along half a cosine of the time.

    Args:
        model: with `training_step(batch, step)`; left in eval mode.
        codes: what to train on.
        seconds: when to stop; at least one step is taken.
        report: told after each step how many seconds it took.

    Returns:
        Steps taken.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    device = next(model.parameters()).device
    start = before = clock(device)
    model.train()
    for step, positions in enumerate(ShuffledSteps(len(codes), batch_size, range(2**40), seed)):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (before - start) / seconds))
        optimizer.zero_grad()
        batch = {name: values.to(device) for name, values in codes[positions].items()}
        model.training_step(batch, step)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        now = clock(device)
        report(now - before)
        before = now
        if now - start >= seconds:
            break
    model.eval()
    return step + 1
