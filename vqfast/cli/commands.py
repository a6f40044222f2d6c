"""The tree of commands, as the parser reads it."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import subcommand

from vqfast.cli.compare_dqvae import CompareDQVAE
from vqfast.cli.compare_generation import CompareGeneration
from vqfast.cli.compare_vqddm import CompareVQDDM
from vqfast.cli.convert import Convert
from vqfast.cli.demo import Demo
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


@dataclass
class Train:
    """Train a model. --config FILE.yaml takes settings from a file, such as a run's config.yaml."""

    model: (
        Annotated[TrainVQVAE, subcommand("vqvae")]
        | Annotated[TrainVQGAN, subcommand("vqgan")]
        | Annotated[TrainDQVAE, subcommand("dqvae")]
        | Annotated[TrainVQDDM, subcommand("vqddm")]
        | Annotated[TrainDQTransformer, subcommand("dq_transformer")]
        | Annotated[TrainRasterGPT, subcommand("raster_gpt")]
    )

    def execute(self) -> None:
        self.model.execute()


@dataclass
class Compare:
    """Measure a paper's claim on your images."""

    claim: (
        Annotated[CompareVQDDM, subcommand("vqddm")]
        | Annotated[CompareDQVAE, subcommand("dqvae")]
        | Annotated[CompareGeneration, subcommand("generation")]
    )

    def execute(self) -> None:
        self.claim.execute()


@dataclass
class Doctor:
    """Say what is installed, which backends run here, and why the others do not."""

    def execute(self) -> None:
        from vqfast.doctor import report

        print(report())


COMMANDS = (
    Annotated[Train, subcommand("train")]
    | Annotated[Sample, subcommand("sample")]
    | Annotated[Inpaint, subcommand("inpaint")]
    | Annotated[Interpolate, subcommand("interpolate")]
    | Annotated[Reconstruct, subcommand("reconstruct")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Refit, subcommand("refit")]
    | Annotated[Prune, subcommand("prune")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Runs, subcommand("runs")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Share, subcommand("share")]
    | Annotated[Presets, subcommand("presets")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Demo, subcommand("demo")]
    | Annotated[Doctor, subcommand("doctor")]
)

# Those that take --config, by the words that call them.
CONFIGURABLE: dict[str, type[Training]] = {
    trains.command: trains
    for trains in (TrainVQVAE, TrainVQGAN, TrainDQVAE, TrainVQDDM, TrainDQTransformer, TrainRasterGPT, Refit)
}
