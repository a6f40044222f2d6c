"""Promises of quantize and codebook_stats beyond agreement with the reference on random data."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import vqfast
from vqfast.ops import codebook_stats, quantize, registry
from vqfast.ops.prepared import METRICS

BACKENDS = [b for b, reason in registry.status("cpu").items() if reason is None]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with vqfast.backend(request.param):
        yield request.param


class TestQuantize:
    def test_cosine_happens_on_the_unit_sphere(self, backend):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(4, 7, 5, generator=g, dtype=torch.float64, requires_grad=True)
        codebook = torch.randn(6, 5, generator=g, dtype=torch.float64, requires_grad=True)
        probe = torch.randn(4, 7, 5, generator=g, dtype=torch.float64)
        got = quantize(x, codebook, metric="cosine", beta=0.3, codebook_weight=0.8)
        got_grads = torch.autograd.grad(got.loss * 1.7 + (got.quantized * probe).sum(), (x, codebook))

        unit = x / x.norm(dim=-1, keepdim=True)
        codes = codebook / codebook.norm(dim=-1, keepdim=True)
        chosen = codes[got.indices]
        loss = 0.8 * (unit.detach() - chosen).square().mean() + 0.3 * (unit - chosen.detach()).square().mean()
        quantized = unit + (chosen - unit).detach()
        want_grads = torch.autograd.grad(loss * 1.7 + (quantized * probe).sum(), (x, codebook))
        assert got.indices.tolist() == (unit @ codes.T).argmax(-1).tolist()
        torch.testing.assert_close(got.quantized, chosen)
        torch.testing.assert_close(got.loss, loss)
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("metric", METRICS)
    def test_heads_are_quantised_each_with_its_codebook(self, backend, metric):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(4, 7, 3, 5, generator=g, requires_grad=True)
        codebook = torch.randn(3, 6, 5, generator=g, requires_grad=True)
        mask = torch.rand(4, 7, generator=g) > 0.3
        got = quantize(x, codebook, metric=metric, mask=mask)
        each = [quantize(x[..., h, :], codebook[h], metric=metric, mask=mask) for h in range(3)]
        assert torch.equal(got.quantized, torch.stack([q.quantized for q in each], -2))
        assert torch.equal(got.indices, torch.stack([q.indices for q in each], -1))
        assert torch.equal(got.counts, torch.stack([q.counts for q in each]))
        torch.testing.assert_close(got.perplexity, torch.stack([q.perplexity for q in each]))
        loss = sum(q.loss for q in each) / 3
        torch.testing.assert_close(got.loss, loss)
        for a, b in zip(
            torch.autograd.grad(got.loss, (x, codebook)), torch.autograd.grad(loss, (x, codebook)), strict=True
        ):
            torch.testing.assert_close(a, b)

    def test_indices_are_kept_for_backward_in_32_bits(self, backend):
        kept = []

        def pack(tensor):
            kept.append(tensor.dtype)
            return tensor

        x, codebook = torch.randn(8, 3, requires_grad=True), torch.randn(4, 3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            quantize(x, codebook)
        assert torch.int32 in kept and torch.int64 not in kept

    @pytest.mark.parametrize("estimator", ["ste", "none"])
    @pytest.mark.parametrize("shape", [(4, 7, 5), (33, 5), (5,), (0, 5)])
    def test_value_and_gradients_are_those_of_autograd(self, backend, estimator, shape):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)
        codebook = torch.randn(6, 5, generator=g, dtype=torch.float64, requires_grad=True)
        probe = torch.randn(*shape, generator=g, dtype=torch.float64)
        got = quantize(x, codebook, beta=0.3, codebook_weight=0.8, estimator=estimator)
        got_grads = torch.autograd.grad(got.loss * 1.7 + (got.quantized * probe).sum(), (x, codebook))

        codes = codebook[got.indices]
        loss = 0.8 * (x.detach() - codes).square().mean() + 0.3 * (x - codes.detach()).square().mean()
        loss = loss.nan_to_num(0)
        quantized = x + (codes - x).detach() if estimator == "ste" else codes
        want_grads = torch.autograd.grad(loss * 1.7 + (quantized * probe).sum(), (x, codebook))
        torch.testing.assert_close(got.quantized, codes)
        torch.testing.assert_close(got.loss, loss)
        assert got.counts.tolist() == torch.bincount(got.indices.reshape(-1), minlength=6).tolist()
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a, b)

    def test_rotation_gradient_is_that_of_the_rotation_held_constant(self, backend):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(9, 5, generator=g, dtype=torch.float64, requires_grad=True)
        codebook = torch.randn(6, 5, generator=g, dtype=torch.float64)
        probe = torch.randn(9, 5, generator=g, dtype=torch.float64)
        got = quantize(x, codebook, beta=0.0, estimator="rotation")
        (grad,) = torch.autograd.grad((got.quantized * probe).sum(), x)
        for row, code, wanted, result in zip(x.detach(), got.quantized.detach(), probe, grad, strict=True):
            u, v = row / row.norm(), code / code.norm()
            r = (u + v) / (u + v).norm()
            turn = torch.eye(5, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(v, u)
            turn = turn * (code.norm() / row.norm())
            torch.testing.assert_close(turn @ row, code)
            torch.testing.assert_close(result, turn.T @ wanted)

    def test_rotation_of_zero_and_opposite_vectors_stays_finite(self, backend):
        x = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
        for codebook in (torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)):
            quantize(x, codebook, estimator="rotation").quantized.sum().backward()
            assert x.grad.isfinite().all()

    def test_masked_vectors_take_no_part(self, backend):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(4, 6, 3, generator=g, requires_grad=True)
        codebook = torch.randn(8, 3, generator=g, requires_grad=True)
        mask = torch.rand(4, 6, generator=g) > 0.4
        for estimator in ("ste", "rotation", "none"):
            got = quantize(x, codebook, mask=mask, estimator=estimator)
            alone = quantize(x[mask], codebook, estimator=estimator)
            assert (got.indices[~mask] == -1).all() and (got.quantized[~mask] == 0).all()
            assert torch.equal(got.indices[mask], alone.indices) and torch.equal(got.counts, alone.counts)
            torch.testing.assert_close(got.loss, alone.loss)
            grads = torch.autograd.grad(got.loss + got.quantized.sum(), (x, codebook))
            want = torch.autograd.grad(alone.loss + alone.quantized.sum(), (x, codebook))
            for a, b in zip(grads, want, strict=True):
                torch.testing.assert_close(a, b)
            assert (grads[0][~mask] == 0).all()
        nothing = quantize(x, codebook, mask=torch.zeros_like(mask))
        assert nothing.loss == 0 and nothing.counts.sum() == 0

    def test_perplexity_counts_the_codes_in_use(self):
        codebook = torch.arange(8.0)[:, None]
        assert quantize(codebook, codebook).perplexity == pytest.approx(8)
        assert quantize(torch.zeros(5, 1), codebook).perplexity == pytest.approx(1)

    def test_gradient_only_where_it_is_asked_for(self, backend):
        x, codebook = torch.randn(8, 3, requires_grad=True), torch.randn(4, 3)
        quantize(x, codebook, codebook_weight=0).loss.backward()
        assert x.grad is not None and codebook.grad is None

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_takes_what_it_is_given_under_autocast(self, backend, dtype):
        x, codebook = torch.randn(8, 3).to(dtype), torch.randn(4, 3).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = quantize(x, codebook)
        assert got.quantized.dtype == dtype and got.loss.dtype == torch.float32

    def test_a_gradient_of_the_gradient_is_refused_not_wrong(self):
        x, codebook = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
        (grad,) = torch.autograd.grad(quantize(x, codebook).quantized.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    def test_compiles_without_a_break_and_without_a_recompile_for_another_length(self):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        codebook = torch.randn(8, 3, requires_grad=True)

        @torch.compile(backend=counter, fullgraph=True, dynamic=True)
        def step(x):
            out = quantize(x, codebook)
            return out.loss + out.quantized.square().sum(), out.indices, codebook_stats(x, out.indices, 8)[0]

        for n in (5, 6, 40, 1000):
            x = torch.randn(n, 3, requires_grad=True)
            loss, indices, counts = step(x)
            loss.backward()
            eager = quantize(x.detach().requires_grad_(), codebook)
            torch.testing.assert_close(loss, eager.loss + eager.quantized.square().sum())
            assert torch.equal(indices, eager.indices) and counts.sum() == n and x.grad is not None
        assert counter.frame_count == 1


class TestErrors:
    x, codes = torch.zeros(4, 3), torch.zeros(5, 3)

    @pytest.mark.parametrize("size", [5.0, "five", True])
    def test_a_codebook_size_is_a_whole_number(self, size):
        with pytest.raises(TypeError, match="codebook_size: expected a whole number, got (float|str|bool)"):
            codebook_stats(self.x, torch.zeros(4, dtype=torch.int64), size)

    def test_what_came_is_told_in_one_line(self):
        with pytest.raises(TypeError, match="got float32 numpy array of shape \\(4, 3\\)$"):
            quantize(self.x.numpy(), self.codes)
        with pytest.raises(TypeError, match=r"got list \[tensor.*\.\.\.$"):
            quantize([self.x, self.x], self.codes)

    def test_estimator(self):
        with pytest.raises(ValueError, match="estimator: expected one of ste, rotation, none, got 'magic'"):
            quantize(self.x, self.codes, estimator="magic")

    def test_mask(self):
        with pytest.raises(TypeError, match="mask: expected a bool tensor .* got float32"):
            quantize(self.x, self.codes, mask=torch.ones(4))
        with pytest.raises(ValueError, match=r"mask: expected shape \(4,\), .* got bool tensor of shape \(3,\)"):
            quantize(self.x, self.codes, mask=torch.ones(3, dtype=torch.bool))

    @pytest.mark.parametrize(
        ("indices", "size", "weights", "error", "words"),
        [
            (torch.tensor([0, 1, 5, 0]), 5, None, ValueError, r"indices: expected values in -1..4 .*got 0..5"),
            (torch.tensor([0, -2, 1, 0]), 5, None, ValueError, r"indices: expected values in -1..4 .*got -2..1"),
            (torch.zeros(3, dtype=torch.int64), 5, None, ValueError, r"indices: expected shape"),
            (torch.zeros(4, dtype=torch.int32), 5, None, TypeError, r"indices: expected an int64"),
            (torch.zeros(4, dtype=torch.int64), 0, None, ValueError, r"codebook_size: expected at least 1, got 0"),
            (torch.zeros(4, dtype=torch.int64), 5, torch.ones(3), ValueError, r"weights: expected the shape"),
        ],
    )  # fmt: skip
    def test_codebook_stats(self, indices, size, weights, error, words):
        with pytest.raises(error, match=words):
            codebook_stats(self.x, indices, size, weights=weights)
