"""The codes that a model of codes is trained on: made once by the autoencoder, kept in the run, mapped from disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor, nn

from vqfast.cli.encoding import encoded
from vqfast.cli.options import pick_device
from vqfast.data import CodeBatches, ImageData, cached_latents, fingerprint
from vqfast.models.dqvae import DynamicCodes
from vqfast.train.checkpoint import WEIGHTS, sha256

LATENTS = "latents"  # folder of a run


def latents(
    command: Any, autoencoder: nn.Module, weights: Path, data: ImageData, processes: PartialState
) -> tuple[CodeBatches, CodeBatches | None]:
    """The training and the held-out images of a command as codes; no held-out ones where there are none.

    The first process encodes while the others wait. What is in the run's latents already is used if it was made by
    the same weights of the same images.

    Args:
        command: a training command of a model of codes: has out and training.
        autoencoder: what encodes; it is left on the device of the training.
        weights: folder of its checkpoint.
        data: the images.
    """
    autoencoder.to(pick_device(command.training.device))
    splits = ["train", "held-out"] if data.held_out.any() else ["train"]
    key = fingerprint(sha256(weights / WEIGHTS), data.keys.tobytes(), data.images.shape, data.classes)

    def read(split: str) -> CodeBatches:
        def encode() -> Iterator[dict[str, Tensor]]:
            return _arrays(autoencoder, data, split, command.training.workers)

        arrays = cached_latents(command.out / LATENTS, split, key, len(data.indices(split)), encode)
        return CodeBatches(arrays["codes"], arrays.get("label"), arrays.get("grains"))

    if processes.is_main_process:
        for split in splits:
            read(split)
    processes.wait_for_everyone()
    found = [read(split) for split in splits]
    return found[0], found[1] if len(found) == 2 else None


def _arrays(autoencoder: nn.Module, data: ImageData, split: str, workers: int) -> Iterator[dict[str, Tensor]]:
    for batch, codes in encoded(autoencoder, data, split, workers):
        arrays = codes._asdict() if isinstance(codes, DynamicCodes) else {"codes": codes}
        # Of the images that were really read: another stands in for a broken one.
        yield arrays | ({"label": batch["label"]} if "label" in batch else {})
