"""What the samplers of all models promise alike: the same words for the same thing, in the same order."""

import inspect

import pytest
import torch

from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig
from vqfast.models.vqddm import VQDDM, VQDDMConfig

ASKED = {"n": inspect.Parameter.empty, "labels": None}
SHARED = {
    "temperature": 1.0, "top_k": None, "top_p": None, "guidance_scale": 1.0, "batch_size": None, "generator": None,
    "progress": False,
}  # fmt: skip
SMALL = dict(codebook_size=8, dim=16, heads=2, num_classes=2, class_dropout=0.1)
MODELS = {
    VQDDM: lambda: VQDDMConfig(grid=(2, 2), denoiser="transformer", depth=1, T=4, **SMALL),
    RasterGPT: lambda: RasterGPTConfig(grid=(2, 2), depth=1, **SMALL),
    DQTransformer: lambda: DQTransformerConfig(grid=(4, 4), position_depth=1, content_depth=1, **SMALL),
}
DRAWS = [VQDDM.sample, RasterGPT.sample, DQTransformer.sample, VQDDM.inpaint, RasterGPT.inpaint, VQDDM.interpolate]


@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__qualname__)
def test_what_models_share_has_one_name_one_order_and_one_default(draw):
    parameters = inspect.signature(draw).parameters
    shared = {name: p for name, p in parameters.items() if name in SHARED}
    assert {name: p.default for name, p in shared.items()} == SHARED and list(shared) == list(SHARED)
    assert all(p.kind is p.KEYWORD_ONLY for p in shared.values())
    by_place = {name: p.default for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    by_place.pop("self")
    if draw.__name__ == "sample":
        assert by_place == ASKED
    assert list(by_place)[-1] == "labels" and by_place["labels"] is None


@pytest.mark.parametrize("model_class", MODELS, ids=lambda model_class: model_class.__name__)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(n=0), "n: expected a whole number, at least 1, got 0"),
        (dict(n=2, labels=2), r"labels: expected values in 0\.\.1"),
        (dict(n=2, guidance_scale=2.0), r"labels: guidance_scale = 2\.0 needs labels, got None"),
        (dict(n=2, labels=0, temperature=0.0), "temperature: expected a number above 0, got 0.0"),
        (dict(n=2, labels=0, top_k=0), "top_k: expected a whole number of at least 1, or None, got 0"),
        (dict(n=2, labels=0, top_p=0.0), "top_p: expected a share .*, or None, got 0.0"),
        (dict(n=2, labels=0, batch_size=0), "batch_size: expected at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_the_same_words(model_class, arguments, words):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=words):
        model_class(MODELS[model_class]()).sample(**arguments)
