"""Training any model that has a `training_step`: the loop, its checkpoints, and the folder they live in."""

from vqfast.train.checkpoint import load_model
from vqfast.train.errors import RunError
from vqfast.train.runs import Run, check_new, create_run, open_run
from vqfast.train.trainer import TrainConfig, train

__all__ = ["Run", "RunError", "TrainConfig", "check_new", "create_run", "load_model", "open_run", "train"]
