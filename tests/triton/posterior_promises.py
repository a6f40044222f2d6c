"""Promises of the predicted posterior and of its gradient, for the interpreter."""

from typing import Any

import torch
from torch import Tensor

from tests.triton.diffusion_promises import reverse_step
from tests.triton.interpreter_cases import generator, promise
from vqfast.kernels.diffusion_loss.spec import noised
from vqfast.kernels.posterior.spec import check, check_backward, inputs
from vqfast.ops.backends.triton import KERNELS


def _assert_posterior(logits: Tensor, *rest: Any) -> None:
    """Values, and the gradient of a random vector, against the reference."""
    args = (logits, *rest)
    log_p = torch.ops.vqfast.posterior(*args)
    check(log_p, args)
    grad = torch.randn(log_p.shape, generator=generator(9)).to(logits.dtype)
    check_backward(torch.ops.vqfast.posterior_backward(grad, *args), (grad, *args))


@promise("posterior")
def the_logarithm_of_a_one_hot_is_the_true_x0() -> None:
    for family in ("uniform", "absorbing", "mask_and_replace", "marginal"):
        for K, step in ((12, 1), (12, 3), (1, 10)):
            x0, *tokens = noised(dict(B=2, L=3, K=K, T=10, family=family, step=step), "cpu", 7)
            for dtype in (torch.float32, torch.float64, torch.float16):
                one_hot = torch.nn.functional.one_hot(x0, K).log().to(dtype)
                for marginal in (False, True):
                    _assert_posterior(one_hot, *tokens, marginal)


@promise("posterior")
def codes_that_no_noise_gives_keep_probabilities_below_float32() -> None:
    logits, (x_t, t, s, levels, _) = reverse_step(40)
    noise = torch.rand(40, generator=generator(4), dtype=torch.float64)
    noise[::2] = 0
    logits[..., :8] -= 300
    for marginal in (False, True):
        _assert_posterior(logits, x_t // 2 * 2 + 1, t, s, levels, noise / noise.sum(), marginal)


@promise("posterior")
def a_shift_may_take_the_largest_logit_below_all_others() -> None:
    """A code that noise hardly ever gives: by the marginal rule some 138 less."""
    noise = torch.tensor([1e-60, 0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    levels = torch.tensor([[1.0], [0.9], [0.5], [0.1]], dtype=torch.float64)
    x_t, t = torch.zeros(2, 2, dtype=torch.int64), torch.tensor([2, 3])
    for logit in (-200.0, 60.0, 110.0, 200.0):
        logits = torch.randn(2, 2, 5, generator=generator(3))
        logits[..., 0] = logit
        for dtype in (torch.float32, torch.float64, torch.float16):
            for s in (t - 1, t * 0):
                _assert_posterior(logits.to(dtype), x_t, t, s, levels, noise, True)


@promise("posterior")
def many_codes_are_read_in_blocks() -> None:
    for family in ("uniform", "mask_and_replace", "marginal"):
        shape = dict(B=1, L=1, K=50257, T=10, family=family, marginal=family == "marginal")
        _assert_posterior(*inputs(shape, torch.float32, "cpu", 9))
    _assert_posterior(*inputs(dict(B=1, L=2, K=5000, T=10), torch.float64, "cpu", 9))


@promise("posterior")
def logits_that_are_not_numbers_spoil_their_row_alone() -> None:
    for family in ("uniform", "absorbing"):
        logits, x_t, *rest = inputs(dict(B=2, L=6, K=8, T=10, family=family), torch.float32, "cpu", 10)
        logits[:, 0], logits[:, 1, 3], logits[:, 2] = torch.nan, torch.nan, -torch.inf
        logits[:, 3, 5] = torch.inf
        logits[0, 4].scatter_(-1, x_t[0, 4:5].clamp(max=7), torch.nan)
        _assert_posterior(logits, x_t, *rest)


@promise("posterior")
def levels_and_codes_out_of_range_are_brought_into_it() -> None:
    logits, (x_t, *rest) = reverse_step(9)
    wild, tame = x_t.clone(), x_t.clone()
    wild[0, :3], tame[0, :3] = torch.tensor([9, 1 << 40, -3]), torch.tensor([8, 8, 0])
    grad = torch.randn(logits.shape, generator=generator(4))
    # Past the checks of values, which CUDA tensors have only when asked.
    for op, first in (("posterior", ()), ("posterior_backward", (grad,))):
        got, want = (KERNELS[op](*first, logits, codes, *rest, False) for codes in (wild, tame))
        assert torch.equal(got, want), op


@promise("posterior")
def rows_of_any_strides_give_the_same() -> None:
    logits, step = reverse_step(50)
    grad = torch.randn(logits.shape, generator=generator(4))
    want = torch.ops.vqfast.posterior(logits, *step, True)
    want_grad = torch.ops.vqfast.posterior_backward(grad, logits, *step, True)
    for strided in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, x], -1)[..., :50],
    ):
        assert torch.equal(torch.ops.vqfast.posterior(strided(logits), *step, True), want)
        got = torch.ops.vqfast.posterior_backward(strided(grad), strided(logits), *step, True)
        assert torch.equal(got, want_grad)
