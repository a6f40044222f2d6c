"""VQGAN: the published sizes, the released network's numbers, two players that each move their own weights."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from vqfast.models.converters import lpips_state_dict, vqgan_config, vqgan_state_dict
from vqfast.models.vqgan import VQGAN, VQGANConfig
from vqfast.nn.discriminator import generator_loss
from vqfast.ops import quantize

TINY = VQGANConfig(
    image_size=16,
    in_channels=1,
    channels=32,
    mults=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(),
    codebook_size=32,
    code_dim=8,
    z_channels=16,
    disc_channels=8,
    disc_layers=1,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("codebook_size, total", [(1024, 72_141_699), (16384, 76_073_859)])
def test_the_published_sizes(codebook_size, total):
    with torch.device("meta"):
        model = VQGAN(VQGANConfig(codebook_size=codebook_size))
    assert count(model.encoder) == 29_298_176
    assert count(model.decoder) == 42_449_795
    assert count(model.quantizer) == codebook_size * 256
    assert count(model.quant_conv) == count(model.post_quant_conv) == 65_792
    assert count(model.discriminator) == 2_765_633
    assert count(model) - count(model.discriminator) == total


# The released network (golden: vqgan_small)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(1.0, theirs.abs().max().item()))


@pytest.fixture
def released(golden):
    g = golden("vqgan_small")
    state = {name.removeprefix("sd/"): value for name, value in g.items() if name.startswith("sd/")}
    model = VQGAN(vqgan_config(state, image_size=64)).eval()
    model.load_state_dict(vqgan_state_dict(state, image_size=64))
    return model, g, state


def test_the_configuration_of_the_released_checkpoint(released):
    config = released[0].config
    assert (config.in_channels, config.channels, config.mults, config.num_res_blocks) == (3, 32, (1, 1, 2, 2), 1)
    assert (config.attention_resolutions, config.z_channels) == ((8,), 48)
    assert (config.codebook_size, config.code_dim) == (64, 32)
    assert (config.disc_channels, config.disc_layers) == (16, 3)


@torch.no_grad()
def test_the_released_outputs_at_each_stage(released):
    model, g, _ = released
    close(model.encoder(g["image"]), g["encoder_out"])
    close(model.features(g["image"]), g["z_pre_quant"])
    codes = model.encode(g["image"])
    assert torch.equal(codes, g["indices"])
    close(model.quantizer(model.features(g["image"]))[0], g["z_q"])
    close(model.quantizer.get_codes_from_indices(codes), g["z_q_raw"])
    close(model.post_quant_conv(g["z_q"]), g["post_quant"])
    close(model.decode_codes(codes), g["recon"])


@pytest.mark.parametrize("form", ["legacy", "fixed"])
def test_both_forms_of_the_quantiser_loss(released, form):
    model, g, state = released
    model = VQGAN(replace(model.config, legacy_loss=form == "legacy"))
    model.load_state_dict(vqgan_state_dict(state, image_size=64))
    z = g["z_pre_quant"].requires_grad_()
    loss = model.train().quantizer(z)[2]
    close(loss.detach(), g[f"vq_loss_{form}"])
    loss.backward()
    torch.testing.assert_close(z.grad, g[f"grad_z_{form}"], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(model.quantizer.codebook.grad, g[f"grad_codebook_{form}"], rtol=1e-4, atol=1e-8)


def test_the_released_adaptive_weight(released):
    model, g, _ = released
    image = g["image"]
    output = model.reconstruct(image)
    error = (output - image).abs().mean()
    generator = generator_loss(model.discriminator(output))
    last = model.decoder.conv_out.weight
    for loss, name in ((error, "adapt_net_nll_grad"), (generator, "adapt_net_g_grad")):
        close(torch.autograd.grad(loss, last, retain_graph=True)[0], g[name])
    close(model.training_step({"image": image}, 0)["disc_weight"], g["adapt_net_weight"])


def test_lpips_is_found_in_a_whole_training():
    names = {
        "loss.perceptual_loss.net.slice1.0.weight": "features.0.weight",
        "loss.perceptual_loss.net.slice5.28.bias": "features.28.bias",
        "module.perceptual_loss.lin4.model.1.weight": "lin4.model.1.weight",
        "features.2.weight": "features.2.weight",
        "lin0.model.1.weight": "lin0.model.1.weight",
        "loss.perceptual_loss.scaling_layer.shift": None,
        "encoder.conv_in.weight": None,
    }
    found = lpips_state_dict({name: torch.tensor(i) for i, name in enumerate(names)})
    assert found == {ours: torch.tensor(i) for i, ours in enumerate(names.values()) if ours}


# Two players


def images(n=8):
    return {"image": torch.randint(0, 2, (n, 1, 2, 2)).repeat_interleave(8, 2).repeat_interleave(8, 3) * 2.0 - 1}


def optimisers(model, lr=2e-3):
    return {part: torch.optim.Adam(model.part_parameters(part), lr, betas=(0.5, 0.9)) for part in model.training_parts}


def play(model, batch, steps, lr=2e-3):
    """A training as the trainer's: each step, each part in turn, its loss backward and its optimiser's step."""
    players, history = optimisers(model, lr), []
    for step in range(steps):
        for part, player in players.items():
            scalars = model.training_step(batch, step, part)
            model.zero_grad()
            scalars["loss"].backward()
            player.step()
            history.append({part: {name: float(value.detach()) for name, value in scalars.items()}})
    return history


def test_the_parts_share_all_parameters_out():
    model = VQGAN(TINY)
    parts = [model.part_parameters(part) for part in model.training_parts]
    assert {id(p) for part in parts for p in part} == {id(p) for p in model.parameters()}
    assert sum(map(len, parts)) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="part: expected one of model, discriminator, got 'critic'"):
        model.part_parameters("critic")
    with pytest.raises(ValueError, match="part: expected one of model, discriminator, got 'critic'"):
        model.training_step(images(), 0, "critic")


def test_a_few_steps_lower_both_losses():
    model, batch = VQGAN(TINY).train(), images()
    history = play(model, batch, 30)
    first, last = history[0]["model"], history[-2]["model"]
    assert last["reconstruction"] < 0.6 * first["reconstruction"]
    judged = [record["discriminator"] for record in history if "discriminator" in record]
    assert judged[-1]["loss"] < judged[0]["loss"]
    assert judged[-1]["logits_real"] > judged[-1]["logits_fake"]


@pytest.mark.parametrize("part, other", [("model", "discriminator"), ("discriminator", "model")])
def test_a_part_gives_gradients_to_its_own_parameters_alone(part, other):
    model = VQGAN(TINY).train()
    for turn in model.training_parts:
        scalars = model.training_step(images(), 0, turn)
        if turn == part:
            scalars["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.part_parameters(part))
    assert all(p.grad is None for p in model.part_parameters(other))


def test_the_scalars_add_up():
    model = VQGAN(replace(TINY, codebook_weight=2.0)).train()
    scalars = model.training_step(images(), 0)
    expected = scalars["reconstruction"] + 2 * scalars["codebook"] + scalars["disc_weight"] * scalars["generator"]
    torch.testing.assert_close(scalars["loss"].detach(), expected)
    assert scalars["disc_weight"] > 0 and scalars["perceptual"] == 0
    assert not any(value.requires_grad for name, value in scalars.items() if name != "loss")


def test_before_its_start_the_discriminator_is_not_heard_and_does_not_learn():
    model, batch = VQGAN(replace(TINY, disc_start=3)).train(), images()
    for step, heard in ((2, False), (3, True)):
        scalars = model.training_step(batch, step)
        assert (scalars["disc_weight"] > 0) == heard
        model.zero_grad()
        model.training_step(batch, step, "discriminator")["loss"].backward()
        assert any(p.grad.abs().sum() > 0 for p in model.discriminator.parameters()) == heard


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_any_precision_trains(dtype):
    model, batch = VQGAN(TINY).to(dtype), {"image": torch.randn(4, 1, 16, 16, dtype=dtype)}
    for part in model.training_parts:
        loss = model.training_step(batch, 0, part)["loss"]
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.part_parameters(part))


def test_a_fixed_weight():
    model = VQGAN(replace(TINY, adaptive_disc_weight=False, disc_weight=0.7)).train()
    assert model.training_step(images(), 0)["disc_weight"] == pytest.approx(0.7)


def test_the_discriminator_judges_what_the_model_made_of_the_same_batch():
    model, batch, calls = VQGAN(TINY).train(), images(), []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    model.training_step(batch, 0)
    first = model.training_step(batch, 0, "discriminator")
    assert len(calls) == 1, "nothing is made twice"
    before = model.quantizer.cluster_size.clone()
    again = model.training_step(batch, 0, "discriminator")
    assert len(calls) == 2 and torch.equal(model.quantizer.cluster_size, before)
    torch.testing.assert_close(first["loss"], again["loss"])
    model.training_step(batch, 0)
    model.training_step(images(4), 0, "discriminator")
    assert len(calls) == 4, "another batch is made anew"


def test_held_out_images_need_no_gradient():
    model = VQGAN(TINY).eval()
    with torch.no_grad():
        scalars = model.training_step(images(), 0)
    assert scalars["loss"] == scalars["reconstruction"] and scalars["disc_weight"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adaptive_weight_under_autocast(dtype):
    model, batch = VQGAN(TINY).train(), images()
    exact = model.training_step(batch, 0)
    with torch.autocast("cpu", dtype):
        scalars = model.training_step(batch, 0)
        judged = model.training_step(batch, 0, "discriminator")
    for loss in (scalars["loss"], judged["loss"]):
        loss.backward()
        assert loss.dtype == torch.float32
    torch.testing.assert_close(scalars["disc_weight"], exact["disc_weight"], rtol=0.05, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Different(torch.nn.Module):
    """Stands in for LPIPS, whose weights a test of the model has no need of."""

    def forward(self, x, y):
        return (x - y).square().mean((1, 2, 3))


def test_the_perceptual_term_is_on_where_its_weights_are():
    batch = images()
    without, silent = VQGAN(TINY), VQGAN(replace(TINY, perceptual_weight=0.0), Different())
    assert not without.has_perceptual_loss and not silent.has_perceptual_loss
    assert "perceptual loss: off (no weights given)" in repr(without)
    model = VQGAN(replace(TINY, perceptual_weight=3.0, disc_weight=0.0), Different()).train()
    assert model.has_perceptual_loss and "perceptual loss: on" in repr(model)
    scalars = model.training_step(batch, 0)
    assert scalars["perceptual"] > 0
    expected = scalars["reconstruction"] + 3 * scalars["perceptual"] + scalars["codebook"]
    torch.testing.assert_close(scalars["loss"].detach(), expected)


def test_a_frozen_encoder_stays_as_it_is():
    model, batch = VQGAN(replace(TINY, freeze_encoder=True, dropout=0.5)).train(), images()
    before = {name: value.clone() for name, value in model.named_parameters()}
    features = model.features(batch["image"])
    play(model, batch, 3)
    for name, value in model.named_parameters():
        if not name.startswith("discriminator."):
            assert torch.equal(value, before[name]) == name.startswith(("encoder.", "quant_conv.")), name
    assert torch.equal(model.features(batch["image"]), features), "dropout too"


def test_the_quantiser_is_the_fused_op():
    model, batch = VQGAN(TINY), images()
    z = model.features(batch["image"]).movedim(1, -1)
    assert torch.equal(model.encode(batch["image"]), quantize(z, model.quantizer.codebook).indices)


def test_the_configuration_survives_json():
    assert VQGANConfig(**json.loads(json.dumps(asdict(TINY)))) == TINY


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(disc_loss="wgan"), "disc_loss: expected one of hinge, vanilla"),
        (dict(disc_start=-1), "disc_start: expected at least 0"),
        (dict(image_size=17), "image_size: expected a multiple of 2"),
        (dict(disc_layers=0), "layers: expected at least 1"),
        (dict(z_channels=0), "z_channels: expected at least 1"),
        (dict(disc_layers=3), "disc_layers: 3 need images of at least 24 pixels a side, got image_size 16"),
    ],
)
def test_configurations_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        VQGAN(replace(TINY, **change))


def test_images_too_small_for_the_perceptual_loss_are_refused():
    with pytest.raises(ValueError, match="perceptual: needs images of at least 16 pixels a side, got 8"):
        VQGAN(replace(TINY, image_size=8), Different())
    VQGAN(replace(TINY, image_size=2, disc_weight=0.0))
