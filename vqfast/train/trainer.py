"""The training loop: any model that keeps the contract of vqfast.train.parts, in one process or many."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vqfast.diffusion.process import accumulate_history
from vqfast.models.registry import kind_of
from vqfast.nn import accumulate_codebooks
from vqfast.nn.codebook import sum_over_processes
from vqfast.nn.routers import accumulate_entropies
from vqfast.train.average import WeightAverage
from vqfast.train.batch_norm import RunningStatistics
from vqfast.train.blocks import recompute_blocks
from vqfast.train.checkpoint import (
    TRAINING,
    WEIGHTS,
    read_tensors,
    remove_unfinished,
    resumable_checkpoint,
    save_checkpoint,
    saved_checkpoints,
)
from vqfast.train.config import TrainConfig, learning_rate
from vqfast.train.divergence import DivergenceWatch
from vqfast.train.errors import CheckpointError, RunError
from vqfast.train.evaluation import Pictures, frozen, held_out_scalars, histograms_of, pictures_of
from vqfast.train.feed import Feed
from vqfast.train.metrics import forget_after
from vqfast.train.observers import MetricsFile, Observers, PictureFiles, ProgressBar, TensorBoard, gpu_memory_gb
from vqfast.train.parts import Part, PartStep, only, training_parts
from vqfast.train.processes import ended_elsewhere, gathered, replicate, shard, unsynced
from vqfast.train.progress import RunState, check_idle
from vqfast.train.signals import Stopped, StopRequest
from vqfast.train.state import model_tensors, restore, training_tensors, training_values


def train(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig,
    out: Path,
    *,
    held_out: Dataset | None = None,
    resume: bool = False,
    pictures: Pictures | None = None,
) -> nn.Module:
    """Train a model and leave checkpoints, metrics.jsonl and pictures in a run folder.

    Args:
        model: one of vqfast.models.registry; see `vqfast.train.parts` for what it offers.
        dataset: indexed by an array of visits, gives a batch of tensors. A visit is a position, plus the length of the
            dataset for every time that it was seen before: take it modulo the length, as the datasets of vqfast.data.
        config: how to train.
        out: folder of the run, made by `create_run`.
        held_out: like dataset: its mean scalars are logged as held_out/...
        resume: go on from the last good checkpoint in `out`.
        pictures: draws (model, batch) in place of the model's own `evaluation_pictures`.

    Returns:
        The model to use, in eval mode: with averaged weights if config.ema_decay asks for them.

    Raises:
        TypeError: a model of another kind.
        RunError: the loss diverged (the message names step and batch), there is nothing to resume, or the last
            checkpoint could not be written.
        Stopped: it was asked to stop by SIGTERM or Ctrl-C, and left a checkpoint.
    """
    return _Training(model, dataset, config, Path(out), held_out, pictures).run(resume)


class _Training:
    def __init__(self, model, dataset, config: TrainConfig, out: Path, held_out, pictures):
        self.config, self.out = config, out
        self.held_out, self.pictures = held_out, pictures
        self.kind = kind_of(model)
        self.accelerator = _accelerator(config)
        self.device = self.accelerator.device
        self.processes = self.accelerator.num_processes
        self.feed = Feed(dataset, config, self.accelerator.process_index, self.processes, self.device)
        self.main = self.accelerator.is_main_process
        self.model = model.to(self.device)
        if config.gradient_checkpointing:
            recompute_blocks(self.model)
        sharded = config.sharding == "full" or self.accelerator.distributed_type == DistributedType.FSDP
        self.parts, self.forwards = self._parts(sharded and self.processes > 1)
        self.statistics = RunningStatistics(self.model, self.processes)
        self.average = WeightAverage(self.parts[0].parameters, config.ema_decay) if config.ema_decay else None

    def _parts(self, sharded: bool) -> tuple[list[Part], list[PartStep]]:
        named = training_parts(self.model)
        forwards = [PartStep(self.model, name) for name in named]
        if self.config.compile:
            for forward in forwards:
                forward.compile()
        if sharded:
            # The first part is the model itself; those that judge it are small, and it calls them from within.
            others = [p for name in list(named)[1:] for p in named[name]]
            shard(forwards[0], others, self.device)
            named = training_parts(self.model)  # sharded parameters are other ones
        parts = []
        for (name, parameters), forward in zip(named.items(), forwards, strict=True):
            whole = self.processes > 1 and not isinstance(forward, FSDPModule)
            step = replicate(forward, parameters, self.device) if whole else forward
            parts.append(Part(name, parameters, step, self.config, self.device))
        return parts, forwards

    def run(self, resume: bool) -> nn.Module:
        if self.main:
            check_idle(self.out)  # before the resume drops what a training under way may be writing
        start = self._resume() if resume else 0
        if start < self.config.steps:
            with RunState(self.out, start, self.config.steps, self.main) as self.state, StopRequest() as request:
                self.observers = Observers(self._observers(start) if self.main else [])
                try:
                    self._loop(start, request)
                except RuntimeError as error:
                    if self.processes > 1 and ended_elsewhere(error):
                        raise RunError("another process of this training ended; what it said tells why") from error
                    raise
                finally:
                    self.observers.close()
        if self.average is not None:
            self.average.apply()
        return self.model.eval()

    def _loop(self, start: int, request: StopRequest) -> None:
        config = self.config
        self.watch = DivergenceWatch(config.explosion, self.device)
        totals: dict[str, Tensor] = {}
        since, logged = time.perf_counter(), start
        self.model.train()
        for step, batches in zip(range(start, config.steps), self.feed.steps(start), strict=True):
            scalars = self._step(batches, step)
            # Kept on the device: reading a value at each step would make the host wait for it.
            totals = {name: value + totals.get(name, 0) for name, value in scalars.items()}
            done = step + 1
            self.observers.stepped()
            stopping = request.agreed()
            last = done == config.steps
            saves = stopping or last or done % config.save_every == 0
            looks = config.eval_every and (done % config.eval_every == 0 or last or (saves and not stopping))
            logs = saves or done % config.log_every == 0
            if logs or looks:
                self._stop_if_diverged()
            if logs:
                means = self._means(totals, done - logged)
                means["images_per_s"] = self.feed.images(done - logged) / (time.perf_counter() - since)
                means |= {"lr": learning_rate(config, step)} | gpu_memory_gb(self.device)
                self.observers.scalars(done, means)
                totals, logged, since = {}, done, time.perf_counter()
            aside = time.perf_counter()
            figures = self._evaluate(done) if self.held_out and looks else {}
            if saves:
                self._save(done, figures, final=last or stopping)
            since += time.perf_counter() - aside
            if stopping and not last:
                stop = Stopped(f"{self.out}: stopped after step {done} of {config.steps}; add --resume to go on")
                if self.main:
                    tqdm.write(str(stop))
                raise stop

    def _observers(self, start: int) -> Iterator:
        yield ProgressBar(self.kind, start, self.config.steps)
        yield MetricsFile(self.out)
        yield PictureFiles(self.out)
        if self.config.tensorboard:
            yield TensorBoard(self.out, start)

    def _step(self, batches: list[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
        """One step of every part's optimiser and of moving averages; returns means over the batches."""
        count = len(batches)
        with ExitStack() as as_one:
            as_one.enter_context(self.statistics.averaged(count))
            if count > 1:
                as_one.enter_context(accumulate_codebooks(self.model, passes=count))
                as_one.enter_context(accumulate_history(self.model))
                as_one.enter_context(accumulate_entropies(self.model))
            return self._passes(self._with_loss_counts(batches), step)

    def _with_loss_counts(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        if not hasattr(self.model, "loss_counts"):
            return batches
        counts = sum_over_processes(sum(self.model.loss_counts(batch) for batch in batches))
        mean = counts / (len(batches) * self.processes)
        return [batch | {"loss_counts": mean} for batch in batches]

    def _passes(self, batches: list[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
        scalars: dict[str, Tensor] = {}
        count = len(batches)
        for number, batch in enumerate(batches):
            last = number == count - 1
            with self.statistics.batch():
                for index, part in enumerate(self.parts):
                    prefix = f"{part.name}/" if index else ""
                    torch.manual_seed(self.feed.noise_seed(step, number, index))
                    with only(part, self.parts), unsynced(part.step, last):
                        with self.accelerator.autocast():
                            found = part.step(batch, step)
                        part.backward(found["loss"] / count)
                        for name, value in found.items():
                            value = torch.as_tensor(value, device=self.device).detach()
                            scalars[prefix + name] = scalars.get(prefix + name, 0) + value / count
                        if last:
                            norm = scalars[prefix + "grad_norm"] = part.update(step)
                            # A gradient that is not finite ruins the weights too, but fp16 skips such steps.
                            spoilt = 0 if self.config.precision == "fp16" else 0 * norm
                            self.watch.see(scalars[prefix + "loss"] + spoilt, step + 1)
        if self.average is not None:
            self.average.update(step + 1)
        return scalars

    def _stop_if_diverged(self) -> None:
        divergence = self.watch.read(self.accelerator.gather(self.watch.state[None]))
        if divergence is None:
            return
        positions = self.feed.positions(divergence.step - 1)
        images = ", ".join(map(str, positions[:8])) + (f" and {len(positions) - 8} more" if len(positions) > 8 else "")
        saved = saved_checkpoints(self.out)
        hint = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was made yet"
        raise RunError(f"{divergence} (its batch: images {images} of the training data); {hint}; try a lower --lr")

    def _means(self, totals: dict[str, Tensor], count: int) -> dict[str, float]:
        stacked = torch.stack([value.float() / count for value in totals.values()])
        stacked = self.accelerator.reduce(stacked, reduction="mean")
        return dict(zip(totals, stacked.tolist(), strict=True))

    def _evaluate(self, done: int) -> dict[str, float]:
        """Held-out scalars with the same noise each time, pictures, histograms: by the weights to use."""
        step = self.parts[0].step
        with self._weights_to_use(), gathered(step), frozen(self.model, self.config.seed), self.accelerator.autocast():
            figures = held_out_scalars(self.forwards[0], self.held_out, self.config.batch_size, self.device)
            self.observers.scalars(done, figures)
            images = pictures_of(self.model, self.held_out, self.device, self.pictures)
            if images:
                self.observers.pictures(done, images)
            self.observers.histograms(done, histograms_of(self.model))
        return figures

    def _save(self, done: int, figures: dict[str, float], final: bool) -> None:
        with self._weights_to_use():
            weights = model_tensors(self.model)
        tensors = training_tensors(self.model, self.parts, self.average)
        if not self.main:
            return
        values = {"training": asdict(self.config), "processes": self.processes, "batches": self.feed.batches(done)}
        values |= training_values(self.parts)
        try:
            save_checkpoint(
                self.out, done, self.model, weights, tensors, values, held_out=figures, keep_last=self.config.keep_last
            )
            self.state.at(done)
        except CheckpointError as error:
            # An older checkpoint and the weights in memory are still there: disk space may be made meanwhile.
            if final:
                raise
            tqdm.write(f"{error}; training goes on and tries again at the next checkpoint")

    def _weights_to_use(self) -> AbstractContextManager:
        return nullcontext() if self.average is None else self.average.applied()

    def _resume(self) -> int:
        """Restore the last good checkpoint and return the number of steps behind it: 0 where none was made yet."""
        checkpoint = resumable_checkpoint(self.out, self.kind, say=tqdm.write if self.main else lambda text: None)
        step = 0
        if checkpoint is not None:
            step = checkpoint.step
            try:
                restore(
                    self.model,
                    self.parts,
                    self.average,
                    read_tensors(checkpoint.path / WEIGHTS),
                    read_tensors(checkpoint.path / TRAINING),
                    checkpoint.extra,
                )
            except (KeyError, ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise RunError(f"{checkpoint.path}: not the state of this training: {reason}") from error
            self.feed.go_on(step, checkpoint.extra.get("batches", self.feed.batches(step)))
            self._tell_processes(checkpoint.extra.get("processes", self.processes))
        if self.main:
            forget_after(self.out, step)
            remove_unfinished(self.out)
        return step

    def _tell_processes(self, before: int) -> None:
        if self.main and before != self.processes:
            was, now = (n * self.config.batch_size * self.config.accumulation for n in (before, self.processes))
            tqdm.write(
                f"{self.out}: trained by {before} processes so far, now by {self.processes}: "
                f"{now} images a step instead of {was}"
            )


def _accelerator(config: TrainConfig) -> Accelerator:
    # Accelerate keeps the first training's device and precision for the whole process; each has its own here.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    try:
        return Accelerator(
            mixed_precision="no" if config.precision == "fp32" else config.precision, cpu=config.device == "cpu"
        )
    except ValueError as error:
        raise RunError(f"precision: {config.precision} does not run here: {error}") from error
