"""Training the models of vqfast.models: the loop, its checkpoints, and the folder they live in."""

from vqfast.train.checkpoint import load_autoencoder, load_model
from vqfast.train.config import TrainConfig
from vqfast.train.errors import CheckpointError, RunError
from vqfast.train.runs import Run, check_new, create_run, open_run
from vqfast.train.signals import Stopped
from vqfast.train.trainer import train

__all__ = [
    "CheckpointError",
    "Run",
    "RunError",
    "Stopped",
    "TrainConfig",
    "check_new",
    "create_run",
    "load_autoencoder",
    "load_model",
    "open_run",
    "train",
]
