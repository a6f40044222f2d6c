"""A batch that lacks what a model is trained on: every model says what it needs and what the batch has."""

import pytest
import torch

from vqfast.models.registry import MODELS, build

IMAGES, CODES = {"label": 0, "pixels": 0}, {"label": 0, "tokens": 0}
# A kind, the configuration that has no default, a batch, and what it lacks.
CASES = [
    ("vqvae", {}, IMAGES, "image"),
    ("vqgan", {}, IMAGES, "image"),
    ("dqvae", {}, IMAGES, "image"),
    ("vqddm", {"codebook_size": 8}, CODES, "codes"),
    ("raster_gpt", {}, CODES, "codes"),
    ("dq_transformer", {}, CODES, "codes"),
    ("dq_transformer", {}, CODES | {"codes": 0}, "grains"),
]


def test_every_kind_is_asked():
    assert {case[0] for case in CASES} == set(MODELS)


@pytest.mark.parametrize(("kind", "config", "batch", "lacking"), CASES)
def test_what_is_missing_is_named_with_what_is_there(kind, config, batch, lacking):
    with torch.device("meta"):
        model = build(kind, config)
    name = type(model).__name__
    with pytest.raises(ValueError) as raised:
        model.training_step(batch, 0)
    assert str(raised.value) == f'batch["{lacking}"]: missing, but {name} needs it; the batch has {", ".join(batch)}'
    with pytest.raises(ValueError, match="the batch has nothing"):
        model.training_step({}, 0)
    with pytest.raises(TypeError, match=f"batch: {name} expected a dict of tensors, got list"):
        model.training_step([0, 1], 0)
