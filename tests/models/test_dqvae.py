"""DQ-VAE: the published sizes, the released network's numbers, what encoding to a target promises, that it learns."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from vqfast.models.converters.dqvae import dqvae_config, dqvae_state_dict
from vqfast.models.dqvae import DQVAE, DQVAEConfig, grain_pictures
from vqfast.nn.routers import code_lengths, counts_for_codes, repeat_cells, select_grains, straight_through_gate
from vqfast.nn.vector_quantize import VectorQuantize
from vqfast.ops import grain_budget_loss, pack


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# The released network (golden: dqvae_dual_small)


@pytest.fixture
def released(golden):
    g = golden("dqvae_dual_small")
    state = {name.removeprefix("sd/"): value for name, value in g.items() if name.startswith("sd/")}
    model = DQVAE(dqvae_config(state)).eval()
    model.load_state_dict(dqvae_state_dict(state))
    return model, g, state


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(1.0, theirs.abs().max().item()))


@torch.no_grad()
def test_the_released_inference_stage_by_stage(released):
    model, g, _ = released
    coarse, fine = features = model.features(g["image"])
    close(coarse, g["h_coarse"])
    close(fine, g["h_fine"])
    close(model.router.logits(features), g["router_logits"])
    routing = model.router(features, g["image"])
    assert torch.equal(routing.grains, g["grain"])
    selected = select_grains(features, routing)
    close(selected, g["h_selected"])
    close(model.quant_proj(selected.movedim(1, -1)).movedim(-1, 1), g["z_pre_quant"])
    quantized, codes, _ = model.quantize(selected, routing.grains, freeze_codebook=True)
    assert torch.equal(codes, g["indices"])
    close(quantized.movedim(-1, 1), g["z_q"])
    post = model.post_quant_proj(quantized).movedim(-1, 1)
    close(post, g["post_quant"])
    close(model.decoder.fourier(post), g["pos_fourier"])
    close(model.decoder.learned(post), g["pos_learned"])
    close(model.decoder(post), g["recon"])
    close(model.reconstruct(g["image"]), g["recon"])


def test_the_released_routing_in_training(released):
    model, g, _ = released
    with torch.no_grad():
        features = model.features(g["image"])
    logits = g["router_logits"].requires_grad_()
    gate = straight_through_gate(logits, g["gumbel_noise"])
    assert torch.equal(gate.argmax(1), g["train_grain"])
    close(gate.detach(), g["train_gate"])
    routing = model.router(features)._replace(grains=g["train_grain"], gate=gate)
    selected = select_grains(features, routing)
    close(selected.detach(), g["train_h_selected"])
    (by_selection,) = torch.autograd.grad((selected * g["train_probe"]).sum(), logits, retain_graph=True)
    close(by_selection, g["train_grad_logits"])
    budget = grain_budget_loss(gate, (0.5,), (20.0,))
    close(budget.detach(), g["train_budget_loss"])
    close(torch.autograd.grad(budget, logits)[0], g["train_budget_grad_logits"])
    again = model.train().router(features, noise=g["gumbel_noise"])
    assert torch.equal(again.grains, g["train_grain"])


def test_the_released_loss_counts_each_code_once_and_its_gradient(released):
    """Released: mean over positions of 1/4 or 1 times the error; ours: mean over codes, without the codebook's term."""
    model, g, _ = released
    model.train()
    selected, grains = g["h_selected"].requires_grad_(), g["grain"]
    quantized, _, loss = model.quantize(selected, grains, freeze_codebook=True)
    share = code_lengths(grains).sum() / g["indices"].numel()
    beta = model.config.commitment_weight
    close((loss * share * (1 + beta) / beta).detach(), g["vq_loss_masked"])
    # Through quant_proj, which the released gradient stops short of.
    probe = g["st_probe"].movedim(1, -1)
    (ours,) = torch.autograd.grad(100 * share * loss + (quantized * probe).sum(), selected)
    theirs = torch.einsum("bdhw,dc->bchw", g["grad_z_probe"], model.quant_proj.weight)
    # Ours goes to the first of a coarse cell's copies; all copies are one feature.
    fold = lambda x: torch.where(repeat_cells(grains[:, None], 2) == 0, repeat_cells(F.avg_pool2d(x, 2) * 4, 2), x)
    close(fold(ours), fold(theirs).detach())


@pytest.mark.parametrize("case", ["plain", "restart"])
def test_the_released_moving_averages(golden, case):
    """All codes but the restarted, whose vectors are drawn at random: from the batch, with a count of exactly 1."""
    g = {name.removeprefix(f"{case}/"): value for name, value in golden("dq_ema_codebook").items()}
    size, dim = g["embed_sum_before"].shape
    quantizer = VectorQuantize(
        dim,
        size,
        decay=0.99,
        commitment_weight=0.25,
        threshold_ema_dead_code=float(case == "restart"),
        accept_image_fmap=True,
    )
    quantizer.codebook.copy_(g["weight_before"][:-1])
    quantizer.cluster_size.copy_(g["cluster_size_before"])
    quantizer.embed_avg.copy_(g["embed_sum_before"])
    quantized, codes, _ = quantizer(g["x"])
    assert torch.equal(codes, g["indices"])
    close(quantized, g["z_q"])
    kept = g["kept"].bool() if case == "restart" else torch.ones(size, dtype=torch.bool)
    close(quantizer.cluster_size, g["cluster_size_after"])
    close(quantizer.embed_avg[kept], g["embed_sum_after"][kept])
    close(quantizer.codebook[kept], g["weight_after"][:-1][kept])
    vectors = g["x"].movedim(1, -1).reshape(-1, dim)
    restarted = quantizer.codebook[~kept]
    assert (restarted[:, None] == vectors).all(-1).any(1).all()
    assert (quantizer.cluster_size[~kept] == 1).all()


def test_a_code_survives_its_first_steps_without_a_hundred_hits():
    """The released averages start at 0 with unrelated sums: there each code is restarted in the first step."""
    quantizer = VectorQuantize(4, 8, decay=0.99, threshold_ema_dead_code=1.0)
    before = quantizer.codebook.clone()
    quantizer(before.repeat(3, 1)[None])
    close(quantizer.codebook, before)


@torch.no_grad()
def test_released_checkpoints_of_every_kind_convert(released):
    model, g, state = released
    image = g["image"]
    # With the prefixes of a training, and a discriminator.
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    judge = {f"module.loss.discriminator.{n}": t for n, t in model.discriminator.state_dict().items()}
    other = DQVAE(dqvae_config(wrapped | judge)).eval()
    other.load_state_dict(dqvae_state_dict(wrapped | judge))
    assert torch.equal(other.reconstruct(image), model.reconstruct(image))
    assert torch.equal(other.discriminator(image), model.eval().discriminator(image))
    # Without a router it is the entropy model's.
    plain = {name: tensor for name, tensor in state.items() if "router" not in name}
    entropy = DQVAE(dqvae_config(plain)).eval()
    entropy.load_state_dict(dqvae_state_dict(plain))
    assert entropy.config.router == "entropy"
    assert entropy.encode(image).lengths.tolist() == [16 + 3 * 8] * 3
    # One linear layer in the router.
    single = {name: t for name, t in state.items() if "router.gate" not in name}
    single |= {"encoder.router.gate.weight": state["encoder.router.gate.2.weight"]}
    single |= {"encoder.router.gate.bias": state["encoder.router.gate.2.bias"]}
    model = DQVAE(dqvae_config(single))
    model.load_state_dict(dqvae_state_dict(single))
    assert model.config.router_layers == 1


def test_what_is_no_checkpoint_of_a_dqvae_is_named(released):
    _, _, state = released
    with pytest.raises(ValueError, match="quantize.codebook.weight is missing"):
        dqvae_config({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="encoder.mid_fine.attn_1.q.weight is missing"):
        dqvae_state_dict({name: t for name, t in state.items() if name != "encoder.mid_fine.attn_1.q.weight"})
    with pytest.raises(ValueError, match=r"expected quant_conv.bias of shape \(32,\), got \(31,\)"):
        dqvae_state_dict(state | {"quant_conv.bias": torch.zeros(31)})


# The published sizes (parameter_counts.json: perceptual loss and discriminator excluded, padding row included)

TRIPLE = dict(
    mults=(1, 1, 2, 2, 4, 4), attention_resolutions=(8, 16, 32), grains=3, shares=(0.3, 0.3), budget_weights=(1.0, 1.0)
)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "options, total, encoder, router",
    [
        ({}, 48_098_437, 33_042_176, 264_706),
        (TRIPLE, 74_010_502, 58_624_512, 594_435),
        ({"router": "entropy"}, 47_833_731, 33_042_176, 0),
    ],
)
def test_the_published_sizes(options, total, encoder, router):
    with torch.device("meta"):
        model = DQVAE(DQVAEConfig(**options))
    # Ours is a buffer of K rows; the published count has one row more, for padding, which packed sequences do not need.
    codebook = (len(model.quantizer.codebook) + 1) * model.config.code_dim
    assert codebook == 262_400
    assert count(model.encoder) == encoder
    assert count(model.router) == router
    assert count(model.decoder) == 14_397_571
    assert count(model.quant_proj) == count(model.post_quant_proj) == 65_792
    assert count(model) - count(model.discriminator) + codebook == total


# Encoding

SMALL = DQVAEConfig(
    image_size=16,
    channels=32,
    mults=(1, 1, 1),
    attention_resolutions=(),
    num_res_blocks=1,
    codebook_size=32,
    code_dim=8,
    z_channels=32,
    disc_weight=0.0,
    router="entropy",
)
SMALL_TRIPLE = replace(SMALL, grains=3, shares=(0.3, 0.3), budget_weights=(1.0, 1.0), entropy_per="image")


def images(count=4, size=16):
    """Flat on the left, noise on the right, more of it in each image than in the one before."""
    noise = torch.randn(count, 3, size, size) * torch.linspace(0.2, 0.6, count).view(-1, 1, 1, 1)
    noise[..., : size // 2] = 0
    return (torch.rand(count, 3, 1, 1) - 0.5 + noise).clamp(-1, 1)


def test_codes_go_where_the_detail_is_and_come_back():
    model = DQVAE(SMALL).eval()
    result = model.encode(images())
    assert result.codes.shape == (4, 8, 8) and result.grains.shape == (4, 4, 4)
    assert (result.grains[..., :2] == 0).all() and (result.grains[..., 2:] == 1).all()
    assert result.lengths.tolist() == [8 + 4 * 8] * 4
    packed = pack(result.codes, result.grains)
    assert packed.cu_seqlens.diff().tolist() == result.lengths.tolist()
    coarse = result.codes[:, ::2, ::2][result.grains == 0]
    assert torch.equal(result.codes[:, 1::2, 1::2][result.grains == 0], coarse), "coarse codes are repeated"
    assert model.decode_codes(result).shape == (4, 3, 16, 16)
    assert torch.equal(model.decode_codes(result.codes), model.decode_codes(result))


@pytest.mark.parametrize("config", [SMALL, SMALL_TRIPLE, replace(SMALL, router="feature")])
def test_as_many_codes_as_asked_for(config):
    model = DQVAE(config).eval()
    cells = config.grid_size**2
    most = cells * 4 ** (config.grains - 1)
    targets = [cells, cells + 15, cells + 3 * 11, most]
    assert model.encode(images(), target_codes=targets).lengths.tolist() == targets
    assert model.encode(images(), target_codes=cells + 17).lengths.tolist() == [cells + 15] * 4


def test_more_codes_go_to_cells_that_have_more_already():
    model = DQVAE(SMALL).eval()
    few, more = (model.encode(images(), target_codes=n).grains for n in (25, 40))
    assert (more >= few).all() and (more > few).any()


@pytest.mark.parametrize("config", [SMALL, SMALL_TRIPLE])
def test_the_fewest_codes_with_the_error_asked_for(config):
    """Against every number of codes there is, image by image, where the error falls as bisection takes it to."""
    model, data = DQVAE(config).eval(), images(2)
    model.decode_codes = lambda result: data * (1 - 1 / result.lengths.view(-1, 1, 1, 1))
    power = data.square().mean(dim=(1, 2, 3))
    cells = config.grid_size**2
    added = torch.tensor([4**grain - 1 for grain in range(1, config.grains)])
    targets = range(cells, cells * 4 ** (config.grains - 1) + 1)
    counts = torch.tensor([counts_for_codes(target, cells, config.shares) for target in targets])
    reachable = sorted({cells + n for n in (counts * added).sum(1).tolist()})
    for target in (power.max().item() / 40.5**2, power.min().item() / 30.5**2):
        expected = [next(n for n in reachable if p / n**2 < target) for p in power.tolist()]
        assert model.encode(data, target_error=target).lengths.tolist() == expected
    assert (model.encode(data, target_error=1e-12).lengths == reachable[-1]).all(), "none is enough: all fine"
    assert (model.encode(data, target_error=1e3).lengths == cells).all()


def test_the_error_asked_for_is_that_of_the_reconstruction():
    model, data = DQVAE(SMALL).eval(), images()
    errors = lambda result: (model.decode_codes(result).clamp(-1, 1) - data).square().mean(dim=(1, 2, 3))
    target = errors(model.encode(data)).median().item()
    result = model.encode(data, target_error=target)
    reached = errors(result) < target
    assert (reached | (result.lengths == 64)).all() and reached.any()


def test_an_images_codes_do_not_depend_on_the_batch():
    model, data = DQVAE(SMALL).eval(), images()
    together = model.encode(data, target_codes=31)
    alone = model.encode(data[2:3], target_codes=31)
    assert torch.equal(together.codes[2:3], alone.codes) and torch.equal(together.grains[2:3], alone.grains)


# Training


COARSE = ("encoder.levels.2.", "encoder.downsamples.1.", "encoder.heads.0.")


@pytest.mark.parametrize("router", ["feature", "entropy", "random", "fixed"])
def test_every_router_trains_and_the_scalars_add_up(router):
    model = DQVAE(replace(SMALL, router=router)).train()
    scalars = model.training_step({"image": images()}, 0)
    scalars["loss"].backward()
    for name, parameter in model.named_parameters():
        used = not name.startswith("discriminator.") and (router != "fixed" or not name.startswith(COARSE))
        assert not used or parameter.grad.abs().sum() > 0, name
    terms = [scalars[name] for name in ("reconstruction", "commitment", "budget") if name in scalars]
    torch.testing.assert_close(scalars["loss"].detach(), sum(terms))
    assert ("budget" in scalars) == (router == "feature")
    assert 16 <= scalars["codes"] <= 64
    if router == "fixed":
        assert scalars["codes"] == 64


def test_a_code_counts_once_however_many_positions_it_covers():
    for counting, expected in (("codes", 40), ("positions", 64)):
        config = replace(SMALL, entropy_per="image", threshold_ema_dead_code=0.0, decay=0.0, counting=counting)
        model = DQVAE(config).train()
        assert model.training_step({"image": images()}, 0)["codes"] == 40
        assert model.quantizer.cluster_size.sum() == expected * 4


def test_the_budget_brings_the_router_to_its_share():
    model = DQVAE(replace(SMALL, router="feature", shares=(0.25,)))
    with torch.no_grad():
        model.router.gate[-1].bias.copy_(torch.tensor([-2.0, 2.0]))
    player = torch.optim.Adam(model.router.parameters(), 3e-2)
    for step in range(30):
        scalars = model.training_step({"image": images()}, step)
        player.zero_grad()
        scalars["loss"].backward()
        player.step()
    assert scalars["codes"].item() / 16 == pytest.approx(1 + 3 * 0.25, abs=0.3)
    held_out = model.eval().training_step({"image": images()}, 0)
    assert not {"commitment", "usage", "perplexity"} & set(held_out)  # figures of training batches
    share = (held_out["codes"] / 16 - 1) / 3
    torch.testing.assert_close(held_out["budget"], 10 * (share - 0.25) ** 2)


def test_two_players_take_turns():
    model = DQVAE(replace(SMALL, disc_weight=1.0, disc_channels=8, disc_layers=1)).train()
    assert model.training_parts == ("model", "discriminator")
    parts = [model.part_parameters(part) for part in model.training_parts]
    assert sum(map(len, parts)) == len(list(model.parameters()))
    batch = {"image": images()}
    players = {part: torch.optim.Adam(model.part_parameters(part), 1e-3) for part in model.training_parts}
    for step in range(3):
        for part, player in players.items():
            scalars = model.training_step(batch, step, part)
            model.zero_grad()
            scalars["loss"].backward()
            player.step()
            if part == "model":
                assert 0 < scalars["disc_weight"] <= 0.75
    assert all(value.isfinite() for value in scalars.values())


def test_it_learns_a_few_images():
    model = DQVAE(replace(SMALL, entropy_per="image")).train()
    player = torch.optim.Adam(model.part_parameters("model"), 3e-3)
    batch = {"image": repeat_cells(torch.randint(0, 2, (4, 3, 2, 2)) * 2.0 - 1, 8)}
    history = []
    for step in range(60):
        scalars = model.training_step(batch, step)
        player.zero_grad()
        scalars["loss"].backward()
        player.step()
        history.append(scalars["reconstruction"].item())
    assert history[-1] < 0.5 * history[0]


def test_encoding_leaves_the_model_alone():
    model = DQVAE(SMALL).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.encode(images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(counting="pixels"), "counting: expected 'codes' or 'positions', got 'pixels'"),
        (dict(grains=4), "grains: expected 2 or 3"),
        (dict(router="best"), "router: expected one of feature, entropy, random, fixed, got 'best'"),
        (dict(shares=(0.3, 0.3)), "shares: expected one for each of 1 finer grains"),
        (dict(budget_weights=()), "budget_weights: expected one"),
        (dict(decoder_mults=(1,)), "decoder_mults: expected 2 levels"),
        (dict(freeze_encoder=True), "freeze_encoder"),
        (dict(disc_weight_max=-1.0), "disc_weight_max: expected at least 0"),
        (dict(shares=(1.5,)), "shares: expected numbers"),
        (dict(shares=(-0.5,), router="fixed"), "shares: expected numbers"),
        (dict(budget_weights=(-1.0,)), "budget_weights: expected at least 0"),
        (dict(decoder_mults=(0, 1)), "decoder_mults: expected 2 levels"),
        (dict(z_channels=0), "z_channels: expected at least 1"),
    ],
)
def test_configurations_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        DQVAE(replace(SMALL, **change))


def test_what_is_no_grid_of_codes_is_refused():
    model = DQVAE(SMALL).eval()
    codes = model.encode(images()).codes
    for wrong in (codes[:, 1:], codes.flatten(1), codes + SMALL.codebook_size, codes * 0 - 1):
        with pytest.raises(ValueError, match="^codes: expected "):
            model.decode_codes(wrong)
    with pytest.raises(TypeError, match="^codes: expected an int64 or int32 tensor, got float32"):
        model.decode_codes(codes.float())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (dict(target_codes=15), "target_codes: expected from 16"),
        (dict(target_codes=[40, 40]), "expected one number, or one for each of 4 images, got 2"),
        (dict(target_error=0.0), "target_error: expected a mean squared error above 0"),
        (dict(target_codes=40, target_error=0.1), "expected one of them, got both"),
    ],
)
def test_targets_that_do_not_fit_are_named(targets, message):
    with pytest.raises(ValueError, match=message):
        DQVAE(SMALL).eval().encode(images(), **targets)
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, 16, 16\)"):
        DQVAE(SMALL).encode(torch.zeros(1, 1, 16, 16))


def test_the_configuration_survives_json():
    config = DQVAEConfig(**TRIPLE, decoder_mults=(1, 1, 1, 2), entropy_thresholds=(1.0, 2.0))
    assert DQVAEConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_grain_pictures_are_light_where_codes_are_fine():
    grains = torch.tensor([[[0, 1], [2, 0]]])
    pictures = grain_pictures(grains, num_grains=3, image_size=4)
    assert pictures.shape == (1, 1, 4, 4)
    assert pictures[0, 0, ::2, ::2].tolist() == [[-1, 0], [1, -1]]
    assert torch.equal(pictures[..., ::2, ::2], pictures[..., 1::2, 1::2])
