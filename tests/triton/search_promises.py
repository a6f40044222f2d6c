"""Promises of the search and of the statistics of its codes, for the interpreter."""

import torch
from torch import Tensor

from tests.triton.interpreter_cases import generator, promise
from vqfast import ops


def _assert_nearest(x: Tensor, codebook: Tensor) -> None:
    from vqfast.kernels.nearest.reference import nearest

    got, want = ops.nearest_code(x, codebook), nearest(x, codebook)
    assert torch.equal(got, want), f"{int((got != want).sum())} of {want.numel()} differ"


@promise("search")
def ties_go_to_the_lowest_index() -> None:
    codebook = torch.randn(6, 5, generator=generator()).repeat(20, 1)
    x = codebook[:40] + 0.01 * torch.randn(40, 5, generator=generator(1))
    assert int(ops.nearest_code(x, codebook).max()) < 6
    _assert_nearest(x, codebook)


@promise("search")
def near_ties_are_decided_exactly() -> None:
    """Pairs of codes one rounding apart, far from the origin: float32 scores cannot tell them apart."""
    first = torch.randn(40, 24, generator=generator()) + 300.0
    codebook = torch.cat([first, first * (1 + 2.0**-23)])
    x = first[torch.randint(40, (128,), generator=generator(1))]
    _assert_nearest(x + 0.1 * torch.randn(x.shape, generator=generator(2)), codebook)


@promise("search")
def gaussian_rows_are_decided_by_the_first_pass() -> None:
    from vqfast.kernels.nearest.reference import nearest
    from vqfast.kernels.nearest.triton import search

    x, codebook = torch.randn(256, 64, generator=generator()), torch.randn(512, 64, generator=generator(1))
    for offset in (0.0, 1000.0):
        index, _ = search((x + offset)[None], codebook + offset)
        decided = index >= 0
        assert float(decided.double().mean()) > 0.98, f"offset {offset}: {int(decided.sum())} of 256"
        assert torch.equal(index[decided], nearest(x + offset, codebook + offset)[decided])


@promise("search")
def the_bound_covers_the_error_of_float32_scores() -> None:
    """The certificate's bound against scores of the same rounding steps, on data chosen to cancel."""
    from vqfast.kernels.nearest.triton import _bound

    for D in (1, 7, 64, 700):
        z = torch.randn(64, D, generator=generator(D), dtype=torch.float64) * 3 + 1
        y = torch.randn(64, D, generator=generator(D + 1), dtype=torch.float64)
        y -= (y * z).sum(1, keepdim=True) / z.square().sum(1, keepdim=True) * z
        true = (y[:, None] * z).sum(-1) - z.square().sum(-1) / 2
        half_norm = (z.square().sum(-1) / 2).float()
        score = (y.float()[:, None] * z.float()).cumsum(-1)[..., -1] - half_norm
        product, square, _ = _bound(D)
        radius = float(z.norm(dim=1).max())
        bound = product * y.norm(dim=1) * radius + square * radius**2
        error = (score.double() - true).abs().max(1).values
        assert bool((error < bound).all())


def _far_codebooks(D: int) -> dict[str, tuple[Tensor, Tensor]]:
    """By metric, a codebook far from the origin and rows: codes of products have an offset, those of cosines a cone."""
    x, codebook = torch.randn(40, D, generator=generator()), torch.randn(100, D, generator=generator(1))
    axis = torch.randn(D, generator=generator(2))
    return {"dot": (x, codebook + 1e4 * axis), "cosine": (x, 1e-4 * codebook + axis)}


@promise("search")
def codes_far_from_the_origin_are_told_apart_by_the_first_pass() -> None:
    """Of products and cosines as of distances; and half of the codes that are not finite move no centre."""
    from vqfast.kernels.nearest.reference import nearest
    from vqfast.kernels.nearest.triton import search

    for metric, (x, codebook) in _far_codebooks(24).items():
        broken = codebook.clone()
        broken[:16, 3], broken[16:32], broken[32:50, 0] = torch.inf, torch.nan, -torch.inf
        for codes in (codebook, broken, codebook.double(), broken.double()):
            rows = x.to(codes.dtype)
            index, _ = search(rows[None], codes, metric)
            decided = index >= 0
            assert int((~decided).sum()) <= 2, f"{metric}, {codes.dtype}: {int(decided.sum())} of 40"
            assert torch.equal(index[decided], nearest(rows, codes, metric=metric)[decided])


@promise("search")
def far_codes_that_tie_or_leave_a_range_are_found_exactly() -> None:
    from vqfast.kernels.nearest.reference import nearest

    for metric, (x, codebook) in _far_codebooks(6).items():
        rows, codes = x[:4].clone(), codebook[:16].repeat(2, 1)
        codes[17::2, 4] = torch.nextafter(codes[17::2, 4], torch.tensor(torch.inf))
        codes[7], codes[9, 1], rows[3] = 0, torch.inf, 0
        cases = [(rows.to(dtype), codes.to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        cases += [(rows * scale, codes * scale) for scale in (1e-20, 1e18)]
        cases += [(rows, codes[:1]), (rows[:, :1], codes[:, :1])]
        # Deviations of 1e-250 from codes at 1e20; a code that no sample meets, far beyond the others; norms whose
        # inverse is no normal number.
        tiny = torch.cat([codes.double() * 1e-250, torch.full((32, 1), 1e20)], 1)
        large = codebook[:40].double()
        large[1] *= 1e300
        cases += [(torch.nn.functional.pad(rows.double(), (0, 1)), tiny), (rows.double(), large)]
        cases += [(rows.double(), codes.double() * scale) for scale in (1e-320, 1e303)]
        for number, case in enumerate(cases):
            got = ops.nearest_code(*case, metric=metric)
            assert torch.equal(got, nearest(*case, metric=metric)), f"{metric}, case {number}"


@promise("search")
def prepared_codes_are_off_by_less_than_the_bound_takes_them_to_be() -> None:
    """Against 64 bits of precision, also where centring leaves little of them. What lies beyond K and D is nothing."""
    import numpy as np

    from vqfast.kernels.nearest.triton import prepare

    for D in (1, 7, 64):
        noise = torch.randn(70, D, generator=generator(D), dtype=torch.float64)
        for width in (10.0, 1e-7, 1e-12):
            codebook = width * noise + torch.linspace(0.5, 2, D, dtype=torch.float64)
            for metric in ("dot", "cosine"):
                mean, facts, codes, half_norm = prepare(codebook, metric)
                wide = codebook.numpy().astype(np.longdouble)
                if metric == "cosine":
                    wide /= np.sqrt((wide * wide).sum(1, keepdims=True))
                scale = float(facts[0])
                true = (wide - mean.numpy()) * scale
                error = np.sqrt(((codes[:70, :D].numpy() - true) ** 2).sum(1)).astype(np.float64)
                units = scale * (D + 8) * 2.0**-53 if metric == "cosine" else 0.0
                norm = half_norm[:70].double().mul(2).sqrt().numpy()
                assert (error <= units + norm * 2.0**-24 * 1.0001 + 1e-40).all(), (D, width, metric)
                assert not codes[70:].any() and not codes[:, D:].any() and bool((half_norm[70:] == torch.inf).all())


@promise("search")
def a_row_that_is_not_a_number_gets_index_0() -> None:
    codebook = torch.randn(70, 9, generator=generator())
    x = torch.randn(5, 9, generator=generator(1))
    x[1, 3], x[2, 0], x[3, 8] = torch.nan, torch.inf, -torch.inf
    assert ops.nearest_code(x, codebook)[1:4].tolist() == [0, 0, 0]
    _assert_nearest(x, codebook)


@promise("search")
def a_code_that_is_not_a_number_is_never_chosen() -> None:
    codebook = torch.randn(70, 9, generator=generator())
    codebook[::2, 4], codebook[1, 0], codebook[3, 1] = torch.nan, torch.inf, -torch.inf
    x = torch.randn(90, 9, generator=generator(1))
    chosen = ops.nearest_code(x, codebook)
    assert bool((chosen % 2 == 1).all()) and not bool(((chosen == 1) | (chosen == 3)).any())
    _assert_nearest(x, codebook)
    assert ops.nearest_code(x[:2], torch.full_like(codebook, torch.nan)).tolist() == [0, 0]


@promise("search")
def sizes_that_float32_cannot_square_are_searched_exactly() -> None:
    x, codebook = torch.randn(20, 6, generator=generator()), torch.randn(80, 6, generator=generator(1))
    for scale in (1e-40, 1e-25, 1e18, 1e30, 1e38):
        _assert_nearest(x * scale, codebook * scale)
    _assert_nearest(x.double() * 1e150, codebook.double() * 1e150)
    codebook[5] = 1e30
    _assert_nearest(x, codebook)


@promise("search")
def every_metric_is_exact_where_scores_tie_or_leave_float32() -> None:
    from vqfast.kernels.nearest.reference import nearest

    x, codebook = torch.randn(12, 6, generator=generator()), torch.randn(20, 6, generator=generator(1)).repeat(3, 1)
    codebook[20:40] *= 2
    codebook[45], codebook[0, 1], codebook[1, 2] = 0, torch.nan, torch.inf
    x[3], x[4, 2], x[5, 0] = 0, torch.nan, -torch.inf
    for metric in ("l2", "dot", "cosine"):
        for scale in (1.0, 1e-30, 1e30):
            got = ops.nearest_code(x * scale, codebook * scale, metric=metric)
            assert torch.equal(got, nearest(x * scale, codebook * scale, metric=metric)), f"{metric}, {scale}"


@promise("search")
def heads_masks_and_scores_alone_in_every_metric() -> None:
    from vqfast.kernels.nearest.reference import nearest

    x, codebook = torch.randn(9, 2, 6, generator=generator()), torch.randn(2, 15, 6, generator=generator(1))
    mask = torch.rand(9, 2, generator=generator(2)) > 0.4
    for metric in ("l2", "dot", "cosine"):
        want = nearest(x, codebook, mask, metric)
        doubled = codebook.repeat(1, 2, 1)
        got, reranked = ops.nearest_code(x, doubled, mask=mask, metric=metric, return_certificate=True)
        assert torch.equal(got, want) and int(reranked) == int(mask.sum())
        fast = ops.nearest_code(x, doubled, mask=mask, metric=metric, precision="fast")
        assert torch.equal(torch.where(mask, fast % 15, -1), want)


@promise("search")
def strides_are_read_in_place() -> None:
    codebook = torch.randn(7, 50, generator=generator()).T
    for x in (
        torch.randn(2, 7, 4, 5, generator=generator(1)).permute(0, 2, 3, 1),
        torch.randn(7, 60, generator=generator(2)).T,
        torch.randn(40, 14, generator=generator(3))[::2, ::2],
        torch.randn(3, 1, 7, generator=generator(4)).expand(3, 5, 7),
        torch.randn(2, 3, 4, 5, 7, generator=generator(5))[:, ::2, :, ::2],
    ):
        _assert_nearest(x, codebook)
        indices = torch.randint(-1, 50, x.shape[:-1], generator=generator(6))
        quantized, error, counts = torch.ops.vqfast.lookup(x, codebook, indices)
        copied = torch.ops.vqfast.lookup(x.contiguous(), codebook.contiguous(), indices)
        assert torch.equal(quantized, copied[0]) and torch.equal(error, copied[1])
        assert torch.equal(counts, copied[2])
        grad = torch.randn(x.shape[::-1], generator=generator(7)).permute(*range(x.ndim - 1, -1, -1))
        assert torch.equal(
            torch.ops.vqfast.lookup_backward(grad, error, x, codebook, indices),
            torch.ops.vqfast.lookup_backward(grad.contiguous(), error, x.contiguous(), codebook, indices),
        )


@promise("search")
def many_features_are_summed_in_blocks() -> None:
    _assert_nearest(torch.randn(3, 4096, generator=generator()), torch.randn(9, 4096, generator=generator(1)))


@promise("search")
def a_masked_position_looks_at_no_code() -> None:
    codebook = torch.full((3, 5), torch.nan)
    indices = torch.full((4,), -1)
    quantized, error, counts = torch.ops.vqfast.lookup(torch.ones(4, 5), codebook, indices)
    assert int(quantized.count_nonzero() + error.count_nonzero() + counts.sum()) == 0
    grad = torch.ops.vqfast.lookup_backward(torch.ones(4, 5), torch.ones(4), torch.ones(4, 5), codebook, indices)
    assert int(grad.count_nonzero()) == 0


@promise("search")
def quantize_has_the_gradients_of_the_reference() -> None:
    results = []
    for backend in ("triton", "reference"):
        x = torch.randn(2, 30, 6, generator=generator()).requires_grad_()
        codebook = torch.randn(8, 6, generator=generator(1)).requires_grad_()
        with ops.backend(backend):
            quantized, indices, loss, counts = ops.quantize(x, codebook)
            (loss + quantized.square().sum()).backward()
        results.append((quantized, indices, loss, counts, x.grad, codebook.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@promise("statistics")
def few_codes_of_many_rows_are_added_in_slices() -> None:
    from vqfast.kernels.codebook_stats.spec import check

    x = torch.randn(2000, 20, generator=generator())
    # Half of all rows on one code, one code on none.
    indices = torch.randint(-4, 4, (2000,), generator=generator(1)).clamp(min=0) * 2
    args = (x, indices, torch.rand(2000, generator=generator(2)), 7)
    first, second = torch.ops.vqfast.codebook_stats(*args), torch.ops.vqfast.codebook_stats(*args)
    check(first, args)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@promise("statistics")
def masked_rows_add_nothing_whatever_they_hold() -> None:
    x = torch.randn(2, 6, 5, generator=generator()).transpose(1, 2)
    x[0, 2], x[1, 4] = torch.nan, torch.inf
    indices = torch.tensor([[0, 1, -1, 1, 3], [3, 3, 0, 0, -1]])
    counts, sums = ops.codebook_stats(x, indices, 4)
    assert counts.tolist() == [3.0, 2.0, 0.0, 3.0] and bool(sums.isfinite().all())
    torch.testing.assert_close(sums[1], x[0, 1] + x[0, 3])
