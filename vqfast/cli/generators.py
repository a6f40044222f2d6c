"""Models of codes as commands load them, and how their samples are asked for."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqfast.cli.training import AUTOENCODER, DYNAMIC_AUTOENCODER
from vqfast.data import ImageData
from vqfast.models.registry import AUTOENCODERS, kind_of
from vqfast.train import RunError, load_model, open_run
from vqfast.train.runs import run_of

# Runs that generate, and the folder in each that holds their autoencoder.
GENERATORS = {"vqddm": AUTOENCODER, "raster_gpt": AUTOENCODER, "dq_transformer": DYNAMIC_AUTOENCODER}
# Settings that not every model has.
_SETTINGS = (
    "steps", "top_k", "top_p", "decoding", "choice_temperature", "position_top_k", "derive_finest", "grid",
)  # fmt: skip


@dataclass(kw_only=True)
class Sampling:
    """How codes are drawn, by any model that draws them."""

    steps: int | None = None
    """VQ-DDM: denoising steps; fewer is faster. Default: every noise level of the model."""
    guidance: float = 1.0
    """Strength of classifier-free guidance; above 1 exaggerates the class."""
    temperature: float = 1.0
    """Below 1 draws likelier, less varied images."""
    top_k: int | None = None
    """Draw each code from the k likeliest."""
    top_p: float | None = None
    """Draw each code from the fewest whose probabilities sum to at least this."""
    seed: int = 0
    """Of the noise."""

    def arguments(
        self, draw: Callable, model: nn.Module, run: Path, levels: tuple[int, str] | None = None
    ) -> dict[str, Any]:
        """The settings as arguments of a model's `draw`: its `sample`, `inpaint` or `interpolate`.

        Args:
            draw, model, run: the model is of this run.
            levels: how many noise levels `draw` goes through, and which these are. Default: all of the model.

        Raises:
            RunError: one is out of range, or was given to a model that has no use for it.
        """
        # Before a bar is shown, and by the names that they have here.
        if not self.temperature > 0:
            raise RunError(f"--temperature: expected a number above 0, got {self.temperature}")
        if not math.isfinite(self.guidance):
            raise RunError(f"--guidance: expected a number, got {self.guidance}")
        if self.top_k is not None and self.top_k < 1:
            raise RunError(f"--top-k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RunError(f"--top-p: expected a share above 0, at most 1, got {self.top_p}")
        taken = inspect.signature(draw).parameters
        settings = [f for f in fields(self) if f.name in _SETTINGS]
        given = {f.name: value for f in settings if (value := getattr(self, f.name)) != f.default}
        for name in given:
            if name not in taken:
                raise RunError(f"--{name.replace('_', '-')}: the {kind_of(model)} in {run} has no such setting")
        if self.steps is not None:
            most, which = levels or (model.config.T, f"of {run}")
            if not 1 <= self.steps <= most:
                raise RunError(f"--steps: expected 1..{most}, the noise levels {which}, got {self.steps}")
        return {"guidance_scale": self.guidance, "temperature": self.temperature} | given


@dataclass(kw_only=True)
class Decoding(Sampling):
    """How codes are drawn from noise."""

    decoding: Literal["chain", "confidence"] = "chain"
    """VQ-DDM: the reverse of the noise, or, where the noise hides (--transition absorbing), what the model is surest of
    first, by default in 8 steps."""
    choice_temperature: float = 4.5
    """--decoding confidence: chance in what is taken first; 0 takes the surest."""


@dataclass(kw_only=True)
class DynamicDecoding(Decoding):
    """How codes and their positions are drawn."""

    position_top_k: int | None = None
    """DQ-Transformer: draw each position from the k likeliest."""
    derive_finest: bool = False
    """DQ-Transformer: do not draw the finest grain's positions, but take what the coarser ones have left."""


def load_generator(
    run: Path, device: torch.device, *kinds: str, checkpoint: Literal["last", "best"] = "last"
) -> tuple[nn.Module, nn.Module, tuple[str, ...]]:
    """A model of codes, its autoencoder, and the names of its classes, empty for an unconditional model.

    Args:
        kinds: which it may be; none for any that generates.
        checkpoint: of the model; see `load_model`.
    """
    found = open_run(run)
    kinds = kinds or tuple(GENERATORS)
    if found.kind not in kinds:
        raise RunError(f"{run}: holds {run_of(found.kind)}, expected {run_of(*kinds)}")
    model = load_model(run, found.kind, device, checkpoint)
    classes = tuple(found.info.get("data", {}).get("classes", ())) if model.config.num_classes else ()
    folder = run / GENERATORS[found.kind]
    return model, load_model(folder, open_run(folder).kind, device), classes


def load_autoencoder_of(run: Path, device: torch.device, checkpoint: Literal["last", "best"] = "last") -> nn.Module:
    """The autoencoder of a run: VQVAE, VQGAN or DQVAE, its own or that whose codes it models.

    Raises:
        RunError: a run of another kind, or with a checkpoint that is missing or damaged.
    """
    kind = open_run(run).kind
    if kind in GENERATORS:
        run = run / GENERATORS[kind]
        kind = open_run(run).kind
    if kind not in (*AUTOENCODERS, DYNAMIC_AUTOENCODER):
        expected = run_of(*AUTOENCODERS, DYNAMIC_AUTOENCODER, *GENERATORS)
        raise RunError(f"{run}: holds {run_of(kind)}, expected {expected}")
    return load_model(run, kind, device, checkpoint)


def same_classes(data: ImageData, run: Path, classes: tuple[str, ...], unconditional: bool) -> bool:
    """Whether a model is to be told the classes of images.

    Raises:
        RunError: it is, and these are other classes than it knows.
    """
    if not classes or unconditional:
        return False
    if data.classes != classes:
        raise RunError(f"{data.source}: has other classes than {run} was trained on; add --unconditional")
    return True


def noise(seed: int, device: torch.device) -> torch.Generator:
    """The source of a command's random numbers."""
    return torch.Generator(device).manual_seed(seed)


def settings_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """What run.json says of `Sampling.arguments`."""
    return {name.removesuffix("_scale"): value for name, value in arguments.items()}


def choose_labels(names: tuple[str, ...], classes: tuple[str, ...], n: int) -> Tensor | None:
    """(n,) class numbers, the classes asked for in their order, each as often as the others (to one)."""
    if not classes:
        if names:
            raise RunError("--labels: the model was trained without classes")
        return None
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise RunError(f"--labels: no class {', '.join(unknown)}; the model has {', '.join(classes)}")
    wanted = torch.tensor([classes.index(name) for name in names or classes])
    return wanted[(torch.arange(n) % len(wanted)).sort().values]
