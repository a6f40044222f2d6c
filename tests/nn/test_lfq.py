"""What `LFQ` promises: signs as codes, exact entropies without an N x K array, the peer's convention."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from vqfast.nn import LFQ

CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# At 100 the peer's softmax over large logits rounds float32 by more than the tolerance.
@pytest.mark.parametrize(("inv_temperature", "dtype"), [(1.0, torch.float32), (100.0, torch.float64)])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (dict(codebook_size=16), (3, 50, 4)),
        (dict(dim=1), (3, 50, 1)),
        (dict(codebook_size=512, dim=16, entropy_loss_weight=0.5), (3, 50, 16)),
        (dict(dim=5, diversity_gamma=2.5, commitment_loss_weight=0.3), (3, 50, 5)),
        (dict(codebook_size=8, dim=10, num_codebooks=2, projection_has_bias=False), (3, 50, 10)),
        (dict(codebook_size=8, has_projections=True, keep_num_codebooks_dim=True), (3, 50, 3)),
        (dict(codebook_size=64, soft_clamp_input_value=2.0, codebook_scale=0.5), (3, 50, 6)),
        (dict(codebook_size=64, spherical=True, commitment_loss_weight=0.3), (3, 50, 6)),
        (dict(codebook_size=16), (2, 4, 6, 5)),
        (dict(codebook_size=16, channel_first=True), (2, 4, 30)),
        (dict(codebook_size=16, channel_first=False), (2, 6, 4)),
        (dict(codebook_size=16, entropy_loss_weight=0.0, commitment_loss_weight=1.0), (3, 50, 4)),
    ],
)
def test_trains_side_by_side_with_vector_quantize_pytorch(options, shape, inv_temperature, dtype, monkeypatch):
    peer_library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    from vector_quantize_pytorch import lookup_free_quantization

    # The peer cuts probabilities off at 1e-5 in its logarithm, which our docstring says is different here.
    uncut = lambda t, eps=0: t.clamp(min=torch.finfo(t.dtype).tiny).log()
    monkeypatch.setattr(lookup_free_quantization, "log", uncut)
    ours = LFQ(**options).to(dtype)
    peer = peer_library.LFQ(**options, force_quantization_f32=dtype == torch.float32).to(dtype)
    peer.load_state_dict(ours.state_dict(), strict=False)
    optimisers = [torch.optim.SGD(lfq.parameters(), 0.1) for lfq in (ours, peer) if lfq.has_projections]
    for training in (True, True, True, False):
        ours.train(training), peer.train(training)
        x = torch.randn(shape, dtype=dtype)
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        (quantized, indices, loss), parts = ours(mine, inv_temperature, return_loss_breakdown=True)
        (expected, expected_indices, expected_loss), peers_parts = peer(theirs, inv_temperature, True)
        assert torch.equal(indices, expected_indices) and indices.dtype == torch.int64
        torch.testing.assert_close(quantized, expected, **CLOSE)
        torch.testing.assert_close(loss, expected_loss, **CLOSE)
        torch.testing.assert_close(parts[:2], peers_parts[:2], **CLOSE)
        if ours.commitment_loss_weight > 0:
            torch.testing.assert_close(parts.commitment, peers_parts.commitment, **CLOSE)
        if quantized.requires_grad:
            weight = torch.randn_like(x)
            ((quantized * weight).sum() + loss).backward()
            ((expected * weight).sum() + expected_loss).backward()
        if training:
            torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
        mine, theirs = ours.indices_to_codes(indices), peer.indices_to_codes(indices)
        torch.testing.assert_close(mine, theirs.to(mine), **CLOSE)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    for parameter, expected in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, **CLOSE)


def test_masked_losses_are_those_of_the_vectors_that_count():
    """The peer's, where given these vectors only: its own mask mixes up vectors and codebooks."""
    peer_library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    options = dict(codebook_size=16, commitment_loss_weight=0.3)
    x, mask = torch.randn(3, 50, 4), torch.rand(3, 50) < 0.5
    ours, peer = LFQ(**options), peer_library.LFQ(**options)
    quantized, indices, loss = ours(x, 1.0, mask=mask)
    torch.testing.assert_close(loss, peer(x[mask][None], 1.0).entropy_aux_loss, **CLOSE)
    for masked, unmasked in zip((quantized, indices), ours(x, 1.0), strict=False):
        assert torch.equal(masked, unmasked)
    assert ours(x, mask=torch.zeros_like(mask)).entropy_aux_loss == 0, "no vector counts"


def enumerated(z, codebook, inv_temperature, mask):
    """Both entropies from the softmax over all codes. z: (N, C, d)."""
    logits = 2 * inv_temperature * z @ codebook.T
    p = logits.softmax(-1)[mask]
    entropy = lambda p: torch.special.entr(p).sum(-1).mean()
    return entropy(p), entropy(p.mean(0))


@pytest.mark.parametrize("inv_temperature", [0.3, 20.0])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 7])
def test_entropies_are_exact(bits, spherical, inv_temperature):
    lfq = LFQ(codebook_size=2**bits, num_codebooks=2, spherical=spherical, codebook_scale=0.8)
    z = torch.randn(40, 2 * bits, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(40) < 0.6
    _, parts = lfq(z, inv_temperature, return_loss_breakdown=True, mask=mask)
    rows = z.unflatten(-1, (2, bits))
    rows = 0.8 * F.normalize(rows, dim=-1) if spherical else rows
    expected = enumerated(rows, lfq.codebook.double(), inv_temperature, mask)
    for mine, theirs in zip(parts, expected, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
        gradients = (torch.autograd.grad(value, z, retain_graph=True)[0] for value in (mine, theirs))
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_batch_entropy_of_a_large_codebook_reaches_log_k():
    """Where a logarithm cut off at 1e-5 would stop at 11.5."""
    lfq = LFQ(dim=20)
    _, parts = lfq(torch.zeros(10, 20), return_loss_breakdown=True)
    torch.testing.assert_close(parts.batch_entropy, torch.tensor(2.0).log() * 20)
    torch.testing.assert_close(parts.per_sample_entropy, torch.tensor(2.0).log() * 20)


def test_the_entropy_loss_makes_no_array_of_vectors_by_codes():
    N, bits = 512, 16
    lfq, x = LFQ(dim=bits), torch.randn(512, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        lfq(x).entropy_aux_loss.backward()
    assert max(saved) <= max(2 * N * 2 ** (bits // 2), 2**bits) < N * 2**bits / 100
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [1e-30, 1e3])
def test_gradients_stay_finite_where_probabilities_underflow(size):
    lfq, x = LFQ(dim=6, commitment_loss_weight=0.1), (size * torch.randn(50, 6)).requires_grad_()
    quantized, _, loss = lfq(x)
    (quantized.sum() + loss).backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_the_entropy_loss_spreads_the_codes():
    lfq, x = LFQ(dim=3, entropy_loss_weight=1.0), (0.3 + 0.1 * torch.randn(200, 3)).requires_grad_()
    optimiser = torch.optim.Adam([x], 0.05)
    before = len(lfq(x).indices.unique())
    for _ in range(60):
        optimiser.zero_grad()
        lfq(x, inv_temperature=1.0).entropy_aux_loss.backward()
        optimiser.step()
    assert before < 8 == len(lfq(x).indices.unique())


def test_the_first_channel_is_the_highest_digit_and_zero_is_negative():
    lfq = LFQ(dim=3).eval()
    x = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [0, 0, 0], [2, 3, 4]])
    quantized, indices, loss = lfq(x)
    assert indices.tolist() == [4, 1, 0, 7] and loss == 0
    assert torch.equal(quantized, lfq.codebook[indices])


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (dict(dim=5), (4, 5)),
        (dict(codebook_size=32, dim=9), (4, 7, 9)),
        (dict(codebook_size=32, dim=9, num_codebooks=2), (4, 9, 6, 5)),
        (dict(dim=5, channel_first=True), (4, 5, 7)),
        (dict(dim=5, channel_first=False), (4, 7, 6, 5)),
        (dict(dim=5, spherical=True, codebook_scale=2.0), (4, 7, 5)),
        (dict(dim=40, entropy_loss_weight=0.0), (4, 7, 40)),
        (dict(dim=5, commitment_loss_weight=1.0), (0, 5)),
    ],
)
def test_codes_come_back_from_indices(options, shape):
    lfq = LFQ(**options)
    quantized, indices, loss = lfq(torch.randn(shape))
    assert quantized.shape == shape and loss.isfinite()
    torch.testing.assert_close(lfq.indices_to_codes(indices), quantized, rtol=0, atol=1e-6)
    if not lfq.has_projections:
        assert torch.equal(lfq.indices_to_codes(indices, project_out=False), quantized)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dim", [4, 6])
def test_low_precision_quantises_in_float32(dtype, autocast, dim):
    lfq = LFQ(codebook_size=16, dim=dim, commitment_loss_weight=0.1)
    x = torch.randn(3, 20, dim, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", enabled=autocast):
        quantized, indices, loss = lfq(x)
    (quantized.float().sum() + loss).backward()
    assert quantized.dtype == x.grad.dtype == dtype and x.grad.isfinite().all()
    if dim == 4:
        expected = lfq(x.detach().float())
        assert torch.equal(indices, expected.indices)
        torch.testing.assert_close(loss.float(), expected.entropy_aux_loss)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(training):
    lfq = LFQ(codebook_size=16, dim=6, num_codebooks=2).train(training)
    compiled = torch.compile(lfq, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 4, 3)
    for mine, expected in zip(compiled(x), lfq(x), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_training_step_reads_nothing_back_from_the_device():
    """Fake tensors have no values: reading one on the host raises."""
    with FakeTensorMode():
        lfq, mask = LFQ(codebook_size=16, dim=6, commitment_loss_weight=0.1), torch.ones(2, 5, dtype=torch.bool)
        quantized, _, loss = lfq(torch.randn(2, 5, 6), mask=mask)
        (quantized.sum() + loss).backward()


def test_same_input_same_bits():
    lfq = LFQ(dim=8)
    x = torch.randn(4, 100, 8)
    assert all(torch.equal(first, second) for first, second in zip(lfq(x), lfq(x), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "codebook_size: expected a power of two, or dim .* got dim=None"),
        (dict(codebook_size=12), "codebook_size: expected a power of two in .* got 12"),
        (dict(codebook_size=1), "codebook_size: expected a power of two in .* got 1"),
        (dict(dim=63), "codebook_size: .* got dim=63"),
        (dict(dim=4, entropy_loss_weight=-1.0), "entropy_loss_weight: .* got -1.0"),
        (dict(dim=4, commitment_loss_weight=-1.0), "commitment_loss_weight: .* got -1.0"),
        (dict(dim=4, diversity_gamma=-1.0), "diversity_gamma: .* got -1.0"),
        (dict(dim=4, codebook_scale=0.0), "codebook_scale: expected a number above 0, got 0.0"),
        (dict(dim=4, soft_clamp_input_value=0.5), "soft_clamp_input_value: expected at least .* got 0.5"),
        (dict(dim=5, codebook_size=16, has_projections=False), "has_projections: expected True or None .* got False"),
        (dict(dim=4, num_codebooks=0), "num_codebooks: expected at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LFQ(**options)


def test_shapes_that_do_not_fit_are_named():
    lfq = LFQ(dim=6)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, \.\.\., 6\), got \(2, 7, 3\)"):
        lfq(torch.randn(2, 7, 3))
    with pytest.raises(ValueError, match=r"mask: expected bool of shape \(2, 7\), got .*\(2, 6\)"):
        lfq(torch.randn(2, 7, 6), mask=torch.ones(2, 6, dtype=torch.bool))
