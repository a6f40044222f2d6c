"""Quantisation in packed space: against the golden quantiser and against quantising the replicated grid."""

import pytest
import torch

from vqfast import ops
from vqfast.kernels.pack.reference import on_fine_grid


@pytest.mark.parametrize("order", ["row", "region"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_on_the_grid_and_in_packed_space_are_the_same(order, dtype):
    """With a capacity the features are packed, looked up and unpacked; without, the CPU looks up where they lie."""
    features, grains, codebook = problem(3, dtype)
    g = torch.Generator().manual_seed(9)
    noise = torch.randn(features.movedim(-1, 1).shape, generator=g).to(dtype)
    features = (features.movedim(-1, 1).contiguous() + noise).movedim(1, -1)
    grad = torch.randn(features.shape, generator=g).to(dtype)

    def step(capacity):
        x, codes = features.detach().requires_grad_(), codebook.detach().requires_grad_()
        out = ops.dynamic_quantize(x, grains, codes, order=order, capacity=capacity)
        return out, torch.autograd.grad((out.quantized, out.loss), (x, codes), (grad, torch.tensor(3.0).to(out.loss)))

    (here, here_grads), (there, there_grads) = step(None), step(features[..., 0].numel())
    assert torch.equal(here.quantized, there.quantized) and torch.equal(here.indices, there.indices)
    assert torch.equal(here.counts, there.counts) and torch.equal(here.chosen, there.chosen)
    assert all(torch.equal(a, b) for a, b in zip(here.packed, there.packed, strict=True))
    torch.testing.assert_close(here.loss, there.loss)
    for a, b in zip(here_grads, there_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("capacity", [None, 60, 20])
def test_each_code_is_chosen_once(capacity):
    """Also where some are dropped, which then count for none."""
    features, grains, codebook = problem()
    out = ops.dynamic_quantize(features, grains, codebook, capacity=capacity)
    counts, sums = ops.codebook_stats(features, out.chosen, len(codebook))
    assert torch.equal(counts, out.counts.to(counts)) and int(counts.sum()) == int(out.packed.cu_seqlens[-1])
    again = ops.pack(out.chosen, grains, capacity=capacity).values
    assert torch.equal(again, out.packed.values)
    vectors = ops.pack(features, grains, capacity=capacity).values
    torch.testing.assert_close(sums.sum(0), vectors.sum(0))


def test_a_default_device_elsewhere_is_not_for_tensors_of_the_host():
    features, grains, codebook = problem(4)
    with torch.device("meta"):
        here = ops.dynamic_quantize(features, grains, codebook)
    expected = ops.dynamic_quantize(features, grains, codebook)
    assert torch.equal(here.indices, expected.indices) and torch.equal(here.quantized, expected.quantized)


def problem(num_grains: int = 2, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """features equal over what each code covers, grains, codebook."""
    g = torch.Generator().manual_seed(num_grains)
    factor = 2 ** (num_grains - 1)
    grains = torch.randint(num_grains, (3, 4, 3), generator=g)
    features = torch.randn(3, 4 * factor, 3 * factor, 6, generator=g, dtype=dtype)
    features = ops.unpack(ops.pack(features, grains), grains, num_grains=num_grains)
    return features, grains, torch.randn(20, 6, generator=g, dtype=dtype)


def cell_sums(grad: torch.Tensor, grains: torch.Tensor) -> torch.Tensor:
    """(B, Hf, Wf, D) -> summed over cells (B, Hc, Wc, D)."""
    factor = grad.shape[1] // grains.shape[1]
    return grad.unflatten(1, (-1, factor)).unflatten(3, (-1, factor)).sum((2, 4))


@pytest.mark.parametrize("order", ["row", "region"])
@pytest.mark.parametrize("num_grains", [1, 2, 3])
def test_is_the_replicated_grid_quantised_with_weights(num_grains, order):
    features, grains, codebook = problem(num_grains)
    features.requires_grad_()
    codebook.requires_grad_()
    out = ops.dynamic_quantize(features, grains, codebook, order=order, normalise="cells", counting="cells")
    grid = ops.quantize(features, codebook)
    assert torch.equal(out.indices, grid.indices)
    assert torch.equal(out.quantized, grid.quantized)
    assert torch.equal(out.counts, grid.counts)
    weight = 4.0 ** (on_fine_grid(grains, 2 ** (num_grains - 1)) - (num_grains - 1))
    error = (features - codebook[grid.indices]).square().sum(-1)
    want = 1.25 * (weight * error).mean() / 6
    torch.testing.assert_close(out.loss, want)

    per_code = ops.dynamic_quantize(features, grains, codebook, order=order)
    tokens = int((4**grains).sum())
    torch.testing.assert_close(per_code.loss, want * features[..., 0].numel() / tokens)
    assert int(per_code.counts.sum()) == tokens and int(out.counts.sum()) == features[..., 0].numel()
    sums = ops.codebook_stats(features, per_code.chosen, 20, weights=1 / weight)
    torch.testing.assert_close(sums, ops.codebook_stats(features, grid.indices, 20))


def test_gradient_passes_straight_through_and_each_code_is_charged_once():
    features, grains, codebook = problem()
    features.requires_grad_()
    codebook.requires_grad_()
    probe = torch.randn(features.shape, dtype=torch.float64)
    out = ops.dynamic_quantize(features, grains, codebook, normalise="cells")
    (100 * out.loss + (probe * out.quantized).sum()).backward()
    weight = 4.0 ** (on_fine_grid(grains, 2) - 1)[..., None]
    codes, copy = codebook.detach().requires_grad_(), features.detach().requires_grad_()
    chosen = codes[out.indices]
    loss = (weight * (chosen - copy.detach()).square()).mean() + 0.25 * (
        weight * (chosen.detach() - copy).square()
    ).mean()
    (100 * loss + (probe * copy).sum()).backward()
    torch.testing.assert_close(cell_sums(features.grad, grains), cell_sums(copy.grad, grains))
    torch.testing.assert_close(codebook.grad, codes.grad)


@pytest.mark.parametrize("estimator", ["ste", "rotation", "none"])
def test_estimators_are_those_of_quantize(estimator):
    features, _, codebook = problem()
    fine = torch.ones(3, 4, 3, dtype=torch.int64)
    probe, grads = torch.randn(features.shape, dtype=torch.float64), []
    for run in (
        lambda x: ops.dynamic_quantize(x, fine, codebook, estimator=estimator),
        lambda x: ops.quantize(x, codebook, estimator=estimator),
    ):
        x = features.clone().requires_grad_()
        out = run(x)
        grads.append(torch.autograd.grad(out.loss + (probe * out.quantized).sum(), x)[0])
    torch.testing.assert_close(*grads)


def test_a_traced_graph_gives_the_same_without_looking_at_the_data():
    features, grains, codebook = problem(3, torch.float32)
    compiled = torch.compile(ops.dynamic_quantize, fullgraph=True, backend="aot_eager")
    for normalise in ("codes", "cells"):
        got = compiled(features, grains, codebook, normalise=normalise, counting=normalise)
        want = ops.dynamic_quantize(features, grains, codebook, normalise=normalise, counting=normalise)
        torch.testing.assert_close(got.loss, want.loss)
        for name in ("quantized", "indices", "counts", "chosen"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        for a, b in zip(got.packed, want.packed, strict=True):
            assert torch.equal(a, b)


def test_a_capacity_that_holds_the_codes_changes_nothing():
    features, grains, codebook = problem()
    tokens = int((4**grains).sum())
    whole = ops.dynamic_quantize(features, grains, codebook)
    part = ops.dynamic_quantize(features, grains, codebook, capacity=tokens)
    assert len(part.packed.values) == tokens and torch.equal(part.quantized, whole.quantized)
    assert torch.equal(part.loss, whole.loss)


def test_golden_quantiser(golden):
    """Two grains: indices, output, masked loss; the gradient agrees summed over each cell, whose codes are one."""
    arrays = golden("dqvae_dual_small")
    features = arrays["z_pre_quant"].permute(0, 2, 3, 1).requires_grad_()
    grains, codebook = arrays["grain"], arrays["sd/quantize.codebook.weight"][:48]
    out = ops.dynamic_quantize(features, grains, codebook, normalise="cells")
    assert torch.equal(out.indices, arrays["indices"])
    torch.testing.assert_close(out.quantized.permute(0, 3, 1, 2), arrays["z_q"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss, arrays["vq_loss_masked"], rtol=1e-4, atol=1e-6)
    unmasked = ops.quantize(features, codebook).loss
    torch.testing.assert_close(unmasked, arrays["vq_loss_unmasked"], rtol=1e-4, atol=1e-6)
    probe = arrays["st_probe"].permute(0, 2, 3, 1)
    (grad,) = torch.autograd.grad(100 * out.loss + (probe * out.quantized).sum(), features)
    coarse = grains == 0
    want = cell_sums(arrays["grad_z_probe"].permute(0, 2, 3, 1), grains)
    torch.testing.assert_close(cell_sums(grad, grains), want, rtol=1e-4, atol=1e-4)
    fine = on_fine_grid(~coarse, 2)
    torch.testing.assert_close(grad[fine], arrays["grad_z_probe"].permute(0, 2, 3, 1)[fine], rtol=1e-4, atol=1e-4)
    weight = 4.0 ** (on_fine_grid(grains, 2) - 1)
    assert torch.equal(weight[:, None], arrays["codebook_mask"])


def test_golden_moving_averages(golden):
    """The released statistics count every position of the grid: those of `chosen` where all are fine."""
    arrays = golden("dq_ema_codebook")
    features = arrays["plain/x"].permute(0, 2, 3, 1)
    codebook = arrays["plain/weight_before"][:24]
    out = ops.dynamic_quantize(features, torch.ones(2, 3, 3, dtype=torch.int64), codebook, counting="cells")
    assert torch.equal(out.indices, arrays["plain/indices"])
    counts, sums = ops.codebook_stats(features, out.chosen, 24)
    assert torch.equal(counts.long(), out.counts)
    torch.testing.assert_close(
        arrays["plain/cluster_size_before"].lerp(counts, 0.01), arrays["plain/cluster_size_after"]
    )
    torch.testing.assert_close(
        arrays["plain/embed_sum_before"][:24].lerp(sums, 0.01), arrays["plain/embed_sum_after"][:24]
    )


@pytest.mark.parametrize("case", ["dual0", "dual1", "dual2", "dual3", "triple0", "triple1", "triple2"])
def test_golden_budget(golden, case):
    arrays = golden("dq_budget")
    targets, weights = {
        "dual0": ((0.5,), (20.0,)),
        "dual1": ((0.3,), (20.0,)),
        "dual2": ((0.5,), (1.0,)),
        "dual3": ((0.7,), (4.0,)),
        "triple0": ((0.3, 0.3), (1.0, 1.0)),
        "triple1": ((0.5, 0.2), (1.0, 2.5)),
        "triple2": ((0.6, 0.1), (1.0, 1.0)),
    }[case]
    gate = arrays[f"{case}/gate"].requires_grad_()
    loss = ops.grain_budget_loss(gate, targets, weights)
    torch.testing.assert_close(loss, arrays[f"{case}/loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, gate)[0], arrays[f"{case}/grad"], rtol=1e-4, atol=1e-7)


def test_a_gradient_of_the_gradient_is_refused_not_wrong():
    features, grains, codebook = problem()
    features = features.requires_grad_()
    quantized = ops.dynamic_quantize(features, grains, codebook).quantized
    (grad,) = torch.autograd.grad(quantized.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_errors():
    features, grains, codebook = problem()
    with pytest.raises(ValueError, match="normalise: expected one of codes, cells, got 'tokens'"):
        ops.dynamic_quantize(features, grains, codebook, normalise="tokens")
    with pytest.raises(ValueError, match="counting: expected one of"):
        ops.dynamic_quantize(features, grains, codebook, counting="all")
    with pytest.raises(ValueError, match="features: expected shape"):
        ops.dynamic_quantize(features[0], grains, codebook)
    with pytest.raises(ValueError, match=r"codebook: expected D = \d+ as in features"):
        ops.dynamic_quantize(features, grains, codebook[:, 1:])
    with pytest.raises(TypeError, match="codebook: expected a float.*PreparedCodebook"):
        ops.dynamic_quantize(features, grains, ops.prepare(codebook))
    with pytest.raises(ValueError, match="grains: expected the device of features, cpu, got .* on meta"):
        ops.dynamic_quantize(features, grains.to("meta"), codebook)
    with pytest.raises(ValueError, match="1 targets and weights|expected 1 targets"):
        ops.grain_budget_loss(torch.zeros(1, 2, 4, 4), (0.1, 0.2), (1.0,))
