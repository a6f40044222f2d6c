"""`VectorQuantize` in low precision, and where vectors are not finite."""

import copy

import pytest
import torch

from vqfast.nn import VectorQuantize

SIZES = dict(dim=8, codebook_size=32)


def test_bfloat16_input_meets_a_float32_codebook():
    vq = VectorQuantize(8, 16)
    vq.codebook.normal_()
    x = torch.randn(3, 20, 8, dtype=torch.bfloat16, requires_grad=True)
    expected = torch.cdist(x.detach().float(), vq.codebook).argmin(-1)
    quantized, indices, loss = vq(x)
    (quantized.float().sum() + loss).backward()
    assert quantized.dtype == x.grad.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(indices, expected)
    assert vq.codebook.dtype == torch.float32 and vq.codebook.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        dict(use_cosine_sim=True, commitment_use_cross_entropy_loss=True),
        dict(orthogonal_reg_weight=10.0, stochastic_sample_codes=True),
        dict(use_cosine_sim=True, stochastic_sample_codes=True),
        dict(kmeans_init=True),
    ],
)
def test_autocast_does_not_reach_the_quantisation(options):
    vq, x = VectorQuantize(**SIZES, **options), torch.randn(3, 30, 8)
    start, results = {name: value.clone() for name, value in vq.state_dict().items()}, []
    for enabled in (False, True):
        vq.load_state_dict(start)
        torch.manual_seed(1)
        with torch.autocast("cpu", enabled=enabled):
            results.append((*vq(x), vq.codebook.clone()))
    for without, within in zip(*results, strict=True):
        assert torch.equal(without, within)


def test_low_precision_input_meets_float32_projections():
    vq = VectorQuantize(8, 16, codebook_dim=4, heads=3, layernorm_after_project_in=True)
    x = torch.randn(3, 20, 8, dtype=torch.bfloat16, requires_grad=True)
    quantized, _, loss = vq(x, mask=torch.rand(3, 20) < 0.5)
    (quantized.float().sum() + loss).backward()
    assert quantized.dtype == x.grad.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(vq.eval()(x)[1], vq(x.float())[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"heads": 2, "separate_codebook_per_head": True}, {"use_cosine_sim": True}])
def test_a_vector_that_is_not_finite_does_not_spoil_the_averages(bad, options):
    torch.manual_seed(0)
    vq = VectorQuantize(dim=4, codebook_size=8, **options).train()
    x = torch.randn(1, 64, 4)
    vq(x)
    spoilt = x.clone()
    spoilt[0, 3] = bad
    before, other = vq.cluster_size.clone(), copy.deepcopy(vq)
    indices, loss = vq(spoilt)[1:]
    assert (indices[0, 3] == 0).all() and not loss.isfinite()
    assert vq.codebook.isfinite().all() and vq.embed_avg.isfinite().all() and vq.cluster_size.isfinite().all()
    # Of code 0 nothing was counted; the others counted what they would have without the vector.
    other(torch.cat([x[:, :3], x[:, 4:]], dim=1))
    torch.testing.assert_close(vq.embed_avg[..., 1:, :], other.embed_avg[..., 1:, :])
    torch.testing.assert_close(vq.cluster_size[..., 0], before[..., 0] * vq.decay)


def test_no_code_is_revived_by_a_vector_that_is_not_finite():
    torch.manual_seed(0)
    vq = VectorQuantize(dim=4, codebook_size=64, threshold_ema_dead_code=2).train()
    before = vq.codebook.clone()
    vq(torch.full((1, 64, 4), torch.nan))
    torch.testing.assert_close(vq.codebook, before)
    mixed = torch.randn(1, 64, 4)
    mixed[0, ::2] = torch.inf
    vq(mixed)
    assert vq.codebook.isfinite().all() and vq.embed_avg.isfinite().all()
    assert (vq.codebook.abs() > 0.1).any(dim=-1).sum() >= 30, "the other half of the vectors revives codes"
