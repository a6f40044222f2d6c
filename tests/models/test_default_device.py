"""A default device elsewhere, as torch.set_default_device sets it, is not for the tensors of a model on the host."""

import pytest
import torch

from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.dqvae import DQVAE, DQVAEConfig
from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig
from vqfast.models.vqddm import VQDDM, VQDDMConfig

SMALL = dict(codebook_size=7, grid=(4, 4), dim=16, heads=2, num_classes=3, class_dropout=0.1)
SAMPLERS = {
    "vqddm": lambda: VQDDM(VQDDMConfig(**SMALL, denoiser="transformer", depth=1, T=3)),
    "raster_gpt": lambda: RasterGPT(RasterGPTConfig(**SMALL, depth=1)),
    "dq_transformer": lambda: DQTransformer(DQTransformerConfig(**SMALL, position_depth=1, content_depth=1)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_samples_are_drawn_where_the_model_is(kind):
    model, images = SAMPLERS[kind](), []
    for device in ("meta", "cpu"):
        generator = torch.Generator().manual_seed(0)
        with torch.device(device):
            drawn = model.sample(2, 1, guidance_scale=2.0, generator=generator)
        images.append(drawn[0] if isinstance(drawn, tuple) else drawn)
    assert torch.equal(*images)


@pytest.mark.parametrize("router", ["feature", "entropy", "random"])
def test_images_are_trained_on_and_encoded_where_the_model_is(router):
    config = DQVAEConfig(
        image_size=16, channels=8, norm_groups=4, mults=(1, 1, 1), num_res_blocks=1, attention_resolutions=(),
        codebook_size=16, code_dim=4, z_channels=4, disc_weight=0.0, router=router,
    )  # fmt: skip
    model, images = DQVAE(config), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.device("meta"):
        loss = model.training_step({"image": images}, 0)["loss"]
        codes = model.eval().encode(images, target_codes=40)
        fewest = model.encode(images, target_error=0.5)
    assert loss.isfinite() and codes.lengths.tolist() == [40, 40] and not fewest.codes.is_meta
