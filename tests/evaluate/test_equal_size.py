"""A raster-order transformer as large as another model, whatever that is."""

import pytest

from vqfast.evaluate.equal_size import parameter_count, raster_equal
from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.raster_gpt import RasterGPT
from vqfast.models.vqddm import VQDDM, VQDDMConfig

DIFFUSION = dict(codebook_size=128, grid=(4, 4), denoiser="transformer", dim=64, depth=4, heads=4, T=10, num_classes=10)
DYNAMIC = dict(
    codebook_size=128, grid=(8, 8), dim=64, position_depth=1, content_depth=3, heads=4, max_length=None, num_classes=10
)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (VQDDM, VQDDMConfig(**DIFFUSION)),
        (VQDDM, VQDDMConfig(**DIFFUSION | dict(dim=96, heads=2))),
        (VQDDM, VQDDMConfig(**DIFFUSION | dict(denoiser="unet", dim=32, mults=(1, 2)))),
        (VQDDM, VQDDMConfig(**DIFFUSION | dict(num_classes=None))),
        (DQTransformer, DQTransformerConfig(**DYNAMIC)),
        (DQTransformer, DQTransformerConfig(**DYNAMIC | dict(dim=128, num_grains=3, content_depth=5))),
        (DQTransformer, DQTransformerConfig(**DYNAMIC | dict(num_classes=None, grid=(4, 8)))),
    ],
)
def test_both_have_as_many_parameters(model_class, config):
    raster = raster_equal(model_class, config, depth=4)
    assert parameter_count(RasterGPT, raster) == pytest.approx(parameter_count(model_class, config), rel=0.02)
    for name in ("codebook_size", "grid", "heads", "num_classes", "class_dropout"):
        assert getattr(raster, name) == getattr(config, name), name
    assert parameter_count(RasterGPT, raster) == sum(p.numel() for p in RasterGPT(raster).parameters())


def test_it_has_the_depth_asked_for_where_a_width_fits():
    assert raster_equal(DQTransformer, DQTransformerConfig(**DYNAMIC | dict(dim=128)), depth=5).depth == 5


def test_sizes_that_no_raster_transformer_has_are_refused():
    config = VQDDMConfig(**DIFFUSION | dict(codebook_size=5, dim=16, depth=1))
    with pytest.raises(
        ValueError, match="no raster-order transformer of 4 heads and up to 2 blocks has 6277 parameters to 2%"
    ):
        raster_equal(VQDDM, config, depth=1)
