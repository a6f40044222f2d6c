"""The commands by the words that call them."""

from vqfast.cli.compare_dqvae import CompareDQVAE
from vqfast.cli.compare_generation import CompareGeneration
from vqfast.cli.compare_vqddm import CompareVQDDM
from vqfast.cli.convert import ConvertDQVAE, ConvertTaming, ConvertVQDDM
from vqfast.cli.demo import Demo
from vqfast.cli.doctor import Doctor
from vqfast.cli.evaluate import Evaluate
from vqfast.cli.inpaint import Inpaint
from vqfast.cli.interpolate import Interpolate
from vqfast.cli.options import Training
from vqfast.cli.presets import Presets
from vqfast.cli.reconstruct import Reconstruct
from vqfast.cli.refit import Prune, Refit
from vqfast.cli.runs import Report, Runs, Share
from vqfast.cli.sample import Sample
from vqfast.cli.train_dq_transformer import TrainDQTransformer
from vqfast.cli.train_dqvae import TrainDQVAE
from vqfast.cli.train_raster_gpt import TrainRasterGPT
from vqfast.cli.train_vqddm import TrainVQDDM
from vqfast.cli.train_vqgan import TrainVQGAN
from vqfast.cli.train_vqvae import TrainVQVAE

COMMANDS: dict[str, type] = {
    "train vqvae": TrainVQVAE,
    "train vqgan": TrainVQGAN,
    "train dqvae": TrainDQVAE,
    "train vqddm": TrainVQDDM,
    "train dq_transformer": TrainDQTransformer,
    "train raster_gpt": TrainRasterGPT,
    "sample": Sample,
    "inpaint": Inpaint,
    "interpolate": Interpolate,
    "reconstruct": Reconstruct,
    "evaluate": Evaluate,
    "refit": Refit,
    "prune": Prune,
    "convert taming": ConvertTaming,
    "convert vqddm": ConvertVQDDM,
    "convert dqvae": ConvertDQVAE,
    "runs": Runs,
    "report": Report,
    "share": Share,
    "presets": Presets,
    "compare vqddm": CompareVQDDM,
    "compare dqvae": CompareDQVAE,
    "compare generation": CompareGeneration,
    "demo": Demo,
    "doctor": Doctor,
}

# What the first words of several commands say together.
GROUPS = {
    "train": "Train a model. --config FILE.yaml takes settings from a file, such as a run's config.yaml.",
    "convert": "Make a run of a checkpoint of released code. Only tensors are read from it.",
    "compare": "Measure a paper's claim on your images.",
}

# Those that take --config.
CONFIGURABLE: dict[str, type[Training]] = {
    words: command for words, command in COMMANDS.items() if issubclass(command, Training)
}
