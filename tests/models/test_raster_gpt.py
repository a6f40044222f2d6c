"""The raster-order baseline: no code sees those after it, and sampling with a cache is the model."""

import math
from dataclasses import asdict

import pytest
import torch

from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig

K = 7


def model(**options) -> RasterGPT:
    """A network away from its start, which hardly tells codes apart."""
    torch.manual_seed(0)
    sizes = dict(codebook_size=K, grid=(3, 4), dim=16, depth=2, heads=2)
    net = RasterGPT(RasterGPTConfig(**sizes | options))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def test_the_default_has_the_size_of_the_dq_transformer():
    with torch.device("meta"):
        count = sum(p.numel() for p in RasterGPT(RasterGPTConfig()).parameters())
    assert 0.95 < count / 308_884_480 < 1.05


@torch.no_grad()
def test_a_code_depends_on_those_before_it_in_raster_order():
    net, codes = model(), torch.randint(K, (2, 3, 4))
    changed = codes.clone()
    changed[:, 1, 2] = (changed[:, 1, 2] + 1) % K
    before, after = net(codes), net(changed)
    assert before.shape == (2, 12, K)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amin(-1).max() > 1e-4
    assert torch.equal(before, net(codes.flatten(1)))


def test_training_step_is_the_cross_entropy():
    net, codes = model(num_classes=3, dropout=0.0), torch.randint(K, (4, 3, 4))
    labels = torch.tensor([0, 2, 1, 0])
    got = net.training_step({"codes": codes, "label": labels})
    p = net(codes, labels).log_softmax(-1).gather(-1, codes.flatten(1)[..., None])
    torch.testing.assert_close(got["loss"], -p.mean())
    torch.testing.assert_close(got["bits_per_dim"], -p.mean().detach() / math.log(2))
    got["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_it_learns_what_follows_what():
    torch.manual_seed(0)
    net = RasterGPT(RasterGPTConfig(codebook_size=K, grid=(2, 4), dim=32, depth=1, heads=2, dropout=0.0, num_classes=2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    labels = torch.arange(16) % 2
    # Class 0 counts up, class 1 down, each from code 3.
    codes = (3 + torch.arange(8) * torch.where(labels == 0, 1, -1)[:, None]) % K
    for _ in range(60):
        optimizer.zero_grad()
        net.training_step({"codes": codes, "label": labels})["loss"].backward()
        optimizer.step()
    drawn = net.sample(8, torch.arange(8) % 2, top_k=1).flatten(1)
    assert torch.equal(drawn, codes[:8])


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(), dict(num_classes=3)])
def test_likeliest_codes_drawn_with_a_cache_are_those_of_the_whole_sequence(options):
    net = model(**options)
    label = 1 if options else None
    drawn = net.sample(2, label, top_k=1)
    logits = net(drawn, torch.tensor([1, 1]) if options else None)
    assert torch.equal(logits.argmax(-1), drawn.flatten(1))


@torch.no_grad()
def test_codes_are_drawn_from_the_model():
    net, n = model(grid=(1, 2), codebook_size=3), 20_000
    drawn = net.sample(n, generator=torch.Generator().manual_seed(0), batch_size=n).flatten(1)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    p = net(pairs).log_softmax(-1).gather(-1, pairs[..., None]).sum((1, 2)).exp()
    share = (drawn[:, 0] * 3 + drawn[:, 1]).bincount(minlength=9) / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


@torch.no_grad()
def test_inpainting_keeps_what_is_given_and_continues_it():
    net, codes = model(), torch.randint(K, (4, 3, 4))
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 1:3] = True
    hidden = codes.masked_fill(mask, -5)  # any value
    drawn = net.inpaint(hidden, mask, top_k=1, batch_size=3)
    assert torch.equal(drawn[:, ~mask], codes[:, ~mask])
    assert torch.equal(drawn.flatten(1)[:, 5:7], net(drawn).argmax(-1)[:, 5:7])
    # Masks of each image's own, and flat codes.
    own = torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    drawn = net.inpaint(codes.flatten(1), own).flatten(1)
    assert torch.equal(drawn[~own], codes.flatten(1)[~own])


@torch.no_grad()
def test_inpainting_is_blind_to_what_comes_after():
    net, codes = model(), torch.randint(K, (4, 3, 4))
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1] = True
    other = torch.cat([codes[:, :2], (codes[:, 2:] + 1) % K], dim=1)
    draw = lambda codes: net.inpaint(codes, mask, generator=torch.Generator().manual_seed(0))[:, 1]
    assert torch.equal(draw(codes), draw(other))


@torch.no_grad()
def test_inpainting_everything_is_sampling():
    net = model(num_classes=3)
    arguments = dict(labels=torch.tensor([0, 2]), guidance_scale=2.0)
    seeded = lambda: torch.Generator().manual_seed(0)
    drawn = net.inpaint(torch.zeros(2, 12, dtype=torch.int64), torch.ones(12).bool(), generator=seeded(), **arguments)
    assert torch.equal(drawn, net.sample(2, generator=seeded(), **arguments))


def test_codes_and_masks_that_do_not_fit_are_refused():
    codes = torch.zeros(2, 3, 4, dtype=torch.int64)
    for mask, error, message in [
        (torch.zeros(3, 4), TypeError, "mask: expected a bool tensor"),
        (torch.zeros(4, 3).bool(), ValueError, "mask: expected shape"),
        (torch.zeros(3, 4).bool(), ValueError, f"codes: expected values in 0..{K - 1} outside the mask, got 0..{K}"),
    ]:
        with pytest.raises(error, match=message):
            model().inpaint(codes.index_fill(2, torch.tensor([3]), K), mask)


@torch.no_grad()
def test_guidance_is_of_the_logits():
    net = model(num_classes=3, grid=(2, 2))
    drawn = net.sample(3, 2, top_k=1, guidance_scale=4.0)
    conditional, unconditional = net(drawn, torch.full((3,), 2)), net(drawn)
    guided = unconditional + 4 * (conditional - unconditional)
    assert torch.equal(guided.argmax(-1), drawn.flatten(1))
    assert not torch.equal(drawn, net.sample(3, 2, top_k=1))


def test_the_same_seed_draws_the_same():
    net = model()
    draw = lambda seed: net.sample(5, generator=torch.Generator().manual_seed(seed), batch_size=2)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert draw(1).shape == (5, 3, 4)


def test_sampling_leaves_the_mode_as_it_was():
    net = model().train()
    net.sample(1)
    assert net.training and net.stack.blocks[0].dropout.training


def test_the_configuration_goes_through_json_and_back():
    config = RasterGPTConfig(grid=(3, 4), num_classes=2)
    assert RasterGPTConfig(**asdict(config) | {"grid": [3, 4]}) == config


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (dict(), dict(n=0), "n: expected a whole number, at least 1, got 0"),
        (dict(), dict(n=2, labels=1), "labels: expected None"),
        (dict(num_classes=3, class_dropout=0.0), dict(n=2), "labels: missing"),
        (dict(num_classes=3), dict(n=2, labels=3), "labels: expected values in 0..2, or -1 for no class"),
        (
            dict(num_classes=3, class_dropout=0.0),
            dict(n=2, labels=-1),
            "labels: expected values in 0..2 .the model knows",
        ),
        (dict(num_classes=3, class_dropout=0.0), dict(n=2, labels=1, guidance_scale=2.0), "guidance_scale: expected 1"),
        (dict(), dict(n=2, top_p=0.0), "top_p: expected a share"),
        (dict(), dict(n=2, batch_size=0), "batch_size: expected at least 1"),
    ],
)
def test_a_sample_that_cannot_be_drawn_is_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**config).sample(**arguments)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"codes": torch.zeros(2, 4, 3, dtype=torch.int64)}, "codes.*: expected codes"),
        (
            {"codes": torch.full((2, 12), 99), "label": torch.zeros(2, dtype=torch.int64)},
            r"codes: expected values in 0\.\.",
        ),
        (
            {"codes": torch.full((2, 12), -1), "label": torch.zeros(2, dtype=torch.int64)},
            r"codes: expected values in 0\.\.",
        ),
        ({"codes": torch.zeros(2, 12, dtype=torch.int64)}, 'batch\\["label"\\]: missing'),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        model(num_classes=3).training_step(batch)


def test_wrong_configurations_are_refused():
    for options, message in [(dict(grid=(3,)), "grid"), (dict(codebook_size=0), "codebook_size")]:
        with pytest.raises(ValueError, match=message):
            RasterGPTConfig(**options)
