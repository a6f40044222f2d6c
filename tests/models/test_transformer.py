"""The transformer denoiser: its start, its sense of place, its interface."""

import math

import pytest
import torch

from vqfast.models.transformer import Transformer, grid_angles, rotate


def small(**options) -> Transformer:
    """A network away from its start, whose zeros hide everything."""
    torch.manual_seed(0)
    net = Transformer(11, **{**dict(grid=(2, 3), T=10, dim=16, depth=2, heads=2), **options}).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def test_before_training_every_code_is_as_likely():
    net = Transformer(11, grid=(2, 3), T=10, dim=16, depth=2, heads=2)
    logits = net(torch.randint(11, (4, 6)), torch.tensor([1, 2, 3, 10]))
    assert torch.equal(logits, torch.zeros(4, 6, 11))


def test_every_parameter_learns():
    net = small(num_classes=3)
    net(torch.randint(11, (4, 6)), torch.tensor([1, 2, 3, 10]), torch.tensor([0, 1, 2, -1])).square().sum().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert silent == []


@pytest.mark.parametrize("shape", [(3, 6), (3, 2, 3), (2, 5, 4), (1, 1, 1), (0, 6)])
def test_grids_of_any_size(shape):
    logits = small()(torch.randint(11, shape), torch.arange(shape[0]) + 1)
    assert logits.shape == (shape[0], math.prod(shape[1:]), 11)
    assert logits.is_contiguous()


@torch.no_grad()
def test_flat_codes_are_read_row_by_row():
    net, x_t, t = small(), torch.randint(11, (2, 6)), torch.tensor([3, 4])
    assert torch.equal(net(x_t, t), net(x_t.view(2, 2, 3), t))
    assert not torch.allclose(net(x_t, t), net(x_t.view(2, 3, 2), t))


@torch.no_grad()
def test_a_code_means_something_else_elsewhere():
    net = small(grid=(3, 3))
    logits = net(torch.zeros(1, 9, dtype=torch.int64), torch.tensor([3]))[0]
    apart = torch.cdist(logits, logits) + torch.eye(9)
    assert apart.min() > 1e-3


def test_attention_depends_on_the_offset_in_rows_and_columns():
    angles = grid_angles(6, 6, 4, torch.device("cpu"))
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    scores = (rotate(q.expand(1, 1, 36, 16), angles) @ rotate(k.expand(1, 1, 36, 16), angles).mT).view(6, 6, 6, 6)
    torch.testing.assert_close(scores[0, 0, 2, 1], scores[3, 4, 5, 5], rtol=1e-4, atol=1e-4)
    assert abs(scores[0, 0, 2, 1] - scores[0, 0, 1, 2]) > 1e-3


@torch.no_grad()
def test_a_result_does_not_depend_on_batch_mates():
    net = small(num_classes=3)
    x_t, t, labels = torch.randint(11, (5, 6)), torch.tensor([1, 3, 5, 7, 10]), torch.tensor([0, 1, 2, -1, 0])
    together = net(x_t, t, labels)
    alone = torch.cat([net(x_t[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_level_and_class_change_the_logits():
    net = small(num_classes=3)
    x_t, t = torch.randint(11, (1, 6)), torch.tensor([4])
    base = net(x_t, t, torch.tensor([0]))
    assert not torch.allclose(base, net(x_t, torch.tensor([9]), torch.tensor([0])))
    assert not torch.allclose(base, net(x_t, t, torch.tensor([1])))
    assert torch.equal(net(x_t, t), net(x_t, t, torch.tensor([-1])))


@torch.no_grad()
def test_class_dropout_acts_in_training_alone():
    net = small(num_classes=3, class_dropout=1.0)
    x_t, t, labels = torch.randint(11, (2, 6)), torch.tensor([4, 5]), torch.tensor([0, 2])
    assert not torch.allclose(net(x_t, t, labels), net(x_t, t))
    net.train()
    torch.testing.assert_close(net(x_t, t, labels), net(x_t, t))


def test_bfloat16_weights_run():
    logits = small().bfloat16()(torch.randint(11, (2, 6)), torch.tensor([3, 4]))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


CODES = torch.zeros(1, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    "codes, label, num_classes, error, message",
    [
        (CODES[:, 1:], None, None, ValueError, r"x_t: expected \(B, 6\) for the grid 2 x 3"),
        (CODES.float(), None, None, TypeError, "x_t: expected int64 codes, got float32"),
        (CODES, 0, None, ValueError, "labels: expected None, this model has no classes"),
        (CODES, -2, 3, ValueError, r"labels: expected values in 0\.\.2, or -1 for no class, got -2\.\.-2"),
    ],
)
def test_what_does_not_fit_is_named(codes, label, num_classes, error, message):
    labels = None if label is None else torch.tensor([label])
    with pytest.raises(error, match=message):
        small(num_classes=num_classes)(codes, torch.tensor([1]), labels)


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"dim: expected a multiple of 4 \* heads = 12"):
        Transformer(11, dim=16, heads=3)
    with pytest.raises(ValueError, match="depth: expected at least 1, got 0"):
        Transformer(11, dim=16, heads=2, depth=0)
