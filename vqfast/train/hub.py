"""Models as folders to share: weights, configuration and a card, through Hugging Face's hub mixin.

FOLDER/
  config.json         format, kind, step, model configuration, SHA-256 of the weights
  model.safetensors
  README.md           the card: figures, and pictures.png where the run drew some
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from vqfast.models.registry import kind_of
from vqfast.train.checkpoint import WEIGHTS, Checkpoint, check_sum, model_from, not_written, sha256
from vqfast.train.errors import RunError
from vqfast.train.runs import FORMAT, check_format, read_json, write_json

CONFIG, CARD, CARD_PICTURES = "config.json", "README.md", "pictures.png"


class Pretrained(ModelHubMixin):
    """A model with what a folder or a repository of the hub needs.

    Args:
        model: of a kind in vqfast.models.registry.
        step: training steps behind it.
        figures: measured figures for the card, by name.
        pictures: a PNG for the card.
    """

    def __init__(
        self,
        model: nn.Module,
        step: int = 0,
        figures: dict[str, float] | None = None,
        pictures: Path | None = None,
    ):
        self.model, self.step = model, step
        self.figures, self.pictures = figures or {}, pictures

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card, from kind, configuration, figures and pictures."""
        return ModelCard(_card(self))

    def _save_pretrained(self, save_directory: Path) -> None:
        try:
            self._write(save_directory)
        except (OSError, SafetensorError) as error:
            raise not_written(save_directory, error) from error

    def _write(self, save_directory: Path) -> None:
        weights = save_directory / WEIGHTS
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in self.model.state_dict().items()}, weights)
        described = {
            "format": FORMAT,
            "kind": kind_of(self.model),
            "step": self.step,
            "config": asdict(self.model.config),
            "sha256": {WEIGHTS: sha256(weights)},
        }
        write_json(save_directory / CONFIG, described)
        if self.pictures is not None:
            shutil.copy(self.pictures, save_directory / CARD_PICTURES)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        **_: Any,
    ) -> "Pretrained":
        def locate(name: str) -> Path:
            if Path(model_id).is_dir():
                return Path(model_id) / name
            return Path(
                hf_hub_download(
                    model_id, name, revision=revision, cache_dir=cache_dir, force_download=force_download, token=token
                )
            )

        path = locate(CONFIG)
        described = read_json(path)
        check_format(described, path)
        try:
            kind, step, config = described["kind"], described["step"], described["config"]
            expected = described["sha256"][WEIGHTS]
        except (KeyError, TypeError) as error:
            raise RunError(f"{path}: not the description of a vqfast model: lacks {error}") from error
        weights = locate(WEIGHTS)
        check_sum(weights, expected)
        return cls(model_from(Checkpoint(weights.parent, kind, step, config, {})), step)


def from_pretrained(name: str | Path, **options: Any) -> nn.Module:
    """The model of a shared folder, or of a repository on the hub, in eval mode.

    Args:
        name: the folder, or "owner/name".
        options: revision, cache_dir, token, ... as the hub's own from_pretrained takes them.

    Raises:
        RunError: not such a model, damaged, or written by a newer version.
    """
    if Path(name).exists() and not (Path(name) / CONFIG).is_file():
        raise RunError(f"{name}: not a shared model (it holds no {CONFIG})")
    return Pretrained.from_pretrained(str(name), **options).model


def _card(shared: Pretrained) -> str:
    kind = kind_of(shared.model)
    count = sum(p.numel() for p in shared.model.parameters()) / 1e6
    lines = ["---", "library_name: vqfast", "tags:", "- vqfast", f"- {kind}", "---", "", f"# {kind}", ""]
    lines += [f"{count:.2f} M parameters, {shared.step} training steps.", ""]
    if shared.figures:
        lines += ["| figure | value |", "| --- | ---: |"]
        lines += [f"| {name} | {value:.4g} |" for name, value in shared.figures.items()] + [""]
    if shared.pictures is not None:
        lines += [f"![what the model does with held-out images]({CARD_PICTURES})", ""]
    lines += ["```python", "from vqfast.train.hub import from_pretrained", "", 'model = from_pretrained("...")', "```"]
    lines += ["", "## Configuration", "", "| setting | value |", "| --- | --- |"]
    lines += [f"| {name} | {_brief(value)} |" for name, value in asdict(shared.model.config).items()]
    return "\n".join(lines) + "\n"


def _brief(value: Any) -> str:
    """A setting as a table shows it: of many numbers how many there are."""
    return f"{len(value)} values" if isinstance(value, list | tuple) and len(value) > 8 else str(value)
