"""Promises of nearest_code and prepare beyond agreement with the reference on random data."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vqfast
from vqfast.ops import nearest_code, prepare, quantize, registry
from vqfast.ops.prepared import METRICS

BACKENDS = [b for b, reason in registry.status("cpu").items() if reason is None]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with vqfast.backend(request.param):
        yield request.param


def exact_worth(vector: list[Fraction], code: list[Fraction], metric: str) -> Fraction:
    """Minus the squared distance, the product, or the square of the cosine with its sign, times ||vector||^2."""
    if metric == "l2":
        return -sum((a - b) ** 2 for a, b in zip(vector, code, strict=True))
    product, square = (sum(a * b for a, b in zip(v, code, strict=True)) for v in (vector, code))
    return product if metric == "dot" else product * abs(product) / square if square else Fraction(0)


def exact_argmin(x: torch.Tensor, codebook: torch.Tensor, metric: str = "l2") -> list[int]:
    """Lowest index of the nearest code, in rational arithmetic."""
    codes = [[Fraction(v) for v in code] for code in codebook.double().tolist()]
    out = []
    for row in x.double().tolist():
        vector = [Fraction(v) for v in row]
        worth = [exact_worth(vector, code, metric) for code in codes]
        out.append(worth.index(max(worth)))
    return out


class TestNearest:
    def test_ties_go_to_the_lowest_index(self, backend):
        codes = torch.randn(20, 9)
        codes[15], codes[7] = codes[3], codes[3]
        assert nearest_code(codes[[3, 7, 15]], codes).tolist() == [3, 3, 3]
        midway = torch.arange(9.0)
        assert nearest_code(midway[None], torch.stack([midway + 2, midway + 1, midway - 1])).tolist() == [1]

    def test_nan_and_infinite_rows_get_index_zero(self, backend):
        x, codes = torch.randn(6, 5), torch.randn(12, 5)
        x[1, 2], x[4, 0], x[5] = torch.nan, torch.inf, -torch.inf
        found = nearest_code(x, codes)
        assert found[[1, 4, 5]].tolist() == [0, 0, 0]
        assert found[[0, 2, 3]].tolist() == exact_argmin(x[[0, 2, 3]], codes)

    def test_nan_code_is_never_chosen_while_another_is_finite(self, backend):
        x, codes = torch.randn(50, 4), torch.randn(10, 4)
        codes[0], codes[3, 1], codes[5, 2] = torch.nan, torch.nan, torch.inf
        found = nearest_code(x, codes)
        finite = [1, 2, 4, 6, 7, 8, 9]
        assert found.tolist() == [finite[i] for i in exact_argmin(x, codes[finite])]
        assert nearest_code(x, torch.full((3, 4), torch.nan)).tolist() == [0] * 50

    @pytest.mark.parametrize("offset", [1.0, 1e3, 1e4])
    def test_a_common_offset_changes_nothing(self, backend, offset):
        g = torch.Generator().manual_seed(0)
        x, codes = torch.randn(200, 64, generator=g) + offset, torch.randn(100, 64, generator=g) + offset
        assert nearest_code(x, codes).tolist() == nearest_code(x.double(), codes.double()).tolist()

    @pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e37])
    def test_any_scale(self, backend, scale):
        g = torch.Generator().manual_seed(0)
        x, codes = torch.randn(40, 8, generator=g) * scale, torch.randn(30, 8, generator=g) * scale
        assert nearest_code(x, codes).tolist() == exact_argmin(x, codes)

    def test_codes_one_bit_apart(self, backend):
        g = torch.Generator().manual_seed(0)
        code = torch.randn(33, generator=g)
        codes = code.repeat(8, 1)
        for k in range(1, 8):
            codes[k, k] = torch.nextafter(codes[k, k], torch.tensor(torch.inf * (-1) ** k))
        x = code + 0.1 * torch.randn(40, 33, generator=g)
        assert nearest_code(x, codes).tolist() == exact_argmin(x, codes)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_any_strides_and_leading_shape(self, backend, dtype):
        g = torch.Generator().manual_seed(0)
        codes = torch.randn(17, 6, generator=g).to(dtype)
        feature_map = torch.randn(2, 6, 5, 7, generator=g).to(dtype)
        for x in (
            feature_map.permute(0, 2, 3, 1),
            feature_map.permute(0, 3, 2, 1),
            feature_map[..., ::2].permute(0, 2, 3, 1),
            feature_map[0, :, 0, 0],
            feature_map.permute(0, 2, 3, 1)[:, :, :0],
        ):
            assert torch.equal(nearest_code(x, codes), nearest_code(x.contiguous().double(), codes.double()))

    @settings(max_examples=60, deadline=None)
    @given(
        N=st.integers(0, 30), K=st.integers(1, 70), D=st.integers(1, 20), seed=st.integers(0, 2**31),
        step=st.sampled_from([1.0, 0.25, 2.0**-10]), offset=st.sampled_from([0.0, 3.0, 4096.0]),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    )  # fmt: skip
    def test_exact_on_a_lattice_full_of_ties(self, N, K, D, seed, step, offset, dtype):
        g = torch.Generator().manual_seed(seed)
        x = (torch.randint(-3, 4, (N, D), generator=g) * step + offset).to(dtype)
        codes = (torch.randint(-3, 4, (K, D), generator=g) * step + offset).to(dtype)
        want = exact_argmin(x, codes)
        for name in BACKENDS:
            with vqfast.backend(name):
                assert nearest_code(x, codes).tolist() == want


@pytest.mark.parametrize("metric", METRICS)
class TestEveryMetric:
    @settings(max_examples=40, deadline=None)
    @given(
        N=st.integers(0, 12), K=st.integers(1, 40), D=st.integers(1, 12), seed=st.integers(0, 2**31),
        step=st.sampled_from([1.0, 0.25, 2.0**-10]), offset=st.sampled_from([0.0, 3.0, 4096.0]),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    )  # fmt: skip
    def test_exact_on_a_lattice_full_of_ties(self, metric, N, K, D, seed, step, offset, dtype):
        """The promise: argmin or argmax of the real numbers given, ties to the lowest index."""
        g = torch.Generator().manual_seed(seed)
        x = (torch.randint(-3, 4, (N, D), generator=g) * step + offset).to(dtype)
        codes = (torch.randint(-3, 4, (K, D), generator=g) * step + offset).to(dtype)
        want = exact_argmin(x, codes, metric)
        for name in BACKENDS:
            with vqfast.backend(name):
                assert nearest_code(x, codes, metric=metric).tolist() == want

    @settings(max_examples=40, deadline=None)
    @given(
        D=st.integers(1, 40), seed=st.integers(0, 2**31), factor=st.sampled_from([1.0, 3.0, 2.0**-9]),
        scale=st.sampled_from([1e-20, 1.0, 1e20]), dtype=st.sampled_from([torch.float32, torch.float64]),
    )  # fmt: skip
    def test_exact_among_codes_one_bit_apart(self, metric, D, seed, factor, scale, dtype):
        # A float64 bit changes the cosine of a code along x by less than 2^-96 of itself: by the definition a tie.
        dtype = torch.float32 if metric == "cosine" else dtype
        g = torch.Generator().manual_seed(seed)
        code = (torch.randn(D, generator=g) * scale).to(dtype)
        codes = code.repeat(9, 1)
        for k in range(1, 9):
            d = int(torch.randint(D, (), generator=g))
            codes[k, d] = torch.nextafter(codes[k, d], torch.tensor(torch.inf * (-1) ** k, dtype=dtype))
        codes[5] *= factor
        x = torch.cat([code + (0.1 * scale * torch.randn(6, D, generator=g)).to(dtype), code[None], -code[None]])
        want = exact_argmin(x, codes, metric)
        with vqfast.backend(BACKENDS[0]):
            assert nearest_code(x, codes, metric=metric).tolist() == want

    @pytest.mark.parametrize("D", [1, 2, 31, 257, 1000, 4096])  # fractions make it slow, not the search
    def test_any_number_of_features(self, metric, D):
        g = torch.Generator().manual_seed(D)
        x, codes = torch.randn(5, D, generator=g) + 1, torch.randn(7, D, generator=g) + 1
        codes[6], codes[2] = codes[0], -codes[1]
        assert nearest_code(x, codes, metric=metric).tolist() == exact_argmin(x, codes, metric)

    @pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e37])
    def test_any_scale_of_rows_and_codes(self, backend, metric, scale):
        g = torch.Generator().manual_seed(0)
        x, codes = torch.randn(20, 8, generator=g), torch.randn(30, 8, generator=g)
        pairs = [(x * scale, codes * scale), (x * scale, codes), (x, codes * scale)]
        # Distances between vectors of such different sizes differ by less than twice float64 can tell.
        for a, b in pairs[:1] if metric == "l2" else pairs:
            assert nearest_code(a, b, metric=metric).tolist() == exact_argmin(a, b, metric)

    @pytest.mark.parametrize("scale", [1e-150, 1e150])
    def test_any_scale_of_float64(self, backend, metric, scale):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(20, 8, generator=g, dtype=torch.float64) * scale
        codes = torch.randn(30, 8, generator=g, dtype=torch.float64) * scale
        assert nearest_code(x, codes, metric=metric).tolist() == exact_argmin(x, codes, metric)

    @pytest.mark.parametrize("offset", [1e2, 1e4])
    def test_a_common_offset(self, backend, metric, offset):
        g = torch.Generator().manual_seed(0)
        x, codes = torch.randn(20, 16, generator=g) + offset, torch.randn(40, 16, generator=g) + offset
        assert nearest_code(x, codes, metric=metric).tolist() == exact_argmin(x, codes, metric)

    def test_zero_and_broken_rows_and_codes(self, backend, metric):
        g = torch.Generator().manual_seed(0)
        x, codes = torch.randn(8, 5, generator=g), torch.randn(12, 5, generator=g)
        codes[0, 1], codes[4], codes[7, 2] = torch.nan, torch.inf, -torch.inf
        codes[3] = 0
        x[1, 2], x[4, 0], x[6] = torch.nan, torch.inf, 0
        found = nearest_code(x, codes, metric=metric)
        kept = [k for k in range(12) if codes[k].isfinite().all()]
        good = [0, 2, 3, 5, 6, 7]
        assert found[[1, 4]].tolist() == [0, 0]
        assert found[good].tolist() == [kept[k] for k in exact_argmin(x[good], codes[kept], metric)]
        nothing = torch.full((3, 5), torch.nan)
        assert nearest_code(x, nothing, metric=metric).tolist() == [0] * 8
        # A zero code's cosine is 0: better than a negative one.
        opposite = torch.stack([-x[0], torch.zeros(5)])
        assert nearest_code(x[:1], opposite, metric=metric).tolist() == [1]

    def test_heads_have_codebooks_of_their_own(self, backend, metric):
        g = torch.Generator().manual_seed(0)
        codes = torch.randn(3, 11, 6, generator=g)
        x = torch.randn(4, 5, 3, 6, generator=g)
        for view in (x, x.transpose(0, 1), x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2), x[:0], x[0, 0]):
            found = nearest_code(view, codes, metric=metric)
            want = [nearest_code(view[..., h, :], codes[h], metric=metric) for h in range(3)]
            assert torch.equal(found, torch.stack(want, -1))

    def test_masked_rows_get_minus_one_and_are_not_reranked(self, backend, metric):
        g = torch.Generator().manual_seed(0)
        x, codes = torch.randn(6, 7, 5, generator=g), torch.randn(9, 5, generator=g).repeat(2, 1)
        mask = torch.rand(6, 7, generator=g) > 0.5
        found, reranked = nearest_code(x, codes, metric=metric, mask=mask, return_certificate=True)
        assert torch.equal(found, torch.where(mask, nearest_code(x, codes, metric=metric), -1))
        # Every code twice: no row is certain.
        assert reranked == mask.sum()
        heads = torch.stack([codes, codes + 1])
        of_all = nearest_code(x[..., None, :].expand(6, 7, 2, 5), heads, metric=metric, mask=mask)
        assert torch.equal(of_all[..., 0], found) and (of_all[..., 1] == -1).eq(~mask).all()

    def test_fast_is_within_its_bound_and_proves_nothing(self, backend, metric):
        g = torch.Generator().manual_seed(0)
        x, codes = torch.randn(300, 64, generator=g), torch.randn(500, 64, generator=g)
        x[3] = torch.nan
        found, reranked = nearest_code(x, codes, metric=metric, precision="fast", return_certificate=True)
        assert found[3] == 0 and (reranked == 0 or backend == "reference")
        if metric == "cosine":
            codes = codes / codes.norm(dim=-1, keepdim=True)
        mean = codes.mean(0)
        x, codes = (x.double(), codes.double()) if metric != "l2" else ((x - mean).double(), (codes - mean).double())
        bound = 2.0**-8 * x.norm(dim=-1) * (codes - (0 if metric == "l2" else mean)).norm(dim=-1).max()
        score = x @ codes.T - (codes.square().sum(-1) / 2 if metric == "l2" else 0)
        lost = score.amax(-1) - score.gather(1, found[:, None])[:, 0]
        rows = torch.arange(300) != 3
        assert (lost[rows] <= 2 * bound[rows]).all()

    def test_prepared_codebook_gives_the_same(self, backend, metric):
        g = torch.Generator().manual_seed(0)
        for codes, x in (
            (torch.randn(70, 40, generator=g), torch.randn(3, 50, 40, generator=g)),
            (torch.randn(2, 9, 5, generator=g), torch.randn(20, 2, 5, generator=g)),
        ):
            ready = prepare(codes, metric=metric)
            for _ in range(2):
                assert torch.equal(nearest_code(x, ready, metric=metric), nearest_code(x, codes, metric=metric))
            got, want = quantize(x, ready, metric=metric), quantize(x, codes, metric=metric)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    def test_compiles_as_a_whole(self, metric):
        torch._dynamo.reset()
        codes, mask = torch.randn(2, 8, 3), torch.rand(5, 2) > 0.3
        ready = prepare(codes, metric=metric)

        @torch.compile(backend="aot_eager", fullgraph=True)
        def step(x):
            found, reranked = nearest_code(x, ready, metric=metric, mask=mask, return_certificate=True)
            return found, reranked, quantize(x, codes, metric=metric).loss

        x = torch.randn(5, 2, 3)
        found, _, loss = step(x)
        assert torch.equal(found, nearest_code(x, codes, metric=metric, mask=mask))
        torch.testing.assert_close(loss, quantize(x, codes, metric=metric).loss)
        # A graph reads the codebook, not what was packed of it.
        codes.neg_()
        assert torch.equal(step(x)[0], nearest_code(x, codes, metric=metric, mask=mask))

    @pytest.mark.slow
    def test_a_million_codes(self, metric):
        g = torch.Generator().manual_seed(0)
        x, codes = torch.randn(6, 4, generator=g), torch.randn(1 << 20, 4, generator=g)
        codes[-5:] = x[:5] * 1.5
        score = x.double() @ codes.double().T
        if metric == "l2":
            score -= codes.double().square().sum(-1) / 2
        elif metric == "cosine":
            score /= codes.double().norm(dim=-1)
        best, second = score.topk(2)[0].unbind(-1)
        assert (best - second > 1e-12 * best.abs()).all()
        assert torch.equal(nearest_code(x, codes, metric=metric), score.argmax(-1))


class TestPrepared:
    def test_a_change_of_the_codebook_is_found(self):
        codes = torch.nn.Parameter(torch.randn(9, 4))
        x, ready = torch.randn(5, 4), prepare(codes)
        with torch.no_grad():
            codes.add_(1)
        for function in (nearest_code, quantize):
            with pytest.raises(RuntimeError, match=r"codebook: changed since .*version 0 -> 1.*refresh"):
                function(x, ready)
        assert torch.equal(nearest_code(x, ready.refresh()), nearest_code(x, codes))
        with torch.inference_mode():
            assert torch.equal(nearest_code(x, ready), nearest_code(x, codes))
            codes.add_(1)
            with pytest.raises(RuntimeError, match="version 1 -> 2"):
                nearest_code(x, ready)
        ready.refresh()
        codes.data = torch.randn(7, 4)
        with pytest.raises(RuntimeError, match=r"address .*shape \(9, 4\) -> \(7, 4\)"):
            nearest_code(x, ready)

    def test_gradients_reach_the_codebook(self):
        codes = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
        x = torch.randn(20, 4, dtype=torch.float64)
        for metric in METRICS:
            ready = prepare(codes, metric=metric)
            (got,) = torch.autograd.grad(quantize(x, ready, metric=metric).loss, codes)
            (want,) = torch.autograd.grad(quantize(x, codes, metric=metric).loss, codes)
            torch.testing.assert_close(got, want)

    def test_packed_by_one_backend_used_by_another(self):
        codes, x = torch.randn(9, 40), torch.randn(30, 40)
        for made in BACKENDS:
            with vqfast.backend(made):
                ready = prepare(codes)
            for used in BACKENDS:
                with vqfast.backend(used):
                    assert torch.equal(nearest_code(x, ready), nearest_code(x, codes))

    def test_errors(self):
        with pytest.raises(ValueError, match="metric: expected one of l2, dot, cosine, got 'l1'"):
            prepare(torch.zeros(3, 2), metric="l1")
        with pytest.raises(ValueError, match=r"codebook: expected two dimensions .*shape \(3,\)"):
            prepare(torch.zeros(3))
        with torch.inference_mode():
            made = torch.zeros(3, 2)
        with pytest.raises(ValueError, match="codebook: .*inference_mode"):
            prepare(made)
        with pytest.raises(ValueError, match="codebook: expected one prepared for metric 'dot', got 'l2'"):
            nearest_code(torch.zeros(1, 2), prepare(torch.zeros(3, 2)), metric="dot")


class TestErrors:
    x, codes = torch.zeros(4, 3), torch.zeros(5, 3)

    @pytest.mark.parametrize(
        ("x", "codebook", "error", "words"),
        [
            (torch.zeros(()), codes, ValueError, r"x: expected at least one dimension .*shape \(\)"),
            (x, torch.zeros(5), ValueError, r"codebook: expected two dimensions \(K, D\).*shape \(5,\)"),
            (x, torch.zeros(5, 4), ValueError, r"codebook: expected D = 3 .*shape \(5, 4\)"),
            (x, torch.zeros(2, 5, 3), ValueError, r"x: expected \(..., H, D\) = \(..., 2, 3\) .*shape \(4, 3\)"),
            (x, torch.zeros(0, 3), ValueError, r"codebook: expected at least one code.*shape \(0, 3\)"),
            (x.int(), codes, TypeError, r"x: expected a float64, float32, .*int32"),
            ([1.0], codes, TypeError, r"x: expected .*list"),
            (x, codes.bool(), TypeError, r"codebook: expected .*bool"),
            (x.half(), codes, TypeError, r"codebook: expected the dtype of x, torch.float16, got float32"),
            (x, codes.to("meta"), ValueError, r"codebook: expected the device of x, cpu, got .*meta"),
        ],
    )  # fmt: skip
    def test_search_names_the_argument(self, x, codebook, error, words):
        for function in (nearest_code, quantize):
            with pytest.raises(error, match=words):
                function(x, codebook)

    def test_metric_and_precision(self):
        for function in (nearest_code, quantize):
            with pytest.raises(ValueError, match="metric: expected one of l2, dot, cosine, got 'l1'"):
                function(self.x, self.codes, metric="l1")
            with pytest.raises(ValueError, match="precision: expected one of exact, fast, got 'half'"):
                function(self.x, self.codes, precision="half")
        with pytest.raises(TypeError, match="mask: expected a bool tensor"):
            nearest_code(self.x, self.codes, mask=torch.ones(4))
