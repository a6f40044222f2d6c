"""What `SimVQ` promises: frozen codes behind a learned map, the convention of vector-quantize-pytorch."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vqfast.nn import SimVQ

CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (dict(), (3, 50, 8)),
        (dict(rotation_trick=False), (3, 50, 8)),
        (dict(commitment_weight=0.7, input_to_quantize_commit_loss_weight=0.1), (3, 50, 8)),
        (dict(frozen_codebook_dim=5, init_fn=lambda codes: codes * 2), (3, 5, 4, 8)),
        (dict(channel_first=True), (3, 8, 6, 5)),
        (dict(codebook_transform=lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))), (3, 50, 8)),
    ],
)
def test_trains_side_by_side_with_vector_quantize_pytorch(options, shape):
    peer_library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")

    def build(library):
        transform = options.get("codebook_transform")
        built = {"codebook_transform": transform()} if transform else {}
        return library(dim=8, codebook_size=32, **options | built)

    ours, peer = build(SimVQ), build(peer_library.SimVQ)
    peer.load_state_dict(ours.state_dict())
    optimisers = [torch.optim.SGD(module.parameters(), 0.5) for module in (ours, peer)]
    for training in (True, True, True, True, False):
        ours.train(training), peer.train(training)
        x = torch.randn(shape)
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        quantized, indices, loss = ours(mine)
        expected, expected_indices, expected_loss = peer(theirs)
        weight = torch.randn_like(x)
        ((quantized * weight).sum() + loss).backward()
        ((expected * weight).sum() + expected_loss).backward()
        assert torch.equal(indices, expected_indices)
        torch.testing.assert_close(quantized, expected, **CLOSE)
        torch.testing.assert_close(loss, expected_loss, **CLOSE)
        torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
        for parameter, peers in zip(ours.parameters(), peer.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, peers.grad, **CLOSE)
        torch.testing.assert_close(ours.indices_to_codes(indices), peer.indices_to_codes(indices), **CLOSE)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    assert torch.equal(ours.frozen_codebook, peer.frozen_codebook)


def test_training_moves_every_code_but_no_frozen_one():
    vq = SimVQ(8, 64)
    frozen, before = vq.frozen_codebook.clone(), vq.codebook.detach()
    x = torch.randn(8, 8)
    optimiser = torch.optim.SGD(vq.parameters(), 1.0)
    losses = []
    for _ in range(20):
        _, indices, loss = vq(x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert len(indices.unique()) < 64 and (vq.codebook != before).any(dim=1).all()
    assert torch.equal(vq.frozen_codebook, frozen)


@pytest.mark.parametrize(("channel_first", "shape"), [(False, (5, 8)), (False, (2, 3, 4, 8)), (True, (2, 8, 3, 4))])
def test_quantized_is_the_code_of_its_index(channel_first, shape):
    vq = SimVQ(8, 16, channel_first=channel_first)
    x = torch.randn(shape)
    quantized, indices, loss = vq(x)
    assert quantized.shape == shape and indices.dtype == torch.int64 and loss.shape == ()
    assert torch.equal(quantized, vq.indices_to_codes(indices))
    rows = x.movedim(1, -1) if channel_first else x
    assert torch.equal(indices, torch.cdist(rows.flatten(0, -2), vq.codebook).argmin(-1).view(indices.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_input_meets_float32_codes(dtype, autocast):
    vq = SimVQ(8, 16)
    x = torch.randn(3, 20, 8, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", enabled=autocast):
        quantized, indices, loss = vq(x)
    (quantized.float().sum() + loss).backward()
    expected = vq(x.detach().float())
    assert quantized.dtype == x.grad.dtype == dtype and loss.dtype == torch.float32
    assert torch.equal(indices, expected[1]) and torch.equal(quantized, expected[0].to(dtype))
    assert x.grad.isfinite().all() and vq.code_transform.weight.grad.isfinite().all()


def test_compiles_without_a_graph_break():
    vq = SimVQ(8, 16, channel_first=True).eval()
    compiled = torch.compile(vq, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 4, 3)
    for mine, expected in zip(compiled(x), vq(x), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_training_step_reads_nothing_back_from_the_device():
    """Fake tensors have no values: reading one on the host raises."""
    with FakeTensorMode():
        quantized, _, loss = SimVQ(6, 16)(torch.randn(2, 5, 6, requires_grad=True))
        (quantized.sum() + loss).backward()


def test_same_input_same_bits():
    vq = SimVQ(8, 64)
    x = torch.randn(4, 100, 8)
    assert all(torch.equal(first, second) for first, second in zip(vq(x), vq(x), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"codebook_size": 0}, "codebook_size: expected at least 1, got 0"),
        ({"frozen_codebook_dim": 0}, "frozen_codebook_dim: expected at least 1, got 0"),
        ({"commitment_weight": -1.0}, "commitment_weight: expected a number of at least 0, got -1.0"),
        ({"input_to_quantize_commit_loss_weight": -1.0}, "input_to_quantize_commit_loss_weight: .* got -1.0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SimVQ(**{"dim": 4, "codebook_size": 8} | options)


@pytest.mark.parametrize(("channel_first", "shape"), [(False, (2, 5, 7)), (True, (2, 5, 8)), (False, (8,))])
def test_a_shape_that_does_not_fit_is_named(channel_first, shape):
    with pytest.raises(ValueError, match=r"x: expected shape \(B, .*got"):
        SimVQ(8, 16, channel_first=channel_first)(torch.randn(shape))
