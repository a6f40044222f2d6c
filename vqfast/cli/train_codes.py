"""What `vqfast train vqddm`, `raster_gpt` and `dq_transformer` share: options, and how they train."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vqfast.cli.options import Training
from vqfast.cli.training import AUTOENCODER, start, train_on_codes
from vqfast.data import CodeBatches
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.dqvae import DQVAE


@dataclass(kw_only=True)
class CodeTraining(Training):
    """Options of every model of codes. A command names the run whose codes they are in the option `source`."""

    source: ClassVar[str] = AUTOENCODER  # also the folder of the autoencoder's copy in the run, which stands alone

    derived: ClassVar[tuple[str, ...]] = ()
    """Settings of the model that come of the autoencoder and its codes: checkpoints have them, run.json does not."""

    data: str
    """Images to model: see vqfast train vqvae."""
    unconditional: bool = False
    """Leave out the classes even where the data has them."""
    class_dropout: float = 0.1
    """Share of labels hidden in training, which --guidance and sampling without a class need."""

    def model(self, autoencoder: Autoencoder | DQVAE, num_classes: int | None) -> nn.Module:
        """The model to train on the codes of an autoencoder."""
        raise NotImplementedError

    def fitted(self, model: nn.Module, codes: CodeBatches) -> nn.Module:
        """The model once its codes are there: another, where its configuration depends on them."""
        return model

    def draw(self, model: nn.Module, n: int, labels: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """Codes of n samples to look at during training, with their grains where they vary in number."""
        return model.sample(n, labels)

    def execute(self) -> None:
        train_on_codes(self, start(self))
