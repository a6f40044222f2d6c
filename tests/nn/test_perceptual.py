"""LPIPS: its definition, its weights by name, a gradient to the images and to nothing else."""

import pytest
import torch
import torch.nn.functional as F

from vqfast.nn.perceptual import LPIPS

# torchvision's vgg16: output channels of the convolutions, and where the pooling stands among them.
VGG16 = [64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512]


def vgg16():
    """The layers numbered as in torchvision, built anew."""
    layers, width = [], 3
    for out in VGG16:
        if out == "pool":
            layers.append(torch.nn.MaxPool2d(2))
        else:
            layers += [torch.nn.Conv2d(width, out, 3, padding=1), torch.nn.ReLU()]
            width = out
    return torch.nn.Sequential(*layers)


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    found = {f"features.{name}": value.detach() for name, value in vgg16().named_parameters()}
    found |= {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    return found | {"classifier.0.weight": torch.zeros(2, 2)}


@pytest.fixture(scope="module")
def pairs():
    torch.manual_seed(1)
    return torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1


def test_it_is_the_published_definition(weights, pairs):
    stack = vgg16()
    stack.load_state_dict({k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features.")})
    ends = {3: 0, 8: 1, 15: 2, 22: 3, 29: 4}  # after relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    stages = []
    for images in pairs:
        # ImageNet's normalisation of values in [0, 1].
        x, stage = ((images + 1) / 2 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1), []
        for number, layer in enumerate(stack):
            x = layer(x)
            if number in ends:
                stage.append(F.normalize(x, dim=1))
        stages.append(stage)
    expected = sum(
        ((a - b) ** 2 * weights[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))
        for i, (a, b) in enumerate(zip(*stages, strict=True))
    )
    torch.testing.assert_close(LPIPS(weights)(*pairs), expected, rtol=1e-4, atol=1e-4)


def test_a_distance(weights, pairs):
    net, (x, y) = LPIPS(weights), pairs
    distance = net(x, y)
    assert distance.shape == (2,) and distance.dtype == torch.float32
    assert (distance > 0).all()
    assert torch.equal(net(x, x), torch.zeros(2))
    torch.testing.assert_close(net(y, x), distance)
    assert (net(x, x + 0.1 * (y - x)) < distance).all()


def test_the_gradient_goes_to_the_images_alone(weights, pairs):
    net, x = LPIPS(weights), pairs[0].clone().requires_grad_()
    net(x, pairs[1]).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert not list(net.parameters())


def test_grey_images_count_as_three_equal_channels(weights, pairs):
    net, (x, y) = LPIPS(weights), (side[:, :1] for side in pairs)
    torch.testing.assert_close(net(x, y), net(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))


def test_a_checkpoint_does_not_hold_it(weights):
    assert LPIPS(weights).state_dict() == {}


def test_missing_weights_and_other_shapes_are_named(weights):
    with pytest.raises(ValueError, match="weights: expected those of VGG16.*got none for lin3.model.1.weight"):
        LPIPS({name: value for name, value in weights.items() if name != "lin3.model.1.weight"})
    with pytest.raises(ValueError, match=r"expected features.5.weight of shape \(128, 64, 3, 3\), got \(2, 2\)"):
        LPIPS(weights | {"features.5.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("shape", [(2, 2, 32, 32), (2, 3, 15, 32), (3, 32, 32)])
def test_images_that_do_not_fit_are_refused(weights, shape):
    with pytest.raises(ValueError, match="images: expected"):
        LPIPS(weights)(torch.zeros(shape), torch.zeros(shape))
