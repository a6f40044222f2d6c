"""Every Triton kernel, run by Triton's interpreter on CPU tensors.

Triton reads TRITON_INTERPRET where a kernel is defined, so no case can run in this process: each group of cases runs
in a process of its own (`python test_interpreter.py GROUP OUTCOMES.json`), and the tests read what became of them.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the process that interprets

from vqfast import ops
from vqfast.kernels.specs import SPECS
from vqfast.ops.backends.triton import KERNELS

pytest.importorskip("triton")

CASES: dict[str, dict[str, Callable[[], None]]] = {
    "search": {},
    "statistics": {},
    "diffusion": {},
    "sampling": {},
    "matrices": {},
    "packing": {},
}
_GROUP = {
    "nearest": "search",
    "lookup": "search",
    "lookup_backward": "search",
    "codebook_stats": "statistics",
    "q_sample": "diffusion",
    "diffusion_loss": "diffusion",
    "p_sample": "sampling",
    "matrix_loss": "matrices",
    "matrix_sample": "matrices",
    "pack": "packing",
    "unpack": "packing",
    "unpack_backward": "packing",
    "position_mask": "packing",
    "grain_entropy": "packing",
}


def _agrees_with_the_reference(spec, dtype: torch.dtype, shape: dict) -> None:
    args = spec.inputs(shape, dtype, "cpu", 0)
    spec.check(getattr(torch.ops.vqfast, spec.op)(*args), args)


def _programs(op: str, shape: dict) -> int:
    """Roughly how many programs the op launches: each costs the interpreter milliseconds."""
    if op == "codebook_stats":
        return shape["K"] * (4 if shape["K"] < 1024 and shape["N"] > 1000 else 1)
    if _GROUP[op] == "packing":
        return 100 if shape["B"] * shape.get("H", 1) * shape.get("rows", 1) > 1 else 1
    return {"nearest": 1, "lookup": 1 / 8, "lookup_backward": 1 / 8}.get(op, 0) * shape.get("N", 0)


# A program a token, or a row that its scores leave open, many of the interpreter's calls each: of this many, in float32
# and in other dtypes.
_TOKENS = {
    "diffusion_loss": (12, 4), "p_sample": (16, 4), "nearest": (12, 6), "matrix_loss": (36, 6), "matrix_sample": (36, 6)
}  # fmt: skip


def _smaller(op: str, dtype: torch.dtype, shape: dict) -> dict:
    """The shape, with fewer programs where each does the same."""
    if op in ("pack", "unpack", "unpack_backward"):
        return dict(shape) | {"B": min(shape["B"], 2)}
    if op not in _TOKENS or shape.get("B") == 0:
        return dict(shape)
    most = _TOKENS[op][dtype != torch.float32]
    if op == "nearest":
        # Distances leave few rows open.
        return dict(shape) | ({"N": min(shape["N"], most)} if "metric" in shape else {})
    return dict(shape) | {"L": min(shape["L"], max(most // shape["B"], 1))}


def _first_dtype(dtypes: tuple[torch.dtype, ...], shape: dict) -> torch.dtype:
    """Codes, which have no features, are int64; what has features is float32."""
    return torch.int64 if torch.int64 in dtypes and "D" not in shape else torch.float32


for _spec in (spec for spec in SPECS if spec.op in _GROUP):
    for _dtype in _spec.dtypes:
        for _shape in _spec.test_shapes:
            # A launch of many programs differs from one of few in its number only: one dtype will do.
            if _dtype == _first_dtype(_spec.dtypes, _shape) or _programs(_spec.op, _shape) < 100:
                _text = ",".join(f"{key}={value}" for key, value in _shape.items())
                _name = f"{_spec.op}-{str(_dtype).removeprefix('torch.')}-{_text}"
                _few = _smaller(_spec.op, _dtype, _shape)
                CASES[_GROUP[_spec.op]][_name] = partial(_agrees_with_the_reference, _spec, _dtype, _few)


def promise(group: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(case: Callable[[], None]) -> Callable[[], None]:
        CASES[group][case.__name__] = case
        return case

    return add


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _assert_nearest(x: Tensor, codebook: Tensor) -> None:
    from vqfast.kernels.nearest.reference import nearest

    got, want = ops.nearest_code(x, codebook), nearest(x, codebook)
    assert torch.equal(got, want), f"{int((got != want).sum())} of {want.numel()} differ"


@promise("search")
def ties_go_to_the_lowest_index() -> None:
    codebook = torch.randn(6, 5, generator=_generator()).repeat(20, 1)
    x = codebook[:40] + 0.01 * torch.randn(40, 5, generator=_generator(1))
    assert int(ops.nearest_code(x, codebook).max()) < 6
    _assert_nearest(x, codebook)


@promise("search")
def near_ties_are_decided_exactly() -> None:
    """Pairs of codes one rounding apart, far from the origin: float32 scores cannot tell them apart."""
    first = torch.randn(40, 24, generator=_generator()) + 300.0
    codebook = torch.cat([first, first * (1 + 2.0**-23)])
    x = first[torch.randint(40, (128,), generator=_generator(1))]
    _assert_nearest(x + 0.1 * torch.randn(x.shape, generator=_generator(2)), codebook)


@promise("search")
def gaussian_rows_are_decided_by_the_first_pass() -> None:
    from vqfast.kernels.nearest.reference import nearest
    from vqfast.kernels.nearest.triton import search

    x, codebook = torch.randn(256, 64, generator=_generator()), torch.randn(512, 64, generator=_generator(1))
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
        z = torch.randn(64, D, generator=_generator(D), dtype=torch.float64) * 3 + 1
        y = torch.randn(64, D, generator=_generator(D + 1), dtype=torch.float64)
        y -= (y * z).sum(1, keepdim=True) / z.square().sum(1, keepdim=True) * z
        true = (y[:, None] * z).sum(-1) - z.square().sum(-1) / 2
        half_norm = (z.square().sum(-1) / 2).float()
        score = (y.float()[:, None] * z.float()).cumsum(-1)[..., -1] - half_norm
        product, square = _bound(D)
        radius = float(z.norm(dim=1).max())
        bound = product * y.norm(dim=1) * radius + square * radius**2
        error = (score.double() - true).abs().max(1).values
        assert bool((error < bound).all())


@promise("search")
def a_row_that_is_not_a_number_gets_index_0() -> None:
    codebook = torch.randn(70, 9, generator=_generator())
    x = torch.randn(5, 9, generator=_generator(1))
    x[1, 3], x[2, 0], x[3, 8] = torch.nan, torch.inf, -torch.inf
    assert ops.nearest_code(x, codebook)[1:4].tolist() == [0, 0, 0]
    _assert_nearest(x, codebook)


@promise("search")
def a_code_that_is_not_a_number_is_never_chosen() -> None:
    codebook = torch.randn(70, 9, generator=_generator())
    codebook[::2, 4], codebook[1, 0], codebook[3, 1] = torch.nan, torch.inf, -torch.inf
    x = torch.randn(90, 9, generator=_generator(1))
    chosen = ops.nearest_code(x, codebook)
    assert bool((chosen % 2 == 1).all()) and not bool(((chosen == 1) | (chosen == 3)).any())
    _assert_nearest(x, codebook)
    assert ops.nearest_code(x[:2], torch.full_like(codebook, torch.nan)).tolist() == [0, 0]


@promise("search")
def sizes_that_float32_cannot_square_are_searched_exactly() -> None:
    x, codebook = torch.randn(20, 6, generator=_generator()), torch.randn(80, 6, generator=_generator(1))
    for scale in (1e-40, 1e-25, 1e18, 1e30, 1e38):
        _assert_nearest(x * scale, codebook * scale)
    _assert_nearest(x.double() * 1e150, codebook.double() * 1e150)
    codebook[5] = 1e30
    _assert_nearest(x, codebook)


@promise("search")
def every_metric_is_exact_where_scores_tie_or_leave_float32() -> None:
    from vqfast.kernels.nearest.reference import nearest

    x, codebook = torch.randn(12, 6, generator=_generator()), torch.randn(20, 6, generator=_generator(1)).repeat(3, 1)
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

    x, codebook = torch.randn(9, 2, 6, generator=_generator()), torch.randn(2, 15, 6, generator=_generator(1))
    mask = torch.rand(9, 2, generator=_generator(2)) > 0.4
    for metric in ("l2", "dot", "cosine"):
        want = nearest(x, codebook, mask, metric)
        doubled = codebook.repeat(1, 2, 1)
        got, reranked = ops.nearest_code(x, doubled, mask=mask, metric=metric, return_certificate=True)
        assert torch.equal(got, want) and int(reranked) == int(mask.sum())
        fast = ops.nearest_code(x, doubled, mask=mask, metric=metric, precision="fast")
        assert torch.equal(torch.where(mask, fast % 15, -1), want)


@promise("search")
def strides_are_read_in_place() -> None:
    codebook = torch.randn(7, 50, generator=_generator()).T
    for x in (
        torch.randn(2, 7, 4, 5, generator=_generator(1)).permute(0, 2, 3, 1),
        torch.randn(7, 60, generator=_generator(2)).T,
        torch.randn(40, 14, generator=_generator(3))[::2, ::2],
        torch.randn(3, 1, 7, generator=_generator(4)).expand(3, 5, 7),
        torch.randn(2, 3, 4, 5, 7, generator=_generator(5))[:, ::2, :, ::2],
    ):
        _assert_nearest(x, codebook)
        indices = torch.randint(-1, 50, x.shape[:-1], generator=_generator(6))
        quantized, error, counts = torch.ops.vqfast.lookup(x, codebook, indices)
        copied = torch.ops.vqfast.lookup(x.contiguous(), codebook.contiguous(), indices)
        assert torch.equal(quantized, copied[0]) and torch.equal(error, copied[1])
        assert torch.equal(counts, copied[2])
        grad = torch.randn(x.shape[::-1], generator=_generator(7)).permute(*range(x.ndim - 1, -1, -1))
        assert torch.equal(
            torch.ops.vqfast.lookup_backward(grad, error, x, codebook, indices),
            torch.ops.vqfast.lookup_backward(grad.contiguous(), error, x.contiguous(), codebook, indices),
        )


@promise("search")
def many_features_are_summed_in_blocks() -> None:
    _assert_nearest(torch.randn(3, 4096, generator=_generator()), torch.randn(9, 4096, generator=_generator(1)))


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
        x = torch.randn(2, 30, 6, generator=_generator()).requires_grad_()
        codebook = torch.randn(8, 6, generator=_generator(1)).requires_grad_()
        with ops.backend(backend):
            quantized, indices, loss, counts = ops.quantize(x, codebook)
            (loss + quantized.square().sum()).backward()
        results.append((quantized, indices, loss, counts, x.grad, codebook.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@promise("statistics")
def few_codes_of_many_rows_are_added_in_slices() -> None:
    from vqfast.kernels.codebook_stats.spec import check

    x = torch.randn(2000, 20, generator=_generator())
    # Half of all rows on one code, one code on none.
    indices = torch.randint(-4, 4, (2000,), generator=_generator(1)).clamp(min=0) * 2
    args = (x, indices, torch.rand(2000, generator=_generator(2)), 7)
    first, second = torch.ops.vqfast.codebook_stats(*args), torch.ops.vqfast.codebook_stats(*args)
    check(first, args)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@promise("statistics")
def masked_rows_add_nothing_whatever_they_hold() -> None:
    x = torch.randn(2, 6, 5, generator=_generator()).transpose(1, 2)
    x[0, 2], x[1, 4] = torch.nan, torch.inf
    indices = torch.tensor([[0, 1, -1, 1, 3], [3, 3, 0, 0, -1]])
    counts, sums = ops.codebook_stats(x, indices, 4)
    assert counts.tolist() == [3.0, 2.0, 0.0, 3.0] and bool(sums.isfinite().all())
    torch.testing.assert_close(sums[1], x[0, 1] + x[0, 3])


def _step(K: int, L: int = 6) -> tuple[Tensor, tuple]:
    """logits, and x_t, t, s, levels, noise of two samples, t = 3 of 5 and t = 1, uniform noise."""
    logits = torch.randn(2, L, K, generator=_generator())
    x_t = torch.randint(K, (2, L), generator=_generator(1))
    alpha_bar = torch.tensor([1.0, 0.95, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64)
    return logits, (x_t, torch.tensor([3, 1]), torch.tensor([1, 0]), alpha_bar[:, None], None)


_KEY = torch.tensor([0x0123456789ABCDEF, 0x7EDCBA9876543210])


def _draw(
    logits: Tensor, step: tuple, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, tuple]:
    """x_s, and the arguments of the op that drew it: no guidance, no known tokens, the joint rule."""
    args = (logits, None, *step, None, False, temperature, 1.0, top_k, top_p, _KEY)
    return torch.ops.vqfast.p_sample(*args), args


def _loss(
    logits: Tensor,
    x0: Tensor,
    step: tuple,
    scale: Tensor | None = None,
    aux_weight: float = 0.0,
    with_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    scale = torch.ones(x0.shape, dtype=torch.float64) if scale is None else scale
    return torch.ops.vqfast.diffusion_loss(logits, x0, *step, scale, False, aux_weight, with_grad)


@promise("sampling")
def p_sample_keeps_x_t_where_the_logits_are_not_numbers() -> None:
    logits, step = _step(40)
    x_t = step[0]
    logits[0] = torch.nan
    logits[1, 0, 3], logits[1, 1, 5] = torch.nan, torch.inf
    logits[1, 2] = -torch.inf
    for top_k, top_p in ((0, 1.0), (3, 0.9)):
        x_s, _ = _draw(logits, step, top_k=top_k, top_p=top_p)
        assert torch.equal(x_s[0], x_t[0]) and torch.equal(x_s[1, :3], x_t[1, :3])


@promise("sampling")
def p_sample_at_level_0_draws_codes_that_have_a_probability() -> None:
    for K in (37, 5000):
        logits, (x_t, t, s, *tables) = _step(K)
        allowed = torch.zeros(K, dtype=torch.bool)
        allowed[K // 2 :: 3] = True
        logits[..., ~allowed] = -torch.inf
        x_t[:] = K // 2
        x_s, _ = _draw(logits, (x_t, t, s * 0, *tables))
        assert bool(allowed[x_s].all())


@promise("sampling")
def p_sample_takes_any_temperature() -> None:
    from vqfast.kernels.p_sample.spec import check

    logits, step = _step(33)
    for temperature in (1e-300, 1e-3, 1e6, 1e300):
        for dtype in (torch.float64, torch.float32):
            check(*_draw(logits.to(dtype), step, temperature=temperature))


@promise("sampling")
def of_equal_codes_the_lowest_are_kept() -> None:
    """Also where rows are read in blocks."""
    from vqfast.kernels.p_sample import reference, triton

    levels = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    step = (torch.full((1, 8), 63), torch.tensor([1]), torch.tensor([0]), levels, None)
    limit, block = triton._ONE_BLOCK, triton._BLOCK
    try:
        for triton._ONE_BLOCK, triton._BLOCK in ((limit, block), (0, 32)):
            for top_k, top_p, most in ((3, 1.0, 3), (8, 0.5, 4)):
                x_s, args = _draw(torch.zeros(1, 8, 64), step, top_k=top_k, top_p=top_p)
                assert torch.equal(x_s, reference.p_sample(*args)) and int(x_s.max()) < most
    finally:
        triton._ONE_BLOCK, triton._BLOCK = limit, block


@promise("sampling")
def logits_that_are_not_needed_are_not_read() -> None:
    """Tokens of absorbing diffusion that are not masked, and tokens of the loss that do not count."""
    levels = torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.2, 0.8]], dtype=torch.float64)
    x_t = torch.tensor([[3, 8, 1, 8]])
    logits = torch.randn(1, 4, 8, generator=_generator())
    logits[:, [0, 2]] = torch.nan
    step = (x_t, torch.tensor([2]), torch.tensor([1]), levels, None)
    x_s, _ = _draw(logits, step)
    assert x_s[0, [0, 2]].tolist() == [3, 1]
    logits[:, 1] = torch.nan
    scale = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    loss, grad = _loss(logits, x_t.clamp(max=7), step, scale)
    assert bool(grad.isfinite().all()) and not loss[:, :3].any() and not grad[:, :3].any() and float(loss[0, 3]) > 0


@promise("diffusion")
def logits_of_any_strides_give_the_same() -> None:
    logits, step = _step(50)
    x0 = torch.randint(50, step[0].shape, generator=_generator(3))
    channel_first = logits.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([logits, logits], dim=-1)[..., :50]
    scale = torch.tensor([[0.5], [2.0]], dtype=torch.float64).expand(2, 6)
    want = _loss(logits, x0, step, scale, 0.1)
    options = (None, False, 1.0, 1.5, 0, 1.0, _KEY)
    drawn = torch.ops.vqfast.p_sample(logits, logits * 0.5, *step, *options)
    for strided in (channel_first, wide):
        assert not strided.is_contiguous()
        got = _loss(strided, x0, step, scale, 0.1)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        for pair in ((strided, logits * 0.5), (logits, strided * 0.5)):
            assert torch.equal(torch.ops.vqfast.p_sample(*pair, *step, *options), drawn)


@promise("diffusion")
def a_loss_in_blocks_equals_a_loss_in_registers() -> None:
    from vqfast.kernels.diffusion_loss import triton

    logits, step = _step(700)
    x_t = step[0]
    logits[0, 0, :600] = -torch.inf
    logits[0, 1] = -torch.inf
    x0 = torch.randint(700, x_t.shape, generator=_generator(3))
    x0[0, 2], x0[0, 0] = x_t[0, 2], 650
    want = _loss(logits.double(), x0, step, None, 0.1)
    limit, block = triton._ONE_BLOCK, triton._BLOCK
    triton._ONE_BLOCK, triton._BLOCK = 0, 512
    try:
        got = _loss(logits.double(), x0, step, None, 0.1)
    finally:
        triton._ONE_BLOCK, triton._BLOCK = limit, block
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, equal_nan=True)
    assert bool(got[0][0, 1].isnan()) and int(got[0].isnan().sum()) == 1


@promise("diffusion")
def a_small_loss_has_as_many_digits_as_a_large_one() -> None:
    from vqfast.kernels.diffusion_loss.reference import diffusion_loss
    from vqfast.kernels.diffusion_loss.spec import noised

    for family in ("uniform", "mask_and_replace", "marginal"):
        x0, *step = noised(dict(B=4, L=4, K=40, T=1000, family=family), "cpu", 5)
        logits = torch.randn(4, 4, 40, generator=_generator(6)) * 2
        logits.scatter_add_(2, x0[..., None], torch.full((4, 4, 1), 12.0))
        loss, _ = _loss(logits, x0, step)
        want = diffusion_loss(logits.double(), x0, *step, False, 0.0)
        assert bool(((loss - want).abs() <= 1e-5 * want + 1e-13).all()), family


@promise("diffusion")
def a_code_without_probability_costs_infinitely_much_and_no_more() -> None:
    logits, step = _step(9)
    x0 = (step[0] + 1) % 9
    logits.scatter_(-1, x0[..., None], -torch.inf)
    loss, grad = _loss(logits, x0, step)
    assert bool(loss[0].isfinite().all()) and bool((loss[1] == torch.inf).all())
    assert bool(grad.isfinite().all())


@promise("diffusion")
def a_step_without_noise_costs_nothing() -> None:
    logits, (x_t, *_) = _step(9)
    alpha_bar = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.1, 0.0], dtype=torch.float64)
    step = (x_t, torch.tensor([3, 1]), torch.tensor([2, 0]), alpha_bar[:, None], None)
    for loss_or_grad in _loss(logits, x_t, step):
        assert int(loss_or_grad.count_nonzero()) == 0


@promise("diffusion")
def a_loss_without_gradient_writes_none() -> None:
    logits, step = _step(9)
    loss, grad = _loss(logits, step[0], step, with_grad=False)
    assert grad.shape == (0,)
    assert torch.equal(loss, _loss(logits, step[0], step)[0])


@promise("diffusion")
def rows_are_scaled_in_place() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for rows in (torch.randn(3, 4, 70, generator=_generator()), torch.randn(3, 70, 4).transpose(1, 2)):
            rows = rows.to(dtype)
            scale = torch.tensor([1.0, 0.3, -2.0]).repeat(4).reshape(3, 4)
            want = (rows * scale[..., None]).to(dtype)
            torch.ops.vqfast.scale_rows_(rows, scale)
            # The interpreter cuts off the bits that bfloat16 lacks, where a device rounds.
            slack = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
            torch.testing.assert_close(rows, want, rtol=slack, atol=0)
            assert torch.equal(rows[scale == 1], want[scale == 1])
    torch.ops.vqfast.scale_rows_(torch.empty(0, 4, 70), torch.empty(0, 4))


@promise("diffusion")
def diffusion_loss_has_the_gradient_of_autograd() -> None:
    logits, (x_t, t, s, levels, _) = _step(20)
    x0 = torch.randint(20, x_t.shape, generator=_generator(3))
    logits = logits.double().requires_grad_()
    transition = ops.Uniform(20, levels[:, 0])
    weights = torch.tensor([0.5, 3.0])

    def loss(backend: str) -> tuple[Tensor, Tensor]:
        with ops.backend(backend):
            value = ops.diffusion_loss(logits, x0, x_t, t, transition, s=s, aux_weight=0.2, weights=weights)
            return value, torch.autograd.grad(3 * value, logits)[0]

    for got, want in zip(loss("triton"), loss("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str | None]]:
    """Case -> None or its traceback, for a group of cases; run once, by the first worker that asks."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent / f"interpreter-{run}" if run else folder
    folder.mkdir(exist_ok=True)

    def read(group: str) -> dict[str, str | None]:
        report = folder / f"{group}.json"
        with FileLock(f"{report}.lock"):
            if not report.exists():
                interpret = {"TRITON_INTERPRET": "1", "VQFAST_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
                subprocess.run([sys.executable, __file__, group, str(report)], env=os.environ | interpret, check=True)
        return json.loads(report.read_text())

    return read


def test_every_op_with_a_triton_kernel_is_interpreted() -> None:
    missing = {spec.op for spec in SPECS} & KERNELS.keys() - _GROUP.keys()
    assert not missing, f"_GROUP has no group of {', '.join(sorted(missing))}"


@pytest.mark.parametrize(("group", "case"), [(group, case) for group, cases in CASES.items() for case in cases])
def test_interpreted(group: str, case: str, outcomes: Callable[[str], dict[str, str | None]]) -> None:
    import numpy
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 7) and tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
        pytest.skip(f"the interpreter of triton {triton.__version__} needs numpy below 2.4")
    trace = outcomes(group)[case]
    assert trace is None, trace


def _run(case: Callable[[], None]) -> str | None:
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Written whole or not at all: a report that exists is complete.
    results = {name: _run(case) for name, case in CASES[sys.argv[1]].items()}
    Path(sys.argv[2]).write_text(json.dumps(results))
