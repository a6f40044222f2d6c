"""Promises of reverse steps and losses of diffusion, for the interpreter."""

import torch
from torch import Tensor

from tests.triton.interpreter_cases import generator, promise
from vqfast import ops


def reverse_step(K: int, L: int = 6) -> tuple[Tensor, tuple]:
    """logits, and x_t, t, s, levels, noise of two samples, t = 3 of 5 and t = 1, uniform noise."""
    logits = torch.randn(2, L, K, generator=generator())
    x_t = torch.randint(K, (2, L), generator=generator(1))
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
    logits, step = reverse_step(40)
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
        logits, (x_t, t, s, *tables) = reverse_step(K)
        allowed = torch.zeros(K, dtype=torch.bool)
        allowed[K // 2 :: 3] = True
        logits[..., ~allowed] = -torch.inf
        x_t[:] = K // 2
        x_s, _ = _draw(logits, (x_t, t, s * 0, *tables))
        assert bool(allowed[x_s].all())


@promise("sampling")
def p_sample_takes_any_temperature() -> None:
    from vqfast.kernels.p_sample.spec import check

    logits, step = reverse_step(33)
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
    logits = torch.randn(1, 4, 8, generator=generator())
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
    logits, step = reverse_step(50)
    x0 = torch.randint(50, step[0].shape, generator=generator(3))
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

    logits, step = reverse_step(700)
    x_t = step[0]
    logits[0, 0, :600] = -torch.inf
    logits[0, 1] = -torch.inf
    x0 = torch.randint(700, x_t.shape, generator=generator(3))
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
        logits = torch.randn(4, 4, 40, generator=generator(6)) * 2
        logits.scatter_add_(2, x0[..., None], torch.full((4, 4, 1), 12.0))
        loss, _ = _loss(logits, x0, step)
        want = diffusion_loss(logits.double(), x0, *step, False, 0.0)
        assert bool(((loss - want).abs() <= 1e-5 * want + 1e-13).all()), family


@promise("diffusion")
def a_code_without_probability_costs_infinitely_much_and_no_more() -> None:
    logits, step = reverse_step(9)
    x0 = (step[0] + 1) % 9
    logits.scatter_(-1, x0[..., None], -torch.inf)
    loss, grad = _loss(logits, x0, step)
    assert bool(loss[0].isfinite().all()) and bool((loss[1] == torch.inf).all())
    assert bool(grad.isfinite().all())


@promise("diffusion")
def a_step_without_noise_costs_nothing() -> None:
    logits, (x_t, *_) = reverse_step(9)
    alpha_bar = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.1, 0.0], dtype=torch.float64)
    step = (x_t, torch.tensor([3, 1]), torch.tensor([2, 0]), alpha_bar[:, None], None)
    for loss_or_grad in _loss(logits, x_t, step):
        assert int(loss_or_grad.count_nonzero()) == 0


@promise("diffusion")
def a_loss_without_gradient_writes_none() -> None:
    logits, step = reverse_step(9)
    loss, grad = _loss(logits, step[0], step, with_grad=False)
    assert grad.shape == (0,)
    assert torch.equal(loss, _loss(logits, step[0], step)[0])


@promise("diffusion")
def rows_are_scaled_in_place() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for rows in (torch.randn(3, 4, 70, generator=generator()), torch.randn(3, 70, 4).transpose(1, 2)):
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
    logits, (x_t, t, s, levels, _) = reverse_step(20)
    x0 = torch.randint(20, x_t.shape, generator=generator(3))
    logits = logits.double().requires_grad_()
    transition = ops.Uniform(20, levels[:, 0])
    weights = torch.tensor([0.5, 3.0])

    def loss(backend: str) -> tuple[Tensor, Tensor]:
        with ops.backend(backend):
            value = ops.diffusion_loss(logits, x0, x_t, t, transition, s=s, aux_weight=0.2, weights=weights)
            return value, torch.autograd.grad(3 * value, logits)[0]

    for got, want in zip(loss("triton"), loss("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
