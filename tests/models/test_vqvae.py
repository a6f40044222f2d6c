"""What the VQ-VAE promises: shapes, a gradient everywhere, and that it learns."""

from dataclasses import asdict

import pytest
import torch

from vqfast.models.vqvae import _FIRST_NAMES, VQVAE, VQVAEConfig
from vqfast.nn.blocks import AttentionBlock

SMALL = dict(channels=32, num_res_blocks=1, codebook_size=16, code_dim=8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (dict(image_size=8, in_channels=1, mults=(1, 2)), 4),
        (dict(image_size=16, in_channels=3, mults=(1, 1, 2), attention_resolutions=(4,)), 4),
        (dict(image_size=5, in_channels=1, mults=(1,)), 5),
    ],
)
def test_images_to_codes_and_back(config, grid):
    model = VQVAE(VQVAEConfig(**SMALL, **config)).eval()
    images = torch.rand(3, config["in_channels"], config["image_size"], config["image_size"]) * 2 - 1
    codes = model.encode(images)
    assert codes.shape == (3, grid, grid) and codes.dtype == torch.int64
    assert model.config.grid_size == grid
    assert 0 <= codes.min() and codes.max() < 16
    assert model.decode_codes(codes).shape == images.shape
    assert torch.equal(model.reconstruct(images), model.decode_codes(codes))


def test_attention_stands_at_the_resolutions_asked_for():
    config = VQVAEConfig(**SMALL, image_size=16, mults=(1, 1, 1), attention_resolutions=(8,))
    model = VQVAE(config)
    seen = []
    for module in model.modules():
        if isinstance(module, AttentionBlock):
            module.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[2:])))
    model.reconstruct(torch.zeros(1, 3, 16, 16))
    assert seen == [(8, 8)] * 3, "one encoder block and two decoder blocks at that resolution"


def test_every_normalisation_has_the_groups_asked_for():
    shape = dict(image_size=16, mults=(1, 1, 1), attention_resolutions=(8,))
    for options, groups in ((dict(), 32), (dict(norm_groups=8), 8)):
        model = VQVAE(VQVAEConfig(**SMALL, **shape, **options))
        assert {norm.num_groups for norm in model.modules() if isinstance(norm, torch.nn.GroupNorm)} == {groups}
    with pytest.raises(ValueError, match="channels: expected a multiple of 12.*got 32"):
        VQVAE(VQVAEConfig(**SMALL, **shape, norm_groups=12))


def test_every_parameter_gets_a_gradient_and_the_scalars_add_up():
    model = VQVAE(VQVAEConfig(**SMALL, image_size=8, mults=(1, 1), attention_resolutions=(4,)))
    scalars = model.training_step({"image": torch.rand(4, 3, 8, 8) * 2 - 1}, 0)
    scalars["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(scalars["loss"].detach(), scalars["reconstruction"] + scalars["commitment"])
    assert not any(value.requires_grad for name, value in scalars.items() if name != "loss")
    assert 0 < scalars["usage"] <= 1 and 1 <= scalars["perplexity"] <= 16


def test_held_out_images_get_no_figures_of_training_batches():
    model = VQVAE(VQVAEConfig(**SMALL, image_size=8, mults=(1, 1))).eval()
    scalars = model.training_step({"image": torch.rand(4, 3, 8, 8) * 2 - 1}, 0)
    assert scalars.keys() == {"loss", "reconstruction"} and scalars["loss"] == scalars["reconstruction"]


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_it_learns_a_few_images(loss):
    model = VQVAE(VQVAEConfig(**SMALL, image_size=4, in_channels=1, mults=(1, 1), reconstruction_loss=loss))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    batch = {"image": torch.randint(0, 2, (8, 1, 4, 4)) * 2.0 - 1}
    history = []
    for step in range(60):
        scalars = model.training_step(batch, step)
        optimiser.zero_grad()
        scalars["loss"].backward()
        optimiser.step()
        history.append(scalars["reconstruction"].item())
    assert history[-1] < 0.2 * history[0]


def test_encoding_leaves_the_codebook_alone():
    model = VQVAE(VQVAEConfig(**SMALL, image_size=4, mults=(1,)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train().encode(torch.rand(2, 3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_checkpoints_from_before_encoder_and_decoder_were_modules_load():
    config = VQVAEConfig(**SMALL, image_size=8, mults=(1, 2), attention_resolutions=(4,))
    model, images = VQVAE(config).eval(), torch.rand(2, 3, 8, 8) * 2 - 1
    first = {now: then for then, now in _FIRST_NAMES.items()}
    old = {}
    for name, value in model.state_dict().items():
        now = next((now for now in first if name.startswith(now)), "")
        old[first.get(now, "") + name.removeprefix(now)] = value
    assert not any(name.startswith(("encoder.", "decoder.")) for name in old)
    assert {"encoder_in.weight", "encoder_out.0.0.norm1.weight", "decoder_out.2.bias"} <= old.keys()
    fresh = VQVAE(config).eval()
    fresh.load_state_dict(old)
    assert torch.equal(fresh.reconstruct(images), model.reconstruct(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_size=10, mults=(1, 1, 1)), "image_size: expected a multiple of 4"),
        (dict(mults=()), "mults"),
        (dict(channels=48), "channels: expected a multiple of 32"),
        (dict(reconstruction_loss="l3"), "reconstruction_loss"),
        (dict(codebook_size=0), "codebook_size: expected at least 1, got 0"),
        (dict(in_channels=0), "in_channels: expected at least 1, got 0"),
        (dict(channels=0), "channels: expected at least 1, got 0"),
        (dict(num_res_blocks=0), "num_res_blocks: expected at least 1, got 0"),
    ],
)
def test_configurations_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        VQVAE(VQVAEConfig(**SMALL | dict(image_size=8, mults=(1, 1)) | change))


def test_images_of_another_size_or_dtype_are_refused():
    model = VQVAE(VQVAEConfig(**SMALL, image_size=8, mults=(1, 1)))
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, 8, 8\), got \(2, 1, 8, 8\)"):
        model.encode(torch.zeros(2, 1, 8, 8))
    with pytest.raises(TypeError, match=r"images: expected a float tensor of values in \[-1, 1\], got uint8 tensor"):
        model.training_step({"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, 0)


def test_what_is_no_grid_of_codes_is_refused():
    model = VQVAE(VQVAEConfig(**SMALL, image_size=8, mults=(1, 1)))
    codes = model.encode(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"codes: expected shape \(B, h, w\), got int64 tensor of shape \(2, 16\)"):
        model.decode_codes(codes.flatten(1))
    for wrong in (codes + model.config.codebook_size, codes * 0 - 1):
        with pytest.raises(ValueError, match=r"^codes: expected values in 0\.\."):
            model.decode_codes(wrong)
    with pytest.raises(TypeError, match="^codes: expected an int64 or int32 tensor, got float32"):
        model.decode_codes(codes.float())


def test_the_configuration_survives_json():
    import json

    config = VQVAEConfig(mults=(1, 2), attention_resolutions=(8,))
    assert VQVAEConfig(**json.loads(json.dumps(asdict(config)))) == config
