"""What `FSQ` promises: the levels of Mentzer et al. 2023, the convention of vector-quantize-pytorch."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vqfast.nn import FSQ

CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (dict(levels=[8, 5, 5, 5]), (3, 50, 4)),
        (dict(levels=(8, 6, 5), dim=10), (3, 50, 10)),
        (dict(levels=[8, 6, 5], num_codebooks=2), (3, 50, 6)),
        (dict(levels=[7, 4], dim=5, num_codebooks=3, projection_has_bias=False), (3, 50, 5)),
        (dict(levels=[8, 5, 5], keep_num_codebooks_dim=True), (3, 50, 3)),
        (dict(levels=[2, 3, 4], preserve_symmetry=True), (3, 50, 3)),
        (dict(levels=[8, 5, 5], channel_first=True), (3, 3, 50)),
        (dict(levels=[8, 5, 5]), (2, 3, 6, 5)),
        (dict(levels=[8, 5], num_codebooks=2), (2, 4, 3, 6, 5)),
        (dict(levels=[8, 5], return_indices=False), (3, 50, 2)),
    ],
)
def test_trains_side_by_side_with_vector_quantize_pytorch(options, shape):
    peer_library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    ours, peer = FSQ(**options), peer_library.FSQ(**options)
    peer.load_state_dict(ours.state_dict())
    optimisers = [torch.optim.SGD(fsq.parameters(), 0.1) for fsq in (ours, peer) if fsq.has_projections]
    for training in (True, True, True, False):
        ours.train(training), peer.train(training)
        x = 2 * torch.randn(shape)
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        quantized, indices = ours(mine)
        expected, expected_indices = peer(theirs)
        weight = torch.randn_like(x)
        (quantized * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(quantized, expected, **CLOSE)
        torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
        if options.get("return_indices", True):
            assert indices.dtype == torch.int64 and torch.equal(indices, expected_indices.long())
            torch.testing.assert_close(ours.indices_to_codes(indices), peer.indices_to_codes(indices), **CLOSE)
            torch.testing.assert_close(ours.implicit_codebook, peer.implicit_codebook, **CLOSE)
        else:
            assert indices is None
        for optimiser in optimisers:
            optimiser.step()
    for parameter, expected in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, **CLOSE)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", [[3], [4], [5], [8, 5, 5, 5], [16, 3, 7]])
def test_every_level_is_reached_and_none_beyond(levels, symmetric):
    fsq = FSQ(levels, preserve_symmetry=symmetric)
    x = torch.linspace(-20, 20, 4001)[:, None].expand(-1, len(levels))
    quantized, _ = fsq(x)
    for channel, L in enumerate(levels):
        reached = quantized[:, channel].unique()
        assert len(reached) == L and reached.min() == -1 and reached.max() == (1 if L % 2 or symmetric else 1 - 2 / L)


def test_indices_number_every_code_once():
    for symmetric in (False, True):
        fsq = FSQ([4, 3, 5], preserve_symmetry=symmetric)
        codes = fsq.implicit_codebook
        assert fsq.codebook_size == 60 == len(codes.unique(dim=0))
        assert torch.equal(fsq.codes_to_indices(codes), torch.arange(60))
        assert torch.equal(fsq.indices_to_level_indices(torch.tensor(4 * 2 + 12 * 3 + 1)), torch.tensor([1, 2, 3]))


def test_indices_are_exact_beyond_what_float32_counts():
    levels = [9] * 19
    fsq = FSQ(levels)
    quantized, indices = fsq(3 * torch.randn(1000, 19))
    digits = (quantized.double() * 4 + 4).round().long().tolist()
    assert indices.tolist() == [sum(digit * 9**i for i, digit in enumerate(row)) for row in digits]
    assert indices.max() > 2**53 and math.prod(levels) == fsq.codebook_size
    assert torch.equal(fsq.indices_to_codes(indices), quantized)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (dict(levels=[8, 5, 5]), (4, 3)),
        (dict(levels=[8, 5, 5]), (4, 7, 3)),
        (dict(levels=[8, 5, 5], dim=9), (4, 7, 9)),
        (dict(levels=[8, 5, 5], dim=9, num_codebooks=2), (4, 9, 6, 5)),
        (dict(levels=[8, 5, 5], channel_first=True), (4, 3, 7)),
        (dict(levels=[8, 5, 5]), (0, 7, 3)),
    ],
)
def test_codes_come_back_from_indices(options, shape):
    fsq = FSQ(**options)
    quantized, indices = fsq(torch.randn(shape))
    assert quantized.shape == shape
    torch.testing.assert_close(fsq.indices_to_codes(indices), quantized, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dim", [4, 6])
def test_low_precision_quantises_in_float32(dtype, autocast, dim):
    fsq = FSQ([8, 5, 5, 5], dim=dim)
    x = torch.randn(30, 50, dim, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", enabled=autocast):
        quantized, indices = fsq(x)
    quantized.float().sum().backward()
    assert quantized.dtype == x.grad.dtype == dtype and x.grad.isfinite().all()
    if dim == 4:
        expected = fsq(x.detach().float())
        assert torch.equal(indices, expected[1])
        assert torch.equal(quantized, expected[0].to(dtype))


def test_a_module_cast_to_bfloat16_keeps_its_levels():
    x = torch.randn(100, 4)
    assert torch.equal(FSQ([15, 8, 7, 5]).bfloat16()(x)[1], FSQ([15, 8, 7, 5])(x)[1])


def test_compiles_without_a_graph_break():
    fsq = FSQ([8, 5, 5, 5], dim=6, num_codebooks=2).eval()
    compiled = torch.compile(fsq, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 4, 3)
    for mine, expected in zip(compiled(x), fsq(x), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_training_step_reads_nothing_back_from_the_device():
    """Fake tensors have no values: reading one on the host raises."""
    with FakeTensorMode():
        quantized, _ = FSQ([8, 5, 5], dim=6)(torch.randn(2, 5, 6))
        quantized.sum().backward()


def test_same_input_same_bits():
    fsq = FSQ([8, 5, 5, 5], dim=16)
    x = torch.randn(4, 100, 16)
    (first, indices), (second, again) = fsq(x), fsq(x)
    assert torch.equal(first, second) and torch.equal(indices, again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(levels=[]), r"levels: expected .* got \[\]"),
        (dict(levels=[2, 5]), r"levels: expected .*at least 3.* got \[2, 5\]"),
        (dict(levels=[1, 5], preserve_symmetry=True), r"levels: expected .*at least 2.* got \[1, 5\]"),
        (dict(levels=[16] * 16), r"levels: expected a product below 2\^63"),
        (dict(levels=[5], num_codebooks=0), "num_codebooks: expected at least 1, got 0"),
        (dict(levels=[5], dim=0), "dim: expected at least 1, got 0"),
        (dict(levels=[5], num_codebooks=2, keep_num_codebooks_dim=False), "keep_num_codebooks_dim: .* got False"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FSQ(**options)


def test_levels_are_whole_numbers():
    with pytest.raises(TypeError, match=r"levels: expected whole numbers, got \[8.0, 5.0\]"):
        FSQ([8.0, 5.0])


def test_shapes_that_do_not_fit_are_named():
    fsq = FSQ([8, 5, 5], num_codebooks=2)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, \.\.\., 6\), got \(2, 7, 3\)"):
        fsq(torch.randn(2, 7, 3))
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 6, \.\.\.\), got \(2, 3, 4, 4\)"):
        fsq(torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"indices: expected shape \(B, \.\.\., 2\), got \(2, 7\)"):
        fsq.indices_to_codes(torch.zeros(2, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes: expected shape \(\.\.\., 3\), got \(2, 6\)"):
        fsq.codes_to_indices(torch.zeros(2, 6))
