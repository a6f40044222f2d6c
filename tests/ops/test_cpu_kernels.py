"""What the CPU kernels promise beyond the reference: every instruction set, any layout, small losses, odd logits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vqfast
from vqfast import ops
from vqfast.kernels.codebook_stats.reference import codebook_stats
from vqfast.kernels.diffusion_loss import reference as definition
from vqfast.kernels.diffusion_loss.spec import noised
from vqfast.kernels.lookup.reference import lookup, lookup_backward
from vqfast.kernels.lookup.spec import backward_inputs, inputs
from vqfast.kernels.p_sample import reference as p_sample_definition
from vqfast.kernels.q_sample.spec import random_key
from vqfast.ops import registry

pytestmark = pytest.mark.skipif(registry.status("cpu")["cpu"] is not None, reason="the CPU extension is not built")

ALL_SPECS = """
import torch, vqfast
from vqfast import _cpu
from vqfast.kernels.specs import SPECS
from vqfast.ops.backends import cpu
print(_cpu.isa())
with vqfast.backend("cpu"):
    for spec in (spec for spec in SPECS if spec.op in cpu.KERNELS):
        for dtype in spec.dtypes:
            for shape in spec.test_shapes:
                args = spec.inputs(shape, dtype, "cpu", seed=4)
                spec.check(getattr(torch.ops.vqfast, spec.op)(*args), args)
"""


@pytest.fixture(autouse=True)
def cpu_backend():
    with vqfast.backend("cpu"):
        yield


def in_threads(count: int, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def run_with(isa: str, code: str) -> None:
    """Python code that prints the instruction set in use, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VQFAST_ISA": isa, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    if run.stdout.split() != [isa]:
        pytest.skip(f"this processor has no {isa}")


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_op_matches_the_reference_with_each_instruction_set(isa):
    run_with(isa, ALL_SPECS)


LAYOUTS = {
    "channel-first": lambda x: x.reshape(4, 6, 10, -1).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "every second feature": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "reversed leading dimensions": lambda x: x.reshape(4, 6, 10, -1).transpose(0, 2).contiguous().transpose(0, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_view_gives_what_its_contiguous_copy_gives(layout, dtype):
    grad_quantized, grad_error, x, codebook, indices = backward_inputs(
        dict(N=240, K=9, D=35, masked=True), dtype, "cpu", seed=0
    )
    view, grad_view = LAYOUTS[layout](x), LAYOUTS[layout](grad_quantized)
    assert not view.is_contiguous()
    index_view, error_view = indices.reshape(view.shape[:-1]), grad_error.reshape(view.shape[:-1])
    for got, want in zip(
        torch.ops.vqfast.lookup(view, codebook, index_view),
        torch.ops.vqfast.lookup(x, codebook, indices),
        strict=True,
    ):
        assert torch.equal(got.reshape(want.shape), want)
    got = torch.ops.vqfast.lookup_backward(grad_view, error_view, view, codebook, index_view)
    want = torch.ops.vqfast.lookup_backward(grad_quantized, grad_error, x, codebook, indices)
    assert torch.equal(got.reshape(want.shape), want)
    for got, want in zip(
        torch.ops.vqfast.codebook_stats(view, index_view, error_view, 9),
        torch.ops.vqfast.codebook_stats(x, indices, grad_error, 9),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=1e-6)


GATHERED = """
import torch, vqfast
from vqfast import _cpu
from vqfast.ops import nearest_code
print(_cpu.isa())
g = torch.Generator().manual_seed(0)
lookup = torch.ops.vqfast.lookup
with vqfast.backend("cpu"):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for D in (1, 15, 16, 33, 70):
            codebook = torch.randn(20, D, generator=g).to(dtype)
            for place in ((1, 1), (1, 2), (1, 4), (1, 8), (3, 7), (9, 15)):
                x = torch.randn(3, D, *place, generator=g).to(dtype)
                # From another row of memory on; some vectors twice, some left out.
                views = (x, x[:, :, 1:], x[..., ::2], x[:1, ..., None].expand(1, D, *place, 2), x.transpose(2, 3))
                for view in (view.movedim(1, -1) for view in views):
                    rows = view.contiguous()
                    mask = torch.rand(view.shape[:-1], generator=g) > 0.5
                    indices = nearest_code(rows, codebook)
                    assert torch.equal(nearest_code(view, codebook), indices)
                    assert torch.equal(nearest_code(view, codebook, mask=mask), torch.where(mask, indices, -1))
                    for got, want in zip(lookup(view, codebook, indices), lookup(rows, codebook, indices)):
                        assert torch.equal(got, want), (dtype, D, place, view.shape)
"""


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_features_that_lie_apart_are_gathered_right_with_each_instruction_set(isa):
    run_with(isa, GATHERED)


def test_an_expanded_gradient_is_read_in_place():
    _, grad_error, x, codebook, indices = backward_inputs(dict(N=64, K=5, D=20), torch.float32, "cpu", seed=0)
    ones = torch.ones(()).expand(64, 20)
    got = torch.ops.vqfast.lookup_backward(ones, grad_error, x, codebook, indices)
    want = lookup_backward(ones, grad_error, x, codebook, indices)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("spread", ["even", "one code has most", "one code has all"])
def test_sums_are_those_in_the_order_of_the_vectors_under_any_number_of_threads(spread):
    """Accumulated in float64, a sum in another order would round to other bits of float32 somewhere."""
    x, _, indices = inputs(dict(N=5000, K=40, D=70), torch.float32, "cpu", seed=1)
    if spread != "even":
        indices[torch.arange(5000) % 10 > (0 if spread == "one code has most" else -1)] = 7
    counts, sums = codebook_stats(x, indices, None, 40)
    for threads in (1, 2, 3, 7):
        got = in_threads(threads, lambda: torch.ops.vqfast.codebook_stats(x, indices, None, 40))
        assert torch.equal(got[0], counts)
        assert torch.equal(got[1], sums)


def test_every_op_gives_the_same_bits_under_any_number_of_threads_at_sizes_that_use_them():
    x, codebook, indices = inputs(dict(N=3001, K=70, D=33, masked=True), torch.float32, "cpu", seed=2)
    grad_quantized, grad_error, *_ = backward_inputs(dict(N=3001, K=70, D=33), torch.float32, "cpu", seed=2)
    x0, *step = noised(dict(B=5, L=61, K=301, T=50), "cpu", 2)
    logits = torch.randn(5, 61, 301)
    key, scale = random_key("cpu", 2), torch.rand(5, 61, dtype=torch.float64)

    def everything():
        return (
            *torch.ops.vqfast.lookup(x, codebook, indices),
            torch.ops.vqfast.lookup_backward(grad_quantized, grad_error, x, codebook, indices),
            *torch.ops.vqfast.codebook_stats(x.t().contiguous().t(), indices, grad_error, 70),
            *torch.ops.vqfast.diffusion_loss(logits, x0, *step, scale, False, 0.1, True),
            torch.ops.vqfast.p_sample(logits, None, *step, None, False, 0.9, 1.0, 0, 1.0, key),
            torch.ops.vqfast.q_sample(x0.repeat(9, 9), step[1].repeat(9), *step[3:], 301, key),
        )

    alone = in_threads(1, everything)
    for threads in (2, 5):
        for got, want in zip(in_threads(threads, everything), alone, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("K", [2, 40, 1024])
@pytest.mark.parametrize("margin", [0.0, 6.0, 12.0])
@pytest.mark.parametrize("step", [1, 300])
def test_a_small_loss_has_as_many_digits_as_a_large_one(K, margin, step):
    """`margin` nats in favour of x_0 bring the KL down to 1e-9; a difference of float32 logarithms ends at 1e-6."""
    arguments = noised(dict(B=24, L=16, K=K, T=1000, step=step), "cpu", 5)
    logits = torch.randn(24, 16, K, generator=torch.Generator().manual_seed(6)) * 2
    logits.scatter_add_(2, arguments[0][..., None], torch.full((24, 16, 1), margin))
    scale = torch.ones(24, 16, dtype=torch.float64)
    loss, grad = torch.ops.vqfast.diffusion_loss(logits, *arguments, scale, False, 0.0, True)
    want = definition.diffusion_loss(logits.double(), *arguments, False, 0.0)
    assert ((loss - want).abs() <= 1e-5 * want + 1e-13).all()
    want = definition.diffusion_loss_grad(logits.double(), *arguments, False, 0.0)
    assert ((grad - want).abs() <= 1e-4 * want.abs().amax(-1, keepdim=True) + 1e-13).all()


@pytest.mark.parametrize("family", ["absorbing", "mask_and_replace", "marginal"])
@pytest.mark.parametrize("marginal", [False, True])
@pytest.mark.parametrize("margin", [0.0, 12.0])
@pytest.mark.parametrize("step", [1, 300])
def test_a_small_loss_of_any_family_has_as_many_digits_as_a_large_one(family, marginal, margin, step):
    K = 40
    x0, x_t, t, s, *tables = noised(dict(B=24, L=16, K=K, T=1000, step=step, family=family), "cpu", 5)
    logits = torch.randn(24, 16, K, generator=torch.Generator().manual_seed(6)) * 2
    logits.scatter_add_(2, x0[..., None], torch.full((24, 16, 1), margin))
    scale = torch.ones(24, 16, dtype=torch.float64)
    arguments = (x0, x_t, t, s, *tables)
    loss, grad = torch.ops.vqfast.diffusion_loss(logits, *arguments, scale, marginal, 0.0, True)
    want = definition.diffusion_loss(logits.double(), *arguments, marginal, 0.0)
    assert ((loss - want).abs() <= 1e-5 * want + 1e-13).all()
    want = definition.diffusion_loss_grad(logits.double(), *arguments, marginal, 0.0)
    assert ((grad - want).abs() <= 1e-4 * want.abs().amax(-1, keepdim=True) + 1e-13).all()


def test_the_loss_without_a_gradient_is_the_same():
    arguments = noised(dict(B=3, L=5, K=77, T=20), "cpu", 0)
    logits, scale = torch.randn(3, 5, 77), torch.ones(3, 5, dtype=torch.float64)
    with_grad, _ = torch.ops.vqfast.diffusion_loss(logits, *arguments, scale, False, 0.3, True)
    without, grad = torch.ops.vqfast.diffusion_loss(logits, *arguments, scale, False, 0.3, False)
    assert torch.equal(with_grad, without)
    assert grad.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("s", [0, 4])
def test_masked_logits_are_impossible_codes_and_a_nan_stays_in_its_row(dtype, s):
    g = torch.Generator().manual_seed(0)
    K, T = 70, 10
    levels = torch.linspace(1, 0.05, T + 1, dtype=torch.float64)[:, None]
    x0, x_t = torch.randint(10, (1, 6), generator=g), torch.randint(10, (1, 6), generator=g)
    t, s = torch.tensor([s + 1]), torch.tensor([s])
    logits = torch.randn(1, 6, K, generator=g).to(dtype)
    logits[..., 10:] = -torch.inf
    logits[0, 1, 20], logits[0, 2], logits[0, 3, 0] = torch.nan, torch.nan, torch.inf
    scale = torch.ones(1, 6, dtype=torch.float64)
    loss, grad = torch.ops.vqfast.diffusion_loss(logits, x0, x_t, t, s, levels, None, scale, False, 0.1, True)
    good = torch.tensor([0, 4, 5])
    assert loss[0, 1:4].isnan().all()
    assert grad[0, 1:4].isnan().all()
    part = (logits[:, good].double(), x0[:, good], x_t[:, good], t, s, levels, None, False, 0.1)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    want = definition.diffusion_loss(*part)
    torch.testing.assert_close(loss[:, good].double(), want, rtol=tolerance, atol=tolerance)
    assert grad[:, good].isfinite().all()
    assert (grad[0, good][:, 10:] == 0).all()


@pytest.mark.parametrize("gap", [50.0, 200.0, 2000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_step_stays_finite_where_the_probability_underflows(gap, dtype):
    """At s = 0 the loss is -log p(x_0 | x_t), which a softmax would round to infinity."""
    logits = torch.zeros(1, 2, 8, dtype=dtype)
    logits[..., 0] = -gap
    x0, x_t = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[0, 5]])
    levels = torch.tensor([[1.0], [0.7]], dtype=torch.float64)
    step = (torch.tensor([1]), torch.tensor([0]), levels, None)
    scale = torch.ones(1, 2, dtype=torch.float64)
    loss, grad = torch.ops.vqfast.diffusion_loss(logits, x0, x_t, *step, scale, False, 1.0, True)
    want = definition.diffusion_loss(logits.double(), x0, x_t, *step, False, 1.0)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    want = definition.diffusion_loss_grad(logits.double(), x0, x_t, *step, False, 1.0)
    torch.testing.assert_close(grad.double(), want, rtol=1e-6, atol=1e-6)


def test_a_level_of_no_further_noise_costs_nothing():
    """alpha_bar is flat from s to t: x_s = x_t, whatever is predicted."""
    alpha_bar = torch.tensor([1.0, 0.6, 0.6], dtype=torch.float64)
    x0 = torch.tensor([[1, 2]])
    x_t = torch.tensor([[1, 4]])
    logits = torch.randn(1, 2, 6, requires_grad=True)
    loss = ops.diffusion_loss(logits, x0, x_t, 2, ops.Uniform(6, alpha_bar), reduction="sum")
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert logits.grad.abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_draw_is_a_possible_code_whatever_the_logits(dtype):
    g = torch.Generator().manual_seed(3)
    B, L, K = 4, 40, 203
    x_t = torch.randint(K, (B, L), generator=g)
    logits = torch.randn(B, L, K, generator=g).to(dtype)
    possible = torch.rand(B, L, K, generator=g) < 0.05
    logits.masked_fill_(~possible, -torch.inf)
    logits[0, 0], logits[0, 1, 5], logits[0, 2, 7] = torch.nan, torch.nan, torch.inf
    logits[0, 3] = -torch.inf
    # From pure noise to data: neither x_t nor a uniform code has any weight, so the draw is one of p.
    levels = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    t, s, key = torch.ones(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64), random_key("cpu", 0)
    for temperature in (1.0, 1e-35, 1e6):
        x_s = torch.ops.vqfast.p_sample(
            logits, None, x_t, t, s, levels, None, None, False, temperature, 1.0, 0, 1.0, key
        )
        assert torch.equal(x_s[0, :4], x_t[0, :4])
        rest = torch.ones(B, L, dtype=torch.bool)
        rest[0, :4] = False
        some = rest & possible.any(-1)
        assert possible.gather(-1, x_s[..., None])[..., 0][some].all()
        assert torch.equal(x_s[rest & ~some], x_t[rest & ~some])
        if temperature < 1:
            best = logits.gather(-1, x_s[..., None])[..., 0]
            assert torch.equal(best[some], logits.amax(-1)[some])


def test_draws_follow_the_posterior():
    """200,000 draws of one token against the exact probabilities of all codes."""
    K, N = 130, 200_000
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(K, generator=g) * 2
    levels = torch.tensor([[1.0], [0.8], [0.35]], dtype=torch.float64)
    step = (torch.tensor([2]), torch.tensor([1]), levels, None)
    x_t = torch.full((1, N), 3)
    rows = logits.expand(1, N, K)
    options = (None, False, 1.0, 1.0, 0, 1.0, random_key("cpu", 1))
    x_s = torch.ops.vqfast.p_sample(rows, None, x_t, *step, *options)
    a = 0.35 / 0.8
    likelihood = torch.full((K,), (1 - a) / K, dtype=torch.float64)
    likelihood[3] += a
    posterior = likelihood * (0.8 * logits.double().softmax(-1) + 0.2 / K)
    posterior /= posterior.sum()
    expected = posterior * N
    chi_square = ((x_s[0].bincount(minlength=K) - expected) ** 2 / expected).sum().item()
    # Mean K - 1 = 129, standard deviation sqrt(2 * 129) = 16.
    assert chi_square < 129 + 5 * 16
    few = slice(0, 3000)
    want = p_sample_definition.p_sample(rows[:, few], None, x_t[:, few], *step, *options)
    assert (x_s[:, few] != want).sum() <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [0.0, 1e-40, -1e-40])
def test_truncation_where_the_largest_score_is_zero(dtype, largest):
    """Around 0 lie the subnormal numbers, which kernels count as 0: no threshold may be one."""
    logits = -torch.arange(20.0).repeat(2, 50, 1)
    logits[..., 0] = largest
    transition = ops.Uniform(20, torch.tensor([1.0, 0.5, 1e-6]))
    x_t = torch.full((2, 50), 7)
    for truncated in (dict(top_p=0.5), dict(top_k=1), dict(top_k=3, top_p=0.9)):
        draws = []
        for backend in ("cpu", "reference"):
            with vqfast.backend(backend):
                generator = torch.Generator().manual_seed(3)
                draws.append(ops.p_sample(logits.to(dtype), x_t, 2, 0, transition, generator=generator, **truncated))
        assert torch.equal(*draws)


def test_lookup_of_many_rows_matches_the_reference():
    x, codebook, indices = inputs(dict(N=4000, K=33, D=40, masked=True), torch.float32, "cpu", seed=7)
    got, want = torch.ops.vqfast.lookup(x, codebook, indices), lookup(x.double(), codebook.double(), indices)
    assert torch.equal(got[0].double(), want[0])
    torch.testing.assert_close(got[1].double(), want[1], rtol=2e-6, atol=2e-6)
    assert torch.equal(got[2], want[2])
