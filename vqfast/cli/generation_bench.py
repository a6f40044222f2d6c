"""How a training of `vqfast compare generation` is measured: samples by each way of drawing."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from vqfast.cli.bench import Bench
from vqfast.cli.encoding import encode_dynamic
from vqfast.cli.timed import TimedComparison
from vqfast.data import ImageData, to_float
from vqfast.models.dq_transformer import DQTransformer
from vqfast.models.dqvae import DQVAE
from vqfast.models.raster_gpt import RasterGPT


class GenerationBench(Bench):
    """A bench of codes of variable length.

    The raster-order transformer learns and draws the finest grid, on which a coarse code stands four (sixteen) times.
    """

    def __init__(self, command: TimedComparison, data: ImageData, autoencoder: DQVAE):
        super().__init__(command, data, autoencoder, *encode_dynamic(autoencoder, data, "train"))

    def ways(self, name: str, model: DQTransformer | RasterGPT) -> dict[str, Callable]:
        if isinstance(model, DQTransformer):
            return {name: model.sample, f"{name}, finest places derived": partial(model.sample, derive_finest=True)}
        return {name: model.sample}

    def real_grains(self, n: int) -> Tensor:
        """(n, h, w) int64: the grains that the DQ-VAE gives the first held-out images."""
        return self.autoencoder.encode(to_float(self.real[:n]).to(self.device)).grains.cpu()
