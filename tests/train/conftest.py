"""A model and images so small that a training takes a second."""

import numpy as np
import pytest
import torch

from vqfast.data import ImageBatches, open_dataset
from vqfast.models.vqvae import VQVAE, VQVAEConfig

TINY = VQVAEConfig(
    image_size=4, in_channels=1, channels=32, mults=(1,), num_res_blocks=1, codebook_size=8, code_dim=4, dropout=0.1
)


@pytest.fixture
def fresh_model():
    """Makes models of the same weights."""

    def make(model_class=VQVAE):
        torch.manual_seed(0)
        return model_class(TINY)

    return make


@pytest.fixture
def tiny_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (30, 4, 4), dtype=np.uint8))
    return open_dataset(path)


@pytest.fixture
def tiny_images(tiny_data):
    return ImageBatches(tiny_data)


@pytest.fixture
def tiny_held_out(tiny_data):
    return ImageBatches(tiny_data, "held-out")
