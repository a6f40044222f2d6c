"""PatchGAN: the published sizes, the released network's numbers, the losses of both players."""

import math

import pytest
import torch

from vqfast.nn.discriminator import PatchDiscriminator, balance_weight, discriminator_loss, generator_loss


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("layers, parameters, buffers", [(2, 663_361, 770), (3, 2_765_633, 1_795)])
def test_the_published_sizes(layers, parameters, buffers):
    with torch.device("meta"):
        net = PatchDiscriminator(layers=layers)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(b.numel() for b in net.buffers()) == buffers


@pytest.fixture
def released(golden):
    g = golden("vqgan_small")
    prefix = "sd/loss.discriminator."
    net = PatchDiscriminator(channels=16, layers=3)
    net.load_state_dict({name.removeprefix(prefix): value for name, value in g.items() if name.startswith(prefix)})
    return net, g


@torch.no_grad()
def test_the_released_logits_with_stored_statistics(released):
    net, g = released
    net.eval()
    close(net(g["image"]), g["disc_eval_real"])
    close(net(g["recon"]), g["disc_eval_fake"])


@torch.no_grad()
def test_the_released_logits_and_statistics_in_training(released):
    net, g = released
    for call, images, logits in ((1, "image", "disc_train_real"), (2, "recon", "disc_train_fake")):
        close(net(g[images]), g[logits])
        stored = {name: value for name, value in g.items() if name.startswith(f"bn_after{call}/")}
        assert len(stored) == len(list(net.buffers()))
        for name, value in stored.items():
            close(net.get_buffer(name.split("/")[1]).double(), value.double())


def test_the_released_losses(golden):
    g = golden("vqgan_small")
    real, fake = g["disc_eval_real"], g["disc_eval_fake"]
    close(discriminator_loss(real, fake), g["hinge_d_eval"])
    close(discriminator_loss(g["disc_train_real"], g["disc_train_fake"]), g["hinge_d_train"])
    close(discriminator_loss(real, fake, "vanilla"), g["vanilla_d_eval"])
    close(generator_loss(fake), g["g_loss_eval"])


def test_the_released_balance(golden):
    g = golden("vqgan_small")
    reconstruction, generator = g["adapt_nll_grad"], g["adapt_g_grad"]
    close(0.8 * balance_weight(reconstruction, generator), g["adapt_weight"])
    weight = 0.8 * balance_weight(reconstruction, generator * 1e-9)
    torch.testing.assert_close(weight, g["adapt_weight_tiny_g"], rtol=1e-4, atol=0)
    close(0.8 * balance_weight(g["adapt_net_nll_grad"], g["adapt_net_g_grad"]), g["adapt_net_weight"])


def test_the_balance_is_bounded():
    gradient = torch.ones(4)
    assert balance_weight(gradient * 1e9, gradient * 0) == 1e4
    assert balance_weight(gradient * 0, gradient) == 0
    assert not balance_weight(gradient.requires_grad_(), gradient).requires_grad


def test_logits_for_patches_and_the_weights_they_start_from():
    torch.manual_seed(0)
    net = PatchDiscriminator(in_channels=1, channels=32, layers=2)
    assert net(torch.randn(2, 1, 32, 40)).shape == (2, 1, 6, 8)
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    for conv in convolutions:
        deviation = 0.02 / math.sqrt(2 * conv.weight.numel())
        assert abs(conv.weight.std().item() - 0.02) < 5 * deviation
    assert [conv.bias is None for conv in convolutions] == [False, True, True, False]


def test_the_smallest_images_leave_one_logit():
    net = PatchDiscriminator(channels=4, layers=2).eval()
    assert net(torch.zeros(1, 3, 12, 12)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="images: expected at least 12 pixels a side"):
        net(torch.zeros(1, 3, 11, 12))


@pytest.mark.parametrize("wrong", [dict(layers=0), dict(channels=0), dict(in_channels=0)])
def test_sizes_below_one_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected at least 1, got 0"):
        PatchDiscriminator(**wrong)


def test_another_loss_is_refused():
    with pytest.raises(ValueError, match="kind: expected one of hinge, vanilla, got 'wgan'"):
        discriminator_loss(torch.zeros(1), torch.zeros(1), "wgan")
