"""The training loop: Accelerate for devices, precision and processes; AdamW, checkpoints, metrics."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from vqfast.data import ShuffledSteps
from vqfast.train.average import WeightAverage
from vqfast.train.checkpoint import (
    TRAINING,
    WEIGHTS,
    kind_of,
    newest_checkpoint,
    read_tensors,
    save_checkpoint,
    saved_checkpoints,
)
from vqfast.train.errors import RunError

METRICS_FILE = "metrics.jsonl"
_NEVER = 2**62


@dataclass(frozen=True)
class TrainConfig:
    """How to train, whatever the model."""

    steps: int = 20_000
    """Training steps."""
    batch_size: int = 64
    """Images a step, for each process."""
    lr: float = 3e-4
    """Highest learning rate."""
    warmup: int = 200
    """Steps over which the learning rate rises from 0; then it falls to 0 along a cosine."""
    weight_decay: float = 0.01
    """Of AdamW."""
    beta2: float = 0.99
    """Of AdamW; beta1 is 0.9."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 never clips."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that is kept for use; 0 keeps the weights themselves."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the network (mixed precision; the ops of vqfast accumulate in float32)."""
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
    workers: int = 0
    """Processes that prepare batches."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip_norm", "eval_every", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("ema_decay", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a number above 0, got {self.lr}")


# What a resumed run may change: none of it alters the steps that were taken.
FREE_ON_RESUME = ("steps", "device", "log_every", "eval_every", "save_every", "workers")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step `step`, counted from 0: a linear rise over `warmup` steps, then half a cosine down to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class _Step(nn.Module):
    """Makes `training_step` the forward pass, which is what wrappers such as DistributedDataParallel hook."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        return self.model.training_step(batch, step)


def train(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig,
    out: Path,
    *,
    held_out: Dataset | None = None,
    resume: bool = False,
) -> nn.Module:
    """Train a model and leave checkpoints and metrics.jsonl in a run folder.

    Args:
        model: with `training_step(batch, step) -> {"loss": scalar, ...scalars to log}` and a dataclass `config`.
        dataset: indexed by an array of positions, gives a batch of tensors; see vqfast.data.
        config: how to train.
        out: folder of the run, made by `create_run`.
        held_out: like dataset: its mean scalars are logged as held_out/...
        resume: go on from the last checkpoint in `out`.

    Returns:
        The model to use, in eval mode: with averaged weights if config.ema_decay asks for them.

    Raises:
        RunError: the loss stopped being finite (the message names the step), or there is nothing to resume.
    """
    return _Training(model, dataset, config, Path(out), held_out).run(resume)


class _Training:
    def __init__(self, model, dataset, config: TrainConfig, out: Path, held_out):
        self.config, self.out = config, out
        self.dataset, self.held_out = dataset, held_out
        # Accelerate keeps the first training's device and precision for the whole process; each has its own here.
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        self.accelerator = Accelerator(
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            cpu=config.device == "cpu",
        )
        self.model = model.to(self.accelerator.device)
        self.average = WeightAverage(self.model, config.ema_decay) if config.ema_decay else None
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay
        )
        self.stepper, self.optimizer = self.accelerator.prepare(_Step(self.model), optimizer)
        self.name = kind_of(model)

    @property
    def useful_model(self) -> nn.Module:
        return self.model if self.average is None else self.average.model

    def run(self, resume: bool) -> nn.Module:
        start = self._resume() if resume else 0
        if start == 0:
            torch.manual_seed(self.config.seed + self.accelerator.process_index)
        if start < self.config.steps:
            self._loop(start)
        return self.useful_model.eval()

    def _loop(self, start: int) -> None:
        config, main = self.config, self.accelerator.is_main_process
        steps = range(start, config.steps)
        processes = self.accelerator.num_processes
        sampler = ShuffledSteps(
            len(self.dataset),
            config.batch_size,
            steps,
            config.seed,
            self.accelerator.process_index,
            processes,
        )
        loader = DataLoader(
            self.dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=config.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            # Of its own: it would draw from the global one, and a resumed run would see other noise.
            generator=torch.Generator(),
        )
        bar = tqdm(total=config.steps, initial=start, desc=f"training {self.name}", unit="step", disable=not main)
        totals: dict[str, Tensor] = {}
        first_bad = torch.tensor(_NEVER, device=self.accelerator.device)
        since, logged = time.perf_counter(), start
        self.model.train()
        with bar:
            for step, batch in zip(steps, loader, strict=True):
                scalars = self._step(batch, step)
                # Kept on the device: reading a value at each step would make the host wait for it.
                first_bad = torch.where(scalars["loss"].isfinite(), first_bad, first_bad.clamp(max=step + 1))
                totals = {name: value + totals.get(name, 0) for name, value in scalars.items()}
                done = step + 1
                bar.update()
                if done % config.log_every == 0 or self._saves(done):
                    self._stop_if_bad(int(first_bad))
                    means = self._means(totals, done - logged)
                    seconds = time.perf_counter() - since
                    means["images_per_s"] = (done - logged) * config.batch_size * processes / seconds
                    self._log({"step": done} | means | {"lr": learning_rate(config, step)})
                    bar.set_postfix_str(_summary(means))
                    totals, since, logged = {}, time.perf_counter(), done
                if self.held_out and config.eval_every and (done % config.eval_every == 0 or done == config.steps):
                    self._log({"step": done} | self._evaluate())
                    since = time.perf_counter()
                if self._saves(done):
                    self._save(done)
                    since = time.perf_counter()

    def _step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        with self.accelerator.autocast():
            scalars = self.stepper(batch, step)
        self.accelerator.backward(scalars["loss"])
        if self.config.clip_norm:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
            scalars = scalars | {"grad_norm": norm}
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.model, step + 1)
        return {name: torch.as_tensor(value).detach() for name, value in scalars.items()}

    def _saves(self, done: int) -> bool:
        return done % self.config.save_every == 0 or done == self.config.steps

    def _stop_if_bad(self, first_bad: int) -> None:
        if first_bad == _NEVER:
            return
        saved = saved_checkpoints(self.out)
        hint = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was made yet"
        raise RunError(f"the loss was not finite at step {first_bad}; {hint}; try a lower --lr")

    def _means(self, totals: dict[str, Tensor], count: int) -> dict[str, float]:
        stacked = torch.stack([value.float() / count for value in totals.values()])
        stacked = self.accelerator.reduce(stacked, reduction="mean")
        return dict(zip(totals, stacked.tolist(), strict=True))

    @torch.no_grad()
    def _evaluate(self, limit: int = 2048) -> dict[str, float]:
        """Mean scalars over the first held-out images, with the same noise each time."""
        model = self.useful_model.eval()
        totals: dict[str, Tensor] = {}
        count = min(len(self.held_out), limit)
        with torch.random.fork_rng(), self.accelerator.autocast():
            torch.manual_seed(self.config.seed)
            for first in range(0, count, self.config.batch_size):
                positions = np.arange(first, min(first + self.config.batch_size, count))
                batch = {k: v.to(self.accelerator.device) for k, v in self.held_out[positions].items()}
                for name, value in model.training_step(batch, 0).items():
                    totals[name] = totals.get(name, 0) + value.detach() * len(positions)
        self.model.train()
        return {f"held_out/{name}": float(value) / count for name, value in totals.items()}

    def _log(self, record: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (self.out / METRICS_FILE).open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _save(self, done: int) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["rng_cuda"] = torch.cuda.get_rng_state()
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        if self.average is not None:
            tensors |= {f"model.{name}": value for name, value in self.model.state_dict().items()}
        scaler = self.accelerator.scaler
        extra: dict[str, Any] = {"training": asdict(self.config)}
        if scaler is not None:
            extra["scaler"] = scaler.state_dict()
        save_checkpoint(self.out, done, self.useful_model, tensors, extra)

    def _resume(self) -> int:
        """Restore the last checkpoint and return the number of steps behind it: 0 where none was made yet."""
        if not saved_checkpoints(self.out):
            self._forget_after(0)
            return 0
        checkpoint = newest_checkpoint(self.out, (WEIGHTS, TRAINING))
        if checkpoint.kind != self.name:
            raise RunError(f"{checkpoint.path}: holds a {checkpoint.kind}, expected a {self.name}")
        tensors = read_tensors(checkpoint.path / TRAINING)
        weights = read_tensors(checkpoint.path / WEIGHTS)
        self.useful_model.load_state_dict(weights)
        if self.average is not None:
            self.model.load_state_dict(_under("model.", tensors))
        optimizer = self.optimizer.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimizer.", tensors).items():
            number, part = name.split(".", 1)
            state.setdefault(int(number), {})[part] = value
        self.optimizer.load_state_dict(optimizer | {"state": state})
        torch.set_rng_state(tensors["rng"])
        if "rng_cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng_cuda"])
        if not self.accelerator.is_main_process:
            # The main process alone saved its state: the others must not draw the same noise.
            torch.manual_seed(self.config.seed + self.accelerator.process_index + checkpoint.step)
        if self.accelerator.scaler is not None and "scaler" in checkpoint.extra:
            self.accelerator.scaler.load_state_dict(checkpoint.extra["scaler"])
        self._forget_after(checkpoint.step)
        return checkpoint.step

    def _forget_after(self, step: int) -> None:
        """Drop the metrics of steps that will be taken again."""
        path = self.out / METRICS_FILE
        if self.accelerator.is_main_process and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            # A line without its end was cut by the interruption.
            lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            beside = path.with_name(f".{path.name}")
            beside.write_text("".join(lines))
            beside.replace(path)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _summary(means: dict[str, float]) -> str:
    parts = [f"loss {means['loss']:.4g}", f"{means['images_per_s']:.0f} images/s"]
    if "usage" in means:
        parts.append(f"codes used {means['usage']:.0%}")
    return ", ".join(parts)
