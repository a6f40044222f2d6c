"""What `VectorQuantize` promises beyond the convention of vector-quantize-pytorch: codes that stay alive."""

from contextlib import nullcontext

import pytest
import torch

from vqfast.nn import ResidualVQ, VectorQuantize, accumulate_codebooks


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


SIZES = dict(dim=8, codebook_size=32)


def codes_like(codebook: torch.Tensor, cosine: bool) -> torch.Tensor:
    codes = torch.randn(codebook.shape)
    return torch.nn.functional.normalize(codes, dim=-1) if cosine else codes


@pytest.mark.parametrize(
    ("options", "shape", "indices_shape"),
    [
        ({}, (2, 5, 8), (2, 5)),
        ({}, (7, 8), (7,)),
        ({}, (2, 3, 4, 8), (2, 3, 4)),
        ({"channel_last": False}, (2, 8, 5), (2, 5)),
        ({"accept_image_fmap": True}, (2, 8, 3, 4), (2, 3, 4)),
        ({"accept_3d_fmap": True}, (2, 8, 3, 4, 5), (2, 3, 4, 5)),
        ({"heads": 2, "codebook_dim": 4}, (2, 5, 8), (2, 5, 2)),
        ({"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}, (7, 8), (7, 2)),
        (
            {"heads": 4, "codebook_dim": 2, "accept_image_fmap": True, "use_cosine_sim": True},
            (2, 8, 3, 4),
            (2, 3, 4, 4),
        ),
        ({"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}, (0, 8), (0, 2)),
    ],
)
def test_layouts(options, shape, indices_shape):
    vq = VectorQuantize(8, 16, **options).eval()
    quantized, indices, loss = vq(torch.randn(shape))
    assert quantized.shape == shape and indices.shape == indices_shape and loss.shape == ()
    assert torch.equal(quantized, vq.get_codes_from_indices(indices))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 5, 7)),
        ({"accept_image_fmap": True}, (2, 8, 5)),
        ({"accept_3d_fmap": True}, (2, 8, 5, 3)),
        ({"channel_last": False}, (2, 5, 8)),
        ({}, (8,)),
    ],
)
def test_a_shape_that_does_not_fit_is_named(options, shape):
    with pytest.raises(ValueError, match=r"x: expected shape \(B, .*got"):
        VectorQuantize(8, 16, **options)(torch.randn(shape))


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 0},
        {"codebook_size": 0},
        {"decay": 1.0},
        {"commitment_weight": -1.0},
        {"codebook_weight": -1.0},
        {"threshold_ema_dead_code": -1.0},
        {"codebook_dim": 0},
        {"heads": 0},
        {"orthogonal_reg_weight": -1.0},
        {"orthogonal_reg_max_codes": 0},
        {"sample_codebook_temp": -1.0},
        {"kmeans_start": "kmeans++"},
        {"ema_update": True, "learnable_codebook": True},
        {"ema_update": True, "decay": None},
        {"use_cosine_sim": True, "learnable_codebook": True},
    ],
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        VectorQuantize(**{"dim": 4, "codebook_size": 8} | options)


@pytest.mark.parametrize("options", [{"decay": None}, {"ema_update": False}])
def test_a_learnable_codebook_gets_the_gradient_of_the_codebook_term(options):
    vq = VectorQuantize(4, 8, commitment_weight=0.25, codebook_weight=1.0, **options)
    with torch.no_grad():
        vq.codebook.normal_()
    before = vq.codebook.detach().clone()
    x = torch.randn(64, 4)
    _, indices, loss = vq(x)
    loss.backward()
    distance = ((x - before[indices]) ** 2).mean()
    torch.testing.assert_close(loss, 1.25 * distance)
    expected = torch.zeros_like(before).index_add_(0, indices, 2 * (before[indices] - x) / x.numel())
    torch.testing.assert_close(vq.codebook.grad, expected)
    assert torch.equal(vq.codebook, before), "a learnable codebook is left to the optimiser"


@pytest.mark.parametrize("freeze", ["eval", "option", "call"])
def test_a_frozen_codebook_does_not_move(freeze):
    vq = VectorQuantize(4, 8, freeze_codebook=freeze == "option", threshold_ema_dead_code=2.0)
    vq.train(freeze != "eval")
    before = {name: value.clone() for name, value in vq.state_dict().items()}
    vq(torch.randn(64, 4), freeze_codebook=True if freeze == "call" else None)
    assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())


def test_the_gradient_belongs_to_the_codes_that_were_looked_up():
    """The moving average writes the codebook before backward reads it."""
    vq = VectorQuantize(4, 8, commitment_weight=1.0)
    vq.codebook.normal_()
    before = vq.codebook.clone()
    x = torch.randn(64, 4, requires_grad=True)
    _, indices, loss = vq(x)
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() - before[indices]) / x.numel())


def test_dead_codes_become_vectors_of_the_batch():
    vq = VectorQuantize(4, 32, threshold_ema_dead_code=1.0, decay=0.5)
    vq.codebook.fill_(100.0)
    x = torch.randn(200, 4)
    vq(x)
    rows = set(map(tuple, x.tolist()))
    revived = [tuple(code) for code in vq.codebook.tolist() if tuple(code) in rows]
    assert len(revived) == 31, "all but the one code that every vector chose"
    assert len(set(revived)) == 31, "no two codes get the same vector"
    vq.idle.fill_(1000)
    vq(x)
    assert vq.usage >= 31 / 32, "each revived code is chosen from then on"


def test_more_dead_codes_than_vectors_are_revived_as_far_as_the_vectors_go():
    vq = VectorQuantize(4, 32, threshold_ema_dead_code=1.0, decay=0.0)
    vq.codebook.fill_(100.0)
    x = torch.randn(5, 4)
    vq(x)
    assert sum((code == x).all(1).any().item() for code in vq.codebook) == 5


def test_an_empty_batch_changes_no_code():
    vq = VectorQuantize(4, 8, threshold_ema_dead_code=2.0)
    before = vq.codebook.clone()
    quantized, indices, loss = vq(torch.randn(0, 4))
    assert quantized.shape == (0, 4) and indices.shape == (0,) and loss == 0
    torch.testing.assert_close(vq.codebook, before)


def test_kmeans_init_finds_the_clusters():
    centres = torch.tensor([[10.0, 0], [0, 10], [-10, 0], [0, -10]])
    x = (centres[:, None] + 0.1 * torch.randn(4, 500, 2)).reshape(-1, 2)
    vq = VectorQuantize(2, 64, kmeans_init=True)
    _, indices, loss = vq(x)
    assert loss < 0.01
    copy = VectorQuantize(2, 64, kmeans_init=True)
    copy.load_state_dict(vq.state_dict())
    copy(torch.zeros(10, 2))
    assert copy.codebook.abs().max() > 5, "a loaded codebook is not started over"


def test_usage_and_perplexity():
    vq = VectorQuantize(1, 4, decay=0.0)
    vq.codebook.copy_(torch.arange(4.0)[:, None])
    vq.idle.fill_(1000)
    vq(torch.tensor([[0.0], [0.0], [1.0], [1.0]]))
    assert vq.usage == 0.5
    torch.testing.assert_close(vq.perplexity, torch.tensor(2.0))


class TestMask:
    @pytest.mark.parametrize("options", [{}, {"kmeans_init": True}, {"threshold_ema_dead_code": 1.0}, {"decay": None}])
    def test_masked_vectors_never_reach_loss_or_codebook(self, options):
        torch.manual_seed(0)
        vq = VectorQuantize(dim=4, codebook_size=6, **options)
        x = torch.randn(3, 10, 4, requires_grad=True)
        mask = torch.rand(3, 10) > 0.5
        poisoned = torch.where(mask[..., None], x, 1e6)
        quantized, indices, loss = vq(poisoned, mask=mask)
        loss.backward()
        assert (indices[~mask] == -1).all() and (indices[mask] >= 0).all()
        assert (quantized[~mask] == 0).all() and loss < 100
        assert vq.codebook.abs().max() < 100 and vq.embed_avg.abs().max() < 100
        assert (x.grad[~mask] == 0).all()

    def test_a_batch_with_nothing_in_it_changes_no_code_by_its_vectors(self):
        vq = VectorQuantize(dim=4, codebook_size=6, threshold_ema_dead_code=2.0)
        vq(torch.full((1, 8, 4), 1e6), mask=torch.zeros(1, 8, dtype=torch.bool))
        assert vq.codebook.abs().max() < 1


def test_rotation_trick_changes_the_gradient_and_nothing_else():
    torch.manual_seed(0)
    plain, turning = VectorQuantize(dim=4, codebook_size=6), VectorQuantize(dim=4, codebook_size=6, rotation_trick=True)
    turning.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9, 4, requires_grad=True)
    probe = torch.randn(2, 9, 4)
    results = []
    for vq in (plain, turning):
        quantized, indices, loss = vq(x)
        (grad,) = torch.autograd.grad((quantized * probe).sum(), x)
        results.append((quantized, indices, loss, grad))
    for a, b in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(results[0][3], results[1][3])


HEADS = dict(heads=2, codebook_dim=4, separate_codebook_per_head=True)


class TestHeads:
    @pytest.mark.parametrize("separate", [False, True])
    @pytest.mark.parametrize("cosine", [False, True])
    def test_each_head_is_quantised_on_its_own(self, separate, cosine):
        vq = VectorQuantize(8, 16, codebook_dim=4, heads=2, separate_codebook_per_head=separate, use_cosine_sim=cosine)
        vq.codebook.copy_(codes_like(vq.codebook, cosine))
        x = torch.randn(3, 20, 8)
        quantized, indices, _ = vq.eval()(x)
        for head, part in enumerate(x.chunk(2, dim=-1)):
            codebook = vq.codebook[head] if separate else vq.codebook
            score = part @ codebook.T if cosine else -torch.cdist(part, codebook)
            assert torch.equal(indices[..., head], score.argmax(-1))
            assert torch.equal(quantized.chunk(2, dim=-1)[head], codebook[indices[..., head]])

    def test_the_codebook_of_each_head_is_kept_apart(self):
        together = VectorQuantize(8, 16, **HEADS, threshold_ema_dead_code=0)
        apart = [VectorQuantize(4, 16) for _ in range(2)]
        for head, vq in enumerate(apart):
            for name in ("codebook", "embed_avg"):
                getattr(vq, name).copy_(torch.randn(16, 4))
                getattr(together, name)[head].copy_(getattr(vq, name))
        for _ in range(3):
            x, mask = torch.randn(3, 20, 8), torch.rand(3, 20) < 0.7
            quantized, indices, loss = together(x, mask=mask)
            results = [vq(part, mask=mask) for vq, part in zip(apart, x.chunk(2, dim=-1), strict=True)]
            assert torch.equal(indices, torch.stack([result[1] for result in results], dim=-1))
            assert torch.equal(quantized, torch.cat([result[0] for result in results], dim=-1))
            torch.testing.assert_close(loss, sum(result[2] for result in results) / 2)
        for name in ("codebook", "cluster_size", "embed_avg", "idle"):
            torch.testing.assert_close(getattr(together, name), torch.stack([getattr(vq, name) for vq in apart]))

    @pytest.mark.parametrize("cosine", [False, True])
    def test_kmeans_init_starts_each_codebook_from_its_own_vectors(self, cosine):
        vq = VectorQuantize(
            4,
            32,
            heads=2,
            codebook_dim=2,
            separate_codebook_per_head=True,
            kmeans_init=True,
            kmeans_start="afkmc2",
            use_cosine_sim=cosine,
        )
        angle = 0.01 * torch.randn(400, 2) + torch.tensor([0.0, 3.0])
        x = torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1) * 5
        _, _, loss = vq(x)
        assert loss < 0.01 and (vq.codebook[0, :, 0] > 0).all() and (vq.codebook[1, :, 0] < 0).all()
        if cosine:
            torch.testing.assert_close(vq.codebook.norm(dim=-1), torch.ones(2, 32))

    def test_dead_codes_become_vectors_of_their_own_head(self):
        vq = VectorQuantize(8, 16, **HEADS, threshold_ema_dead_code=1.0, decay=0.5)
        vq.codebook.fill_(100.0)
        x = torch.randn(50, 8)
        vq(x)
        for head, part in enumerate(x.chunk(2, dim=-1)):
            rows = set(map(tuple, part.tolist()))
            assert sum(tuple(code) in rows for code in vq.codebook[head].tolist()) == 15


class TestAccumulation:
    @pytest.mark.parametrize("options", [dict(), HEADS, dict(use_cosine_sim=True), dict(threshold_ema_dead_code=0.1)])
    def test_passes_count_as_one_batch(self, options):
        joined, parts = (VectorQuantize(**SIZES, **options) for _ in range(2))
        joined.codebook.copy_(codes_like(joined.codebook, joined.use_cosine_sim))
        joined.embed_avg.copy_(joined.codebook)
        parts.load_state_dict(joined.state_dict())
        for _ in range(3):
            x, mask, weights = torch.randn(6, 20, 8), torch.rand(6, 20) < 0.7, torch.rand(6, 20)
            joined(x, mask=mask, weights=weights)
            before = parts.codebook.clone()
            with accumulate_codebooks(torch.nn.Sequential(parts)):
                for piece, kept, weight in zip(x.split(2), mask.split(2), weights.split(2), strict=True):
                    parts(piece, mask=kept, weights=weight)
                    assert torch.equal(parts.codebook, before)
            for name in ("codebook", "cluster_size", "embed_avg", "idle"):
                torch.testing.assert_close(getattr(parts, name), getattr(joined, name))

    def test_dead_codes_are_revived_at_the_end(self):
        vq = VectorQuantize(4, 8, threshold_ema_dead_code=1.0, decay=0.5)
        vq.codebook.fill_(100.0)
        with accumulate_codebooks(vq):
            for _ in range(3):
                vq(torch.randn(20, 4))
                assert (vq.codebook == 100).all()
        assert (vq.codebook.abs().amax(1) < 10).sum() == 7 + 1

    def test_what_was_kept_is_dropped_where_the_body_raises(self):
        vq = VectorQuantize(4, 8)
        before = vq.codebook.clone()
        with pytest.raises(KeyError), accumulate_codebooks(vq):
            vq(torch.randn(20, 4))
            raise KeyError
        vq.update_codebook()
        assert torch.equal(vq.codebook, before) and not vq.accumulating

    def test_update_codebook_applies_what_calls_kept(self):
        first, second = VectorQuantize(4, 8), VectorQuantize(4, 8)
        second.load_state_dict(first.state_dict())
        x = torch.randn(40, 4)
        first(x)
        for part in x.split(10):
            second(part, accum_ema_update=True)
        second.update_codebook()
        torch.testing.assert_close(second.codebook, first.codebook)


def test_a_vector_of_weight_three_counts_three_times_in_the_averages():
    weighted, repeated = VectorQuantize(4, 8), VectorQuantize(4, 8)
    repeated.load_state_dict(weighted.state_dict())
    x, times = torch.randn(30, 4), torch.arange(30) % 4
    weighted(x, weights=times.float())
    repeated(x.repeat_interleave(times, dim=0))
    for name in ("codebook", "cluster_size", "embed_avg"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name))


def test_revival_resets_every_buffer_of_its_code():
    vq = VectorQuantize(4, 32, threshold_ema_dead_code=1.5, decay=0.5)
    vq.codebook.fill_(100.0)
    vq.embed_avg.fill_(1e9)
    x = torch.randn(200, 4)
    vq(x)
    rows = set(map(tuple, x.tolist()))
    new = torch.tensor([tuple(code) in rows for code in vq.codebook.tolist()])
    assert new.sum() == 31
    assert (vq.cluster_size[new] == 1.5).all()
    torch.testing.assert_close(vq.embed_avg[new], 1.5 * vq.codebook[new])


class TestSampling:
    def test_only_in_training_and_above_temperature_zero(self):
        vq = VectorQuantize(**SIZES, stochastic_sample_codes=True, sample_codebook_temp=100.0)
        vq.codebook.normal_()
        x = torch.randn(50, 8)
        nearest = torch.cdist(x, vq.codebook).argmin(1)
        assert not torch.equal(vq(x, freeze_codebook=True)[1], nearest)
        assert torch.equal(vq(x, freeze_codebook=True, sample_codebook_temp=0.0)[1], nearest)
        assert torch.equal(vq.eval()(x)[1], nearest)


def test_masked_indices_decode_to_zero():
    vq = VectorQuantize(8, 16, **HEADS)
    codes = vq.get_codes_from_indices(torch.tensor([[3, -1]]))
    assert torch.equal(codes, torch.cat([vq.codebook[0, 3], torch.zeros(4)])[None])
    with pytest.raises(ValueError, match=r"indices: expected shape \(B, \.\.\., 2\), got \(1, 3\)"):
        vq.get_codes_from_indices(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(lens=torch.tensor([1, 2]), mask=torch.ones(2, 5).bool()), "lens: expected None with a mask"),
        (dict(lens=torch.tensor([1, 2, 3])), r"lens: expected shape \(B,\)"),
        (dict(mask=torch.ones(2, 4).bool()), r"mask: expected shape \(2, 5\)"),
        (dict(weights=torch.ones(2, 4)), "weights: expected the shape of indices"),
        (dict(indices=torch.zeros(2, 4).long()), r"indices: expected shape \(2, 5\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantize(4, 8)(torch.randn(2, 5, 4), **call)


@pytest.mark.parametrize(
    "options",
    [
        dict(threshold_ema_dead_code=1.0),
        dict(kmeans_init=True),
        dict(kmeans_init=True, kmeans_start="afkmc2", use_cosine_sim=True),
        dict(threshold_ema_dead_code=1.0, **HEADS),
        dict(decay=None, rotation_trick=True),
        dict(stochastic_sample_codes=True),
        dict(commitment_use_cross_entropy_loss=True),
        dict(orthogonal_reg_weight=1.0, orthogonal_reg_active_codes_only=True, orthogonal_reg_max_codes=4),
    ],
)
def test_a_training_step_reads_nothing_back_from_the_device(options, nothing_read_back):
    vq = VectorQuantize(8, 16, **options)
    x, mask = torch.randn(2, 30, 8, requires_grad=True), torch.rand(2, 30) < 0.5
    with nothing_read_back():
        for _ in range(2):
            quantized, _, loss = vq(x, mask=mask, weights=torch.rand(2, 30))
            (quantized.sum() + loss).backward()
        with accumulate_codebooks(vq):
            vq(x)
        assert vq.usage.ndim == vq.perplexity.ndim == 0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], torch.unique])
def test_the_test_above_sees_a_read(read, nothing_read_back):
    with pytest.raises(AssertionError, match="host"), nothing_read_back():
        read(torch.randn(5))


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("shared", [None, False, True])
def test_a_codebook_that_is_updated_by_hand_waits_for_it(manual, shared):
    """Whether passes are taken one by one, or several as one step; alone, or as stages of a ResidualVQ."""
    options = dict(codebook_size=16, manual_ema_update=manual)
    vq = VectorQuantize(8, **options)
    if shared is not None:
        vq = ResidualVQ(dim=8, num_quantizers=3, shared_codebook=shared, **options)
    layer = vq if shared is None else vq.layers[0]
    for together in (False, True):
        before, averages = layer.codebook.clone(), layer.embed_avg.clone()
        with accumulate_codebooks(vq) if together else nullcontext():
            vq(torch.randn(30, 8))
        assert not torch.equal(layer.embed_avg, averages)
        assert torch.equal(layer.codebook, before) == manual


def test_a_weight_of_one_pass_is_refused_where_several_make_a_step():
    vq = VectorQuantize(8, 16)
    with pytest.raises(ValueError, match="^ema_update_weight: expected None inside"), accumulate_codebooks(vq):
        vq(torch.randn(30, 8), ema_update_weight=torch.ones(16))


def test_input_without_gradient_leaves_that_of_projections_and_codes_alone():
    vq = VectorQuantize(8, 16, codebook_dim=4, learnable_codebook=True, ema_update=False)
    x, grads = torch.randn(3, 20, 8), []
    for wanted in (False, True):
        quantized, _, loss = vq(x.clone().requires_grad_(wanted))
        grads.append(torch.autograd.grad((quantized * x).sum() + loss, list(vq.parameters())))
    for without, with_it in zip(*grads, strict=True):
        assert torch.equal(without, with_it) and without.any()


def test_compiles_without_a_graph_break():
    vq = VectorQuantize(8, 16, **HEADS, use_cosine_sim=True).eval()
    x = torch.randn(2, 5, 8)
    for mine, expected in zip(torch.compile(vq, fullgraph=True, backend="aot_eager")(x), vq(x), strict=True):
        torch.testing.assert_close(mine, expected)
