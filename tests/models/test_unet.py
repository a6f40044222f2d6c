"""VQ-DDM's U-Net: the published size, the released network's numbers, its interface."""

import math

import pytest
import torch

from vqfast.diffusion import Uniform, schedule
from vqfast.models.converters import vqddm_unet_state_dict
from vqfast.models.unet import UNet
from vqfast.ops import diffusion_loss, posterior


def parameters(*args, **options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(*args, **options).parameters())


@pytest.mark.parametrize("codebook_size, published", [(512, 117_454_984), (1024, 117_586_568)])
def test_the_default_is_the_published_model(codebook_size, published):
    assert parameters(codebook_size) == published


def test_classes_add_one_vector_each_and_one_for_none():
    assert parameters(1024, num_classes=1000) - parameters(1024) == 1001 * 128


# The released network (golden: vqddm_unet_small)


@pytest.fixture
def released(golden):
    """The network with the released weights; inputs and outputs with levels 1-based, tokens flat, K last."""
    g = golden("vqddm_unet_small")
    net = UNet(24, T=100, dim=8).eval()
    state = {name.removeprefix("sd/"): value for name, value in g.items() if name.startswith("sd/")}
    net.load_state_dict(vqddm_unet_state_dict(state))
    g["t"] = g["t"] + 1
    for name in ("logits", "log_p_prev"):
        g[name] = g[name].flatten(2).transpose(1, 2)
    return net, g, state


@torch.no_grad()
def test_the_released_logits(released):
    net, g, _ = released
    logits = net(g["x_t"], g["t"])
    torch.testing.assert_close(logits, g["logits"], rtol=0, atol=1e-4)
    assert torch.equal(net(g["x_t"].flatten(1), g["t"]), logits)


@torch.no_grad()
def test_the_released_features_on_the_way(released):
    net, g, _ = released
    seen = {}
    for name in ("time_mlp", "mid_attention", "mid_res2"):
        net.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    net(g["x_t"], g["t"])
    torch.testing.assert_close(seen["time_mlp"], g["time_embedding"], rtol=0, atol=1e-5)
    torch.testing.assert_close(seen["mid_attention"], g["mid_attn_out"], rtol=0, atol=1e-4)
    torch.testing.assert_close(seen["mid_res2"], g["mid_out"], rtol=0, atol=1e-4)


def test_the_released_loss_posterior_and_gradients(released):
    net, g, _ = released
    chain = Uniform(24, schedule("cosine_released", 100))
    x0, x_t, t = g["x0"].flatten(1), g["x_t"].flatten(1), g["t"]
    logits = net(x_t, t)
    loss = diffusion_loss(logits, x0, x_t, t, chain, reduction="none").sum(1)
    torch.testing.assert_close(loss, g["loss_t"], rtol=1e-5, atol=1e-4)
    log_p = posterior(logits.detach(), x_t, t, t - 1, chain)
    torch.testing.assert_close(log_p, g["log_p_prev"], rtol=0, atol=1e-4)
    (loss.sum() / (math.log(2) * x0.numel())).backward()
    for ours, theirs in {
        net.embedding.weight: g["grad_embedding"],
        net.head.weight: g["grad_final_conv"].flatten(1),
        net.mid_attention.gate: g["grad_rezero_mid"],
    }.items():
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-5)


def test_a_training_checkpoint_converts_as_its_network_does(released):
    net, _, state = released
    checkpoint = {f"_nn.{name}": value for name, value in state.items()}
    checkpoint |= {f"_denoising._denoise_fn.{name}": value for name, value in state.items()}
    checkpoint |= {"_denoising.log_alpha": torch.zeros(100), "_denoising.Lt_history": torch.zeros(100)}
    converted = vqddm_unet_state_dict(checkpoint)
    assert converted.keys() == net.state_dict().keys()
    assert all(torch.equal(converted[name], value) for name, value in net.state_dict().items())


def test_a_checkpoint_without_the_network_is_refused():
    with pytest.raises(ValueError, match="expected a VQ-DDM U-Net.*got keys encoder.conv_in.weight"):
        vqddm_unet_state_dict({"encoder.conv_in.weight": torch.zeros(1)})


# The interface


def small(**options) -> UNet:
    torch.manual_seed(0)
    net = UNet(11, **{**dict(grid=(4, 4), T=10, dim=16, mults=(1, 2)), **options}).eval()
    torch.nn.init.ones_(net.mid_attention.gate)
    return net


@pytest.mark.parametrize("shape", [(3, 16), (3, 4, 4), (2, 8, 6), (0, 16)])
def test_grids_of_any_size_that_halves(shape):
    logits = small()(torch.randint(11, shape), torch.arange(shape[0]) + 1)
    assert logits.shape == (shape[0], math.prod(shape[1:]), 11)
    assert logits.is_contiguous()


@torch.no_grad()
def test_a_result_does_not_depend_on_batch_mates():
    net = small()
    x_t, t = torch.randint(11, (5, 16)), torch.tensor([1, 3, 5, 7, 10])
    together = net(x_t, t)
    alone = torch.cat([net(x_t[i : i + 1], t[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_level_and_class_change_the_logits():
    net = small(num_classes=3)
    x_t, t = torch.randint(11, (1, 16)), torch.tensor([4])
    base = net(x_t, t, torch.tensor([0]))
    assert not torch.allclose(base, net(x_t, torch.tensor([9]), torch.tensor([0])))
    assert not torch.allclose(base, net(x_t, t, torch.tensor([1])))
    assert torch.equal(net(x_t, t), net(x_t, t, torch.tensor([-1])))


@torch.no_grad()
def test_class_dropout_acts_in_training_alone():
    net = small(num_classes=3, class_dropout=1.0)
    x_t, t, labels = torch.randint(11, (2, 16)), torch.tensor([4, 5]), torch.tensor([0, 2])
    assert not torch.allclose(net(x_t, t, labels), net(x_t, t))
    net.train()
    torch.testing.assert_close(net(x_t, t, labels), net(x_t, t))


ONE = torch.ones(1, dtype=torch.int64)
CODES = torch.zeros(1, 16, dtype=torch.int64)


@pytest.mark.parametrize(
    "codes, labels, num_classes, error, message",
    [
        (CODES[:, 1:], None, None, ValueError, r"x_t: expected \(B, 16\) for the grid 4 x 4"),
        (torch.zeros(1, 5, 4).long(), None, None, ValueError, "grid: expected multiples of 2.*got 5 x 4"),
        (CODES.float(), None, None, TypeError, "x_t: expected int64 codes, got float32"),
        (CODES, ONE, None, ValueError, "labels: expected None, this model has no classes"),
        (CODES, 3 * ONE, 3, ValueError, r"labels: expected values in 0\.\.2"),
        (CODES, ONE.repeat(2), 3, ValueError, r"labels: expected shape \(B,\) = \(1,\)"),
        (CODES, ONE.float(), 3, TypeError, "labels: expected an int64 tensor"),
    ],
)
def test_what_does_not_fit_is_named(codes, labels, num_classes, error, message):
    with pytest.raises(error, match=message):
        small(num_classes=num_classes)(codes, ONE, labels)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(dim=12), "dim: expected an even number"),
        (dict(mults=()), "mults: expected at least one level"),
        (dict(mults=(1, 0)), "mults: expected at least one level"),
        (dict(grid=(6, 4), mults=(1, 1, 1)), "grid: expected multiples of 4"),
        (dict(num_classes=0), "num_classes: expected at least 1"),
        (dict(num_classes=2, class_dropout=1.5), "class_dropout: expected a share"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
