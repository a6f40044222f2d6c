"""What presets promise: the papers' parameter counts, counted without memory."""

import pytest

from vqfast.models.presets import PRESETS

# Millions, as published; VQGAN's 72.14 and 76.07 and the discriminator's 2.77. DQ-VAE's 48.10, 74.01 and 47.83 without
# the codebook's 0.26, which is no parameter here, and with the discriminator's.
PUBLISHED = {
    "vqgan-f16-1024": "74.91",
    "vqgan-f16-16384": "78.84",
    "dqvae-dual": "50.60",
    "dqvae-triple": "76.51",
    "dqvae-entropy": "50.34",
    "vqddm-512": "117.45",
    "vqddm-1024": "117.59",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_paper(name):
    assert f"{PRESETS[name].parameters / 1e6:.2f}" == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_built_on_the_meta_device(name):
    model = PRESETS[name].build("meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert PRESETS[name].source
