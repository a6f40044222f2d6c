"""ReFiT and pruning: dead codes come to use, nothing else changes, used codes stay."""

from dataclasses import replace

import pytest
import torch

from vqfast.models.refit import collect_vectors, prune_codebook, rebuild_codebook, remap_codes
from vqfast.models.vqgan import VQGAN, VQGANConfig
from vqfast.models.vqvae import VQVAE, VQVAEConfig

SMALL = dict(
    image_size=8, in_channels=1, channels=32, mults=(1, 1), num_res_blocks=1, codebook_size=32, code_dim=8
)  # fmt: skip


def make(kind):
    torch.manual_seed(0)
    if kind == "vqvae":
        model = VQVAE(VQVAEConfig(**SMALL))
    else:
        model = VQGAN(VQGANConfig(**SMALL, attention_resolutions=(), z_channels=16, disc_channels=8, disc_layers=1))
    # Only a few codes are near any vector, as in a collapsed codebook.
    model.quantizer.codebook.data[4:] += 100
    return model.eval()


@pytest.fixture(params=["vqvae", "vqgan"])
def model(request):
    return make(request.param)


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(200, 1, 8, 8) * 2 - 1


def usage(model, images):
    with torch.no_grad():
        return len(model.encode(images).unique()) / model.config.codebook_size


def test_vectors_are_those_of_the_encoder_one_of_each_image(model, images):
    vectors = collect_vectors(model, images.split(64), generator=torch.Generator().manual_seed(0))
    assert vectors.shape == (200, 8) and not vectors.requires_grad
    with torch.no_grad():
        features = torch.cat([model.features(part) for part in images.split(64)]).flatten(2)
    found = (features == vectors[:, :, None]).all(1)
    assert found.any(1).all(), "each is a cell of its own image"
    assert len(found.int().argmax(1).unique()) == 16, "every cell is drawn"
    again = collect_vectors(model, images.split(64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(vectors, again)


@pytest.mark.parametrize("codebook_size", [32, 20])
def test_all_codes_of_a_rebuilt_codebook_are_used_and_nothing_else_changed(model, images, codebook_size):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert usage(model, images) < 0.4
    vectors = collect_vectors(model, images.split(64), generator=torch.Generator().manual_seed(0))
    rebuilt = rebuild_codebook(model, vectors, codebook_size, generator=torch.Generator().manual_seed(0))
    assert usage(rebuilt, images) > 0.95
    assert rebuilt.config.codebook_size == codebook_size and rebuilt.config.freeze_encoder
    assert type(rebuilt) is type(model) and not rebuilt.training
    for name, value in rebuilt.state_dict().items():
        if not name.startswith("quantizer."):
            assert torch.equal(value, before[name])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        error = lambda m: (m.quantizer(m.features(images))[0] - m.features(images)).square().mean()
        assert error(rebuilt) < error(model)


def test_a_vqgan_is_fine_tuned_with_the_released_loss(images):
    model = make("vqgan")
    vectors = collect_vectors(model, [images])
    rebuilt = rebuild_codebook(model, vectors, 32).train()
    scalars = rebuilt.training_step({"image": images[:8]}, 0)
    expected = scalars["reconstruction"] + 0.8 * scalars["generator"] + scalars["codebook"]
    torch.testing.assert_close(scalars["loss"].detach(), expected)
    assert not any(p.requires_grad for part in (rebuilt.encoder, rebuilt.quant_conv) for p in part.parameters())


@pytest.mark.parametrize("kind", ["vqvae", "vqgan"])
def test_fine_tuning_leaves_the_encoder_and_lowers_the_error(kind, images):
    model = make(kind)
    rebuilt = rebuild_codebook(model, collect_vectors(model, [images]), 32, generator_weight=0.0).train()
    encoder = [p.clone() for p in rebuilt.encoder.parameters()]
    codebook = rebuilt.quantizer.codebook.clone()
    optimiser = torch.optim.Adam([p for p in rebuilt.parameters() if p.requires_grad], 2e-3)
    losses = []
    for step in range(20):
        loss = rebuilt.training_step({"image": images[:32]}, step)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(encoder, rebuilt.encoder.parameters(), strict=True))
    assert not torch.equal(codebook, rebuilt.quantizer.codebook)


def test_more_codes_than_vectors_are_refused(model):
    with pytest.raises(ValueError, match="vectors: expected at least one for each of 32 codes, got 31"):
        rebuild_codebook(model, torch.zeros(31, 8), 32)


@torch.no_grad()
def test_pruning_keeps_every_used_code_and_what_images_look_like(model, images):
    codes = model.encode(images)
    pruned, kept = prune_codebook(model, torch.bincount(codes.flatten(), minlength=32))
    assert kept.tolist() == codes.unique().tolist()
    assert pruned.config == replace(model.config, codebook_size=len(kept)) and len(kept) < 32
    assert torch.equal(pruned.quantizer.codebook, model.quantizer.codebook[kept])
    assert torch.equal(pruned.quantizer.cluster_size, model.quantizer.cluster_size[kept])
    assert torch.equal(pruned.encode(images), remap_codes(codes, kept))
    torch.testing.assert_close(pruned.reconstruct(images), model.reconstruct(images))


def test_codes_are_remapped():
    codes = torch.tensor([[5, 0], [3, 7]])
    assert remap_codes(codes, torch.tensor([0, 3, 5])).tolist() == [[2, 0], [1, -1]]


@pytest.mark.parametrize(
    "counts, message",
    [
        (torch.ones(31), r"counts: expected shape \(32,\), one for each code, got \(31,\)"),
        (torch.zeros(32), "counts: expected a code with a count above 0"),
    ],
)
def test_counts_that_do_not_fit_are_refused(model, counts, message):
    with pytest.raises(ValueError, match=message):
        prune_codebook(model, counts)
