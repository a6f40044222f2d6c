"""What `ResidualVQ` and `GroupedResidualVQ` promise: the convention of vector-quantize-pytorch, stage by stage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vqfast.nn import GroupedResidualVQ, ResidualVQ, VectorQuantize, accumulate_codebooks

CLOSE = dict(rtol=1e-5, atol=1e-5)
SIZES = dict(dim=6, num_quantizers=4, codebook_size=16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def with_codes(vq):
    """vq with codebooks of Gaussian codes, which are spread enough to tell stages apart."""
    for module in vq.modules():
        if isinstance(module, VectorQuantize):
            codes = torch.randn(module.codebook.shape)
            if module.use_cosine_sim:
                codes = torch.nn.functional.normalize(codes, dim=-1)
            module.load_state_dict({"codebook": codes, "embed_avg": codes}, strict=False)
    return vq


def peer_of(vq, name, options):
    """The peer's module, which rotates gradients unless told not to, with the parameters and codebooks of vq."""
    library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    peer = getattr(library, name)(**{"rotation_trick": False} | options)
    pairs = [(vq, peer)] if name == "ResidualVQ" else list(zip(vq.rvqs, peer.rvqs, strict=True))
    for ours, theirs in pairs:
        for mine, layer in zip(ours.layers, theirs.layers, strict=False):
            for buffer in ("embed", "embed_avg"):
                getattr(layer._codebook, buffer).data.copy_(mine.codebook[None])
        for projection in ("project_in", "project_out"):
            getattr(theirs, projection).load_state_dict(getattr(ours, projection).state_dict())
    return peer, pairs


def train_side_by_side(ours, peer, pairs, shape, calls):
    for step, (training, mine_call, peer_call) in enumerate(calls):
        ours.train(training), peer.train(training)
        x = torch.randn(shape)
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        quantized, indices, losses, codes = ours(mine, return_all_codes=True, **mine_call)
        expected, expected_indices, expected_losses, expected_codes = peer(theirs, return_all_codes=True, **peer_call)
        assert torch.equal(indices, expected_indices), f"step {step}"
        torch.testing.assert_close(quantized, expected, **CLOSE)
        torch.testing.assert_close(losses, expected_losses, **CLOSE)
        torch.testing.assert_close(list(codes), list(expected_codes), **CLOSE)
        if training:
            weight = torch.randn_like(x)
            ((quantized * weight).sum() + losses.sum()).backward()
            ((expected * weight).sum() + expected_losses.sum()).backward()
            torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
        torch.testing.assert_close(
            ours.get_output_from_indices(indices), peer.get_output_from_indices(expected_indices), **CLOSE
        )
        for rvq, peer_rvq in pairs:
            for layer, peer_layer in zip(rvq.layers, peer_rvq.layers, strict=False):
                theirs = peer_layer._codebook
                torch.testing.assert_close(layer.codebook, theirs.embed[0], **CLOSE)
                if layer.learnable_codebook:
                    continue  # ours keep count of usage
                torch.testing.assert_close(layer.cluster_size, theirs.cluster_size[0], **CLOSE)
                torch.testing.assert_close(layer.embed_avg, theirs.embed_avg[0], **CLOSE)


SHARED_OPTIONS = [
    dict(),
    dict(decay=0.95, eps=1e-3, commitment_weight=0.3),
    dict(codebook_size=(8, 16, 24, 32), num_quantizers=None),
    dict(codebook_dim=4),
    dict(shared_codebook=True),
    dict(shared_codebook=True, codebook_dim=3, quantize_dropout=True),
    dict(quant_grad_frac=0.5),
    dict(quantize_dropout=True),
    dict(quantize_dropout=True, quantize_dropout_cutoff_index=1, quantize_dropout_multiple_of=2),
    dict(rotation_trick=True),
    dict(freeze_codebook=True),
    dict(num_quantizers=1, quantize_dropout=True),
    dict(use_cosine_sim=True),
    dict(use_cosine_sim=True, shared_codebook=True),
    dict(learnable_codebook=True, ema_update=False, quant_grad_frac=0.5),
    dict(learnable_codebook=True, ema_update=False, shared_codebook=True),
    dict(orthogonal_reg_weight=0.3, orthogonal_reg_active_codes_only=True),
    dict(commitment_use_cross_entropy_loss=True, freeze_codebook=True),
    dict(stochastic_sample_codes=True, sample_codebook_temp=0.0),
    dict(return_zeros_for_masked_padding=False),
    dict(return_zeros_for_masked_padding=False, codebook_dim=4),
]
# Under a mask the peer compares unit codes with vectors of any length, and regularises codes of masked vectors.
MASKED_OPTIONS = [
    options for options in SHARED_OPTIONS if not options.keys() & {"use_cosine_sim", "orthogonal_reg_active_codes_only"}
]


@pytest.mark.parametrize(
    ("options", "masked"),
    [(options, False) for options in SHARED_OPTIONS] + [(options, True) for options in MASKED_OPTIONS],
)
def test_trains_side_by_side_with_vector_quantize_pytorch(options, masked):
    options = SIZES | options
    ours = with_codes(ResidualVQ(**options))
    peer, pairs = peer_of(ours, "ResidualVQ", options)
    frozen = {"freeze_codebook": options.get("freeze_codebook", False)}
    calls = []
    for step in range(6):
        mask = torch.rand(3, 40) < 0.6 if masked else None
        call = {"rand_quantize_dropout_fixed_seed": step, "mask": mask} | frozen
        calls.append((step < 5, call, call))
    train_side_by_side(ours, peer, pairs, (3, 40, 6), calls)


@pytest.mark.parametrize("options", [dict(), dict(quantize_dropout=True), dict(shared_codebook=True, codebook_dim=2)])
def test_groups_train_side_by_side_with_vector_quantize_pytorch(options, monkeypatch):
    options = SIZES | dict(groups=2) | options
    ours = with_codes(GroupedResidualVQ(**options))
    peer, pairs = peer_of(ours, "GroupedResidualVQ", options)
    from vector_quantize_pytorch import residual_vq

    seeds = iter(range(6))
    monkeypatch.setattr(residual_vq, "get_maybe_sync_seed", lambda device: next(seeds))
    calls = []
    for step in range(6):
        mask = {"mask": torch.rand(3, 40) < 0.6 if step % 2 else None}
        calls.append((step < 5, {"rand_quantize_dropout_fixed_seed": step} | mask, mask))
    train_side_by_side(ours, peer, pairs, (3, 40, 6), calls)


@pytest.mark.parametrize("shared", [False, True])
def test_each_stage_quantises_what_those_before_it_left(shared):
    vq = with_codes(ResidualVQ(**SIZES, shared_codebook=shared)).eval()
    x = torch.randn(2, 30, 6)
    quantized, indices, losses, codes = vq(x, return_all_codes=True)
    residual = x
    for stage in range(4):
        assert torch.equal(indices[..., stage], torch.cdist(residual, vq.codebooks[stage]).argmin(-1))
        assert torch.equal(codes[stage], vq.codebooks[stage][indices[..., stage]])
        residual = residual - codes[stage]
    torch.testing.assert_close(quantized, x - residual)
    assert torch.equal(losses, torch.zeros(4))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(shared_codebook=True),
        dict(codebook_dim=3, accept_image_fmap=True),
        dict(channel_last=False, return_zeros_for_masked_padding=False),
        dict(learnable_codebook=True, ema_update=False),
        dict(use_cosine_sim=True),
        dict(quantize_dropout=True),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_codes_alone_are_what_the_stages_give_one_by_one(options, masked):
    vq = with_codes(ResidualVQ(**SIZES | options)).eval()
    first = not options.get("channel_last", True) or "accept_image_fmap" in options
    x = torch.randn((2, 6, 5, 7) if first else (2, 5, 7, 6))
    mask = torch.rand(2, 5, 7) < 0.6 if masked else None
    by_stages = vq(x.requires_grad_(), mask, return_all_codes=True)
    with torch.no_grad():
        alone = vq(x, mask, return_all_codes=True)
    for name, ours, theirs in zip(("quantized", "indices", "losses", "codes"), alone, by_stages, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("options", "shape", "indices_shape"),
    [
        (dict(), (5, 6), (5, 4)),
        (dict(), (2, 5, 6), (2, 5, 4)),
        (dict(), (2, 3, 5, 6), (2, 3, 5, 4)),
        (dict(channel_last=False), (2, 6, 5), (2, 5, 4)),
        (dict(accept_image_fmap=True), (2, 6, 3, 5), (2, 3, 5, 4)),
        (dict(accept_image_fmap=True, codebook_dim=4), (2, 6, 3, 5), (2, 3, 5, 4)),
        (dict(), (0, 5, 6), (0, 5, 4)),
    ],
)
def test_layouts(options, shape, indices_shape):
    vq = with_codes(ResidualVQ(**SIZES, **options)).eval()
    x = torch.randn(shape)
    quantized, indices, losses, codes = vq(x, return_all_codes=True)
    assert quantized.shape == shape and indices.shape == indices_shape and losses.shape == (4,)
    assert codes.shape == (4, *indices_shape[:-1], vq.codebook_dim)
    channel = 1 if options else -1
    vq.channel_first = vq.accept_image_fmap = False
    expected = vq(x.movedim(channel, -1))
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(quantized.movedim(channel, -1), expected[0])
    torch.testing.assert_close(vq.get_output_from_indices(indices), expected[0])


def test_layouts_of_groups():
    vq = with_codes(GroupedResidualVQ(**SIZES, groups=3, accept_image_fmap=True)).eval()
    quantized, indices, losses, codes = vq(torch.randn(2, 6, 4, 5), return_all_codes=True)
    assert quantized.shape == (2, 6, 4, 5) and indices.shape == (3, 2, 4, 5, 4) and losses.shape == (3, 4)
    assert codes.shape == (3, 4, 2, 4, 5, 2) and vq.codebooks.shape == (3, 4, 16, 2)
    torch.testing.assert_close(vq.get_output_from_indices(indices), quantized.movedim(1, -1))
    assert torch.equal(vq.get_codes_from_indices(indices), codes)


def test_a_shared_codebook_is_stored_once_and_moves_once_a_call():
    vq = with_codes(ResidualVQ(**SIZES, shared_codebook=True, decay=0.5))
    assert [name for name in vq.state_dict() if name.endswith(".codebook")] == ["layers.0.codebook"]
    before, x = vq.codebooks.clone(), torch.randn(2, 30, 6)
    searched = vq(x)[1]
    assert not torch.equal(vq.codebooks, before)
    vq.eval().layers[0].codebook.copy_(before[0])
    assert torch.equal(vq(x)[1], searched), "every stage searches the codebook as it was before the call"


@pytest.mark.parametrize("shared", [False, True])
def test_kmeans_init_starts_every_stage_from_its_residuals(shared):
    vq = ResidualVQ(dim=4, num_quantizers=3, codebook_size=32, kmeans_init=True, shared_codebook=shared)
    x = torch.randn(500, 4)
    vq(x)
    with torch.no_grad():
        errors = [(x - vq.eval().get_codes_from_indices(vq(x)[1])[:stages].sum(0)).square().mean() for stages in (1, 3)]
    assert errors[0] < 0.35 and errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("kmeans_init", [False, True])
def test_all_later_stages_of_a_call_search_one_shared_codebook(kmeans_init):
    vq = ResidualVQ(**SIZES, shared_codebook=True, kmeans_init=kmeans_init)
    searched = []
    vq.layers[0].register_forward_pre_hook(lambda layer, _: searched.append(layer.codebook.clone()))
    vq(torch.randn(100, 6))
    first = 1 if kmeans_init else 0  # the start makes the codebook within the first stage
    assert all(torch.equal(codebook, searched[first]) for codebook in searched[first:])
    assert not torch.equal(vq.codebooks[0], searched[-1])


def test_dropout_leaves_out_last_stages_evenly_and_only_in_training():
    vq = with_codes(ResidualVQ(**SIZES, quantize_dropout=True, quantize_dropout_cutoff_index=1))
    x = torch.randn(1, 6)
    kept = []
    for _ in range(300):
        _, indices, losses = vq(x, freeze_codebook=True)
        present = indices[0] >= 0
        kept.append(int(present.sum()))
        assert present[: kept[-1]].all(), "only the last stages"
        assert (losses[kept[-1] :] == 0).all() and (losses[: kept[-1]] > 0).all()
    assert set(kept) == {2, 3, 4}
    assert all(70 < kept.count(stages) < 130 for stages in (2, 3, 4))
    assert (vq.eval()(x)[1] >= 0).all()


def test_dropout_follows_the_seed_of_torch():
    vq = with_codes(ResidualVQ(**SIZES, quantize_dropout=True))
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append([vq(torch.ones(1, 6), freeze_codebook=True)[1].tolist() for _ in range(20)])
    assert runs[0] == runs[1] and len(set(map(str, runs[0]))) > 1


def test_a_stage_left_out_does_not_move():
    vq = with_codes(ResidualVQ(**SIZES, quantize_dropout=True))
    before = vq.codebooks.clone()
    seed = 0
    while (vq(torch.randn(1, 6), rand_quantize_dropout_fixed_seed=seed, freeze_codebook=True)[1] >= 0).sum() != 2:
        seed += 1
    vq(torch.randn(50, 6), rand_quantize_dropout_fixed_seed=seed)
    assert [torch.equal(now, then) for now, then in zip(vq.codebooks, before, strict=True)] == [False] * 2 + [True] * 2


def test_coarse_indices_decode_where_dropout_trained_for_it():
    vq = with_codes(ResidualVQ(**SIZES, quantize_dropout=True)).eval()
    _, indices, _, codes = vq(torch.randn(2, 5, 6), return_all_codes=True)
    torch.testing.assert_close(vq.get_output_from_indices(indices[..., :2]), codes[:2].sum(0))
    with pytest.raises(ValueError, match=r"indices: expected shape \(B, \.\.\., 4\), got \(2, 5, 2\)"):
        ResidualVQ(**SIZES).get_codes_from_indices(indices[..., :2])


@pytest.mark.parametrize(("share", "times"), [(0.0, 4), (1.0, 1)])
def test_how_often_the_gradient_reaches_the_input(share, times):
    vq = with_codes(ResidualVQ(**SIZES, quant_grad_frac=share))
    x = torch.randn(2, 5, 6, requires_grad=True)
    vq(x)[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, times))


@pytest.mark.parametrize("shared", [False, True])
def test_frozen_codebooks_do_not_move(shared):
    vq = ResidualVQ(**SIZES, threshold_ema_dead_code=2.0, shared_codebook=shared)
    before = {name: value.clone() for name, value in vq.state_dict().items()}
    vq(torch.randn(64, 6), freeze_codebook=True)
    assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())


@pytest.mark.parametrize("options", [dict(), dict(codebook_dim=4), dict(shared_codebook=True)])
def test_masked_positions_leave_no_trace(options):
    vq = with_codes(ResidualVQ(**SIZES, **options))
    start = {name: value.clone() for name, value in vq.state_dict().items()}
    x, mask = torch.randn(3, 20, 6), torch.rand(3, 20) < 0.6
    quantized, indices, losses = vq(x, mask=mask)
    after = {name: value.clone() for name, value in vq.state_dict().items()}
    assert (quantized[~mask] == 0).all() and (indices[~mask] == -1).all()
    vq.load_state_dict(start)
    expected = vq(x[mask][None])
    torch.testing.assert_close(quantized[mask], expected[0][0])
    assert torch.equal(indices[mask], expected[1][0])
    torch.testing.assert_close(losses, expected[2])
    torch.testing.assert_close(after, dict(vq.state_dict()))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("codebook_dim", [6, 4])
def test_low_precision_input_meets_float32_codebooks(autocast, codebook_dim):
    vq = with_codes(ResidualVQ(**SIZES, codebook_dim=codebook_dim))
    x = torch.randn(3, 20, 6, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", enabled=autocast):
        expected = vq(x.detach().float(), freeze_codebook=True)
        quantized, indices, losses = vq(x)
    (quantized.float().sum() + losses.sum()).backward()
    assert quantized.dtype == x.grad.dtype == torch.bfloat16 and losses.dtype == torch.float32
    assert torch.equal(indices, expected[1]) and torch.equal(quantized, expected[0].bfloat16())
    assert vq.codebooks.dtype == torch.float32 and vq.codebooks.isfinite().all()


@pytest.mark.parametrize("build", [ResidualVQ, GroupedResidualVQ])
def test_compiles_without_a_graph_break(build):
    groups = {"groups": 2} if build is GroupedResidualVQ else {}
    vq = with_codes(build(**SIZES, **groups, accept_image_fmap=True, shared_codebook=True)).eval()
    compiled = torch.compile(vq, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 4, 3)
    for mine, expected in zip(compiled(x), vq(x), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("options", [dict(shared_codebook=True), dict(threshold_ema_dead_code=1.0)])
def test_a_training_step_reads_nothing_back_from_the_device(options):
    """Fake tensors have no values: reading one on the host raises."""
    with FakeTensorMode():
        vq = GroupedResidualVQ(**SIZES, groups=2, quantize_dropout=True, codebook_dim=2, **options)
        quantized, _, losses = vq(torch.randn(2, 5, 6), rand_quantize_dropout_fixed_seed=0)
        (quantized.sum() + losses.sum()).backward()


def test_same_input_same_bits():
    x = torch.randn(4, 100, 6)
    first, second = (with_codes(ResidualVQ(**SIZES, shared_codebook=True)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(mine, other) for mine, other in zip(first(x), second(x), strict=True))
    assert torch.equal(first.codebooks, second.codebooks)


def test_every_process_goes_through_the_same_stages(tmp_path):
    script = Path(__file__).with_name("residual_process.py")
    processes = [
        subprocess.Popen([sys.executable, script, tmp_path, str(rank), "2"], env=os.environ | {"OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first["kept"].unique()) > 1
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dim=0), "dim: expected at least 1, got 0"),
        (dict(num_quantizers=0), "num_quantizers: expected at least 1 .* got 0"),
        (dict(num_quantizers=None), "num_quantizers: expected at least 1 .* got None"),
        (dict(codebook_size=0), "codebook_size: expected at least 1, got 0"),
        (dict(codebook_size=(8, 16)), r"codebook_size: expected one size for each of 4 stages, got \(8, 16\)"),
        (dict(codebook_size=(8, 8, 8, 9), shared_codebook=True), r"codebook_size: .* shared .* got \(8, 8, 8, 9\)"),
        (dict(codebook_dim=0), "codebook_dim: expected at least 1, got 0"),
        (dict(heads=2), "heads: expected 1, .* got 2"),
        (dict(quantize_dropout_cutoff_index=4), r"quantize_dropout_cutoff_index: expected 0\.\.3, got 4"),
        (dict(quantize_dropout_multiple_of=0), "quantize_dropout_multiple_of: expected at least 1, got 0"),
        (dict(quant_grad_frac=1.5), r"quant_grad_frac: expected a number in \[0, 1\], got 1.5"),
        (dict(commitment_weight=-1.0), "commitment_weight: .* got -1.0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ResidualVQ(**SIZES | options)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="groups: expected a divisor of dim = 6, got 4"):
        GroupedResidualVQ(**SIZES, groups=4)
    with pytest.raises(TypeError, match="no_such_option"):
        ResidualVQ(**SIZES, no_such_option=True)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, \.\.\., 6\), got \(2, 5, 7\)"):
        ResidualVQ(**SIZES)(torch.randn(2, 5, 7))
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 6, H, W\), got \(2, 6, 7\)"):
        ResidualVQ(**SIZES, accept_image_fmap=True)(torch.randn(2, 6, 7))
    groups = GroupedResidualVQ(**SIZES, groups=2)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, \.\.\., 6\), got \(2, 5, 8\)"):
        groups(torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match=r"indices: expected 2 groups first, got shape \(3, 5, 4\)"):
        groups.get_codes_from_indices(torch.zeros(3, 5, 4, dtype=torch.int64))


@pytest.mark.parametrize("shared", [False, True])
def test_stages_accumulate_until_the_end_of_the_step(shared):
    joined = with_codes(ResidualVQ(**SIZES, shared_codebook=shared, decay=0.5))
    parts, once = (ResidualVQ(**SIZES, shared_codebook=shared, decay=0.5) for _ in range(2))
    for other in (parts, once):
        other.load_state_dict(joined.state_dict())
    x = torch.randn(6, 20, 6)
    with accumulate_codebooks(parts):
        for part in x.split(2):
            parts(part)
            assert torch.equal(parts.codebooks, joined.codebooks)
    with accumulate_codebooks(once):
        once(x)
    torch.testing.assert_close(parts.codebooks, once.codebooks)
    joined(x)
    if shared:  # one step of the averages for all stages, where a call by itself takes one a stage
        assert not torch.allclose(parts.codebooks, joined.codebooks)
    else:
        torch.testing.assert_close(parts.codebooks, joined.codebooks)


def test_weights_and_temperature_reach_every_stage():
    vq = with_codes(ResidualVQ(**SIZES, stochastic_sample_codes=True))
    x, before = torch.randn(50, 6), vq.codebooks.clone()
    nearest = vq(x, sample_codebook_temp=0.0, freeze_codebook=True)[1]
    assert all((vq(x, freeze_codebook=True)[1] != nearest).any(0))
    vq(x, weights=torch.zeros(50))
    for layer in vq.layers:
        torch.testing.assert_close(layer.cluster_size, torch.full((16,), 0.8))
    torch.testing.assert_close(vq.codebooks, before, rtol=1e-4, atol=1e-4)


def test_what_is_printed_says_what_the_stages_share():
    shown = repr(ResidualVQ(**SIZES, shared_codebook=True, use_cosine_sim=True))
    assert "dim=6, num_quantizers=4, shared_codebook=True\n" in shown
    assert "dim=6, codebook_size=16, decay=0.8, use_cosine_sim=True\n" in shown
