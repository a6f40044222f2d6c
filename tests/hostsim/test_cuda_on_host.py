"""The CUDA kernels, run thread by thread on the host under AddressSanitizer and UndefinedBehaviorSanitizer.

Their results against the float64 reference, their memory, their independence of the order in which threads run. What
this cannot show (memory ordering, speed) is left to tests/cuda/test_gpu.py.
"""

import pytest
import simulator
import torch
from simulator import Call, Written

from vqfast.kernels.codebook_stats.reference import codebook_stats
from vqfast.kernels.diffusion_loss.reference import diffusion_loss
from vqfast.kernels.diffusion_loss.spec import noised
from vqfast.kernels.lookup.reference import lookup, lookup_backward
from vqfast.kernels.nearest.reference import nearest
from vqfast.kernels.q_sample.spec import random_key
from vqfast.kernels.specs import SPECS as ALL_SPECS
from vqfast.ops.backends import cuda
from vqfast.ops.prepared import METRICS

SPECS = [spec for spec in ALL_SPECS if spec.op in simulator.CALLS]
SPEC = {spec.op: spec for spec in SPECS}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def run_one(call: Call, **settings) -> list[torch.Tensor]:
    return simulator.run([call], **settings)[0]


def channel_first(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """(B, H, W, D) view of (B, D, H, W) memory."""
    B, H, W, D = shape
    x = torch.randn(B, D, H, W, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.permute(0, 2, 3, 1)


def test_every_op_with_a_cuda_kernel_of_its_own_is_simulated():
    made_of_others = {"residual_nearest"}
    missing = {spec.op for spec in ALL_SPECS} & cuda.KERNELS.keys() - simulator.CALLS.keys() - made_of_others
    assert not missing, f"tests/hostsim/simulator.py has no call of {', '.join(sorted(missing))}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.op)
def test_matches_reference_and_stays_within_its_memory(spec):
    cases = [(shape, dtype, spec.inputs(shape, dtype, "cpu", 1)) for shape in spec.test_shapes for dtype in spec.dtypes]
    results = simulator.run([simulator.CALLS[spec.op](*args) for _, _, args in cases])
    for (shape, dtype, args), written in zip(cases, results, strict=True):
        try:
            spec.check(simulator.result(spec.op, written), args)
        except AssertionError as error:
            raise AssertionError(f"{dict(shape)}, {dtype}: {error}") from error


DEVICES = (
    dict(order=1),
    dict(order=5),
    dict(multiprocessors=132),
    dict(multiprocessors=1, grid_x=2, order=9),
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.op)
def test_same_bits_in_any_order_of_threads_and_blocks_and_on_any_size_of_device(spec):
    """grid_x=2: blocks stride over what a device with few blocks leaves them."""
    shapes = [shape for shape in spec.test_shapes if shape.get("N", 0) <= 200 and shape.get("K", 0) <= 1100]
    shapes = [dict(shape) | {"L": min(shape["L"], 6)} if "L" in shape else shape for shape in shapes]
    calls = [simulator.CALLS[spec.op](*spec.inputs(shape, spec.dtypes[0], "cpu", 2)) for shape in shapes]
    expected = simulator.run(calls)
    for device in DEVICES:
        for shape, first, other in zip(shapes, expected, simulator.run(calls, **device), strict=True):
            for a, b in zip(first, other, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (dict(shape), device)


# Small, for ThreadSanitizer is slow; each takes several blocks, several warps a block, several turns of every loop.
RACE_SHAPES = {
    "nearest": (dict(N=130, K=257, D=9), dict(N=5, K=700, D=17)),
    "lookup": (dict(N=70, K=5, D=40, masked=True), dict(N=70, K=5, D=37)),
    "lookup_backward": (dict(N=70, K=5, D=40, masked=True), dict(N=70, K=5, D=37)),
    "codebook_stats": (dict(N=300, K=3, D=5, weighted=True), dict(N=70, K=40, D=37, masked=True)),
    "q_sample": (dict(B=3, L=16, K=32, T=10), dict(B=3, L=16, K=32, T=10, family="marginal")),
    "posterior": (
        dict(B=2, L=2, K=524, T=10, marginal=True),
        dict(B=1, L=3, K=131, T=10, family="marginal", step=3),
        dict(B=2, L=3, K=131, T=10, step=4, family="absorbing"),
    ),
    "posterior_backward": (
        dict(B=2, L=2, K=524, T=10, marginal=True),
        dict(B=1, L=3, K=131, T=10, family="marginal", step=3),
        dict(B=2, L=3, K=131, T=10, step=4, family="absorbing"),
    ),
    "diffusion_loss": (
        dict(B=2, L=2, K=524, T=10),
        dict(B=1, L=2, K=131, T=10, family="marginal", marginal=True, aux_weight=0.1),
        dict(B=2, L=4, K=131, T=10, step=4, family="absorbing"),
    ),
    "p_sample": (
        dict(B=2, L=4, K=524, T=4, step=4),
        dict(B=1, L=4, K=131, T=4, step=4, family="marginal", marginal=True),
        dict(B=2, L=4, K=131, T=4, step=4, family="absorbing", top_k=9, top_p=0.8, guidance=2.0),
    ),
    "matrix_loss": (
        dict(B=2, L=5, K=140, T=3, aux_weight=0.1),
        dict(B=2, L=5, K=33, T=3, step=2, shared=True, marginal=True),
    ),
    "matrix_sample": (
        dict(B=2, L=5, K=140, T=3, known=True, guidance=2.0),
        dict(B=2, L=5, K=33, T=3, step=2, shared=True, marginal=True, top_k=9, top_p=0.8),
    ),
    "pack": (dict(B=3, H=3, W=4, G=3, D=3), dict(B=3, H=3, W=4, G=2, region=True, short=2)),
    "unpack": (dict(B=3, H=3, W=4, G=3, D=9, shuffled=True), dict(B=2, H=3, W=4, G=2, shuffled=True, corner=True)),
    "unpack_backward": (dict(B=3, H=3, W=4, G=3, D=9, shuffled=True), dict(B=2, H=3, W=4, G=2)),
    "position_mask": (dict(B=4, H=4, W=4, G=3), dict(B=3, H=1, W=2, G=1)),
    "grain_entropy": (dict(B=1, P=17, rows=1, columns=2), dict(B=1, P=3, rows=1, columns=2, bins=40)),
}


# Minutes under ThreadSanitizer, for kernels whose threads share one scan.
SLOW_RACES = ("unpack", "unpack_backward")


@pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=[pytest.mark.slow] if s.op in SLOW_RACES else [], id=s.op) for s in SPECS],
)
def test_no_two_threads_race_for_memory(spec):
    cases = [spec.inputs(shape, torch.float32, "cpu", 3) for shape in RACE_SHAPES[spec.op]]
    if spec.op == "nearest":
        x, codebook = cases[1]
        # Equal codes and a row that is not finite: what exact distance decides.
        x[4] = torch.nan
        cases[1] = (x, codebook[:350].repeat(2, 1))
        # Few codes: the cosines of all of them are decided exactly, which takes ThreadSanitizer minutes for 700.
        cases.append((x, codebook[:30].repeat(2, 1), None, None, "cosine"))
    if spec.op.startswith("lookup"):
        # Channel-first vectors, whose rows and features are read by other threads than use them.
        cases.append(tuple(a.T.contiguous().T if a.shape == (70, 37) else a for a in cases[1]))
    calls = [simulator.CALLS[spec.op](*args) for args in cases]
    for device in (dict(multiprocessors=1), dict(multiprocessors=1, grid_x=1)):
        for args, written in zip(cases, simulator.run(calls, sanitizer="races", **device), strict=True):
            spec.check(simulator.result(spec.op, written), args)


class TestTheSimulatorItself:
    def test_catches_a_missing_barrier_as_a_data_race(self):
        with pytest.raises(RuntimeError, match="data race"):
            run_one(Call("planted_race", [], [], [Written((64,), torch.int32)]), sanitizer="races")

    def test_catches_a_write_past_the_end_of_a_buffer(self):
        assert run_one(Call("planted_overrun", [64], [], [Written((64,), torch.int32)]))[0].sum() == 0
        with pytest.raises(RuntimeError, match="heap-buffer-overflow"):
            run_one(Call("planted_overrun", [64 + 2], [], [Written((64,), torch.int32)]))

    def test_catches_a_write_past_the_end_of_shared_memory(self):
        with pytest.raises(RuntimeError, match="index 64 out of bounds|heap-buffer-overflow"):
            run_one(Call("planted_shared_overrun", [], [], [Written((64,), torch.int32)]))

    def test_a_missing_barrier_shows_when_the_order_of_threads_changes(self):
        call = Call("planted_race", [], [], [Written((64,), torch.int32)])
        assert not torch.equal(run_one(call)[0], run_one(call, order=1)[0])

    def test_catches_threads_that_part_at_a_barrier(self):
        with pytest.raises(RuntimeError, match="thread 32 ended while others wait"):
            run_one(Call("planted_divergence", [], [], [Written((64,), torch.int32)]))

    def test_rounds_to_half_and_bfloat16_as_torch_does(self):
        values = torch.randn(4000) * 10.0 ** torch.randint(-9, 6, (4000,))
        values[:2] = torch.tensor([65519.0, 65520.0])
        one = torch.tensor([0.999999])
        for dtype in (torch.bfloat16, torch.float16):
            rows = values.to(dtype)[:, None]
            [scaled] = run_one(simulator.scale_rows_(rows, one))
            assert torch.equal(scaled, (rows.float() * one).to(dtype))


class TestNearest:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_channel_first_and_sliced_input_is_read_in_place(self, dtype):
        codebook = torch.randn(70, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
        wide = torch.randn(40, 3, 30, generator=torch.Generator().manual_seed(2)).to(dtype)
        inputs = [channel_first(3, 5, 7, 12, dtype=dtype), wide[::2, :, 5:17], wide[:, 1, 2:26:2], wide[..., :12].mT.mT]
        results = simulator.run([simulator.nearest(x, codebook) for x in inputs])
        for x, (indices, _) in zip(inputs, results, strict=True):
            assert torch.equal(indices, nearest(x, codebook))

    def test_few_rows_are_split_over_the_codebook(self):
        g = torch.Generator().manual_seed(3)
        x, codebook = torch.randn(6, 20, generator=g), torch.randn(1500, 20, generator=g)
        codebook[700] = codebook[3]
        x[5] = codebook[3]
        for multiprocessors in (1, 4, 132):
            indices, _ = run_one(simulator.nearest(x, codebook), multiprocessors=multiprocessors)
            assert torch.equal(indices, nearest(x, codebook)) and indices[5] == 3

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equal_codes_go_to_the_lowest_index_by_exact_distance(self, dtype):
        g = torch.Generator().manual_seed(4)
        codebook = torch.randn(20, 9, generator=g).to(dtype).repeat(15, 1)
        x = torch.cat([torch.randn(50, 9, generator=g).to(dtype), codebook[40:60]])
        indices, decided_exactly = run_one(simulator.nearest(x, codebook))
        assert indices.max() < 20
        assert torch.equal(indices, nearest(x, codebook))
        assert decided_exactly == len(x)

    def test_codes_that_float32_cannot_tell_apart(self):
        """Two codes at distances that differ by one part in 10^10; the nearer is the second in half of the rows."""
        g = torch.Generator().manual_seed(5)
        x = torch.randn(64, 33, generator=g, dtype=torch.float64)
        codebook = torch.randn(64, 33, generator=g, dtype=torch.float64) * 100
        first = x[0] + 1.0
        codebook[10], codebook[50] = first, first
        codebook[50, 7] += 1e-10
        x[1:] = x[0]
        x[32:] += 1e-9 * torch.arange(33) - 4e-9
        x[::2, 7] += 3.0
        indices, decided_exactly = run_one(simulator.nearest(x, codebook))
        assert torch.equal(indices, nearest(x, codebook))
        assert set(indices.tolist()) == {10, 50} and decided_exactly == 64

    @pytest.mark.parametrize("metric", METRICS)
    def test_scales_whose_squares_leave_float32(self, metric):
        """A power of two brings the scores back into range: no more rows stay open than at any other scale."""
        g = torch.Generator().manual_seed(6)
        x, codebook = torch.randn(40, 10, generator=g), torch.randn(60, 10, generator=g)
        pairs = [(x * scale, codebook * scale) for scale in (1e-38, 1e-30, 1e-15, 1e12, 1e25, 1e37)]
        results = simulator.run([simulator.nearest(*pair, metric=metric) for pair in pairs])
        for pair, (indices, decided_exactly) in zip(pairs, results, strict=True):
            assert torch.equal(indices, nearest(*pair, metric=metric)) and decided_exactly <= 3

    @pytest.mark.parametrize("metric", METRICS)
    def test_ties_zeros_and_what_is_not_finite(self, metric):
        g = torch.Generator().manual_seed(10)
        x, codebook = torch.randn(30, 7, generator=g), torch.randn(40, 7, generator=g).repeat(8, 1)
        codebook[40:80] *= 2
        codebook[80], codebook[0, 1], codebook[1, 2] = 0, torch.nan, torch.inf
        x[3], x[4, 2], x[5, 0] = 0, torch.nan, -torch.inf
        for dtype in DTYPES:
            pair = x.to(dtype), codebook.to(dtype)
            indices, decided_exactly = run_one(simulator.nearest(*pair, metric=metric))
            assert torch.equal(indices, nearest(*pair, metric=metric))
            assert indices[4:6].tolist() == [0, 0] and decided_exactly >= 3

    @pytest.mark.parametrize("metric", METRICS)
    def test_heads_mask_and_scores_alone(self, metric):
        g = torch.Generator().manual_seed(11)
        x, codebook = torch.randn(2, 50, 3, 6, generator=g), torch.randn(3, 150, 6, generator=g).repeat(1, 2, 1)
        mask = torch.rand(2, 50, 3, generator=g) > 0.4
        calls = [simulator.nearest(x, codebook, mask, metric=metric, exact=exact) for exact in (True, False)]
        (indices, decided_exactly), (fast, none) = simulator.run(calls)
        want = nearest(x, codebook, mask, metric)
        assert torch.equal(indices, want) and decided_exactly == mask.sum()
        # Every code is there twice.
        assert torch.equal(torch.where(mask, fast % 150, -1), want) and none == 0

    @pytest.mark.parametrize("scale", [1e-150, 1e-60, 1e60, 1e150])
    def test_float64_beyond_the_range_of_float32(self, scale):
        g = torch.Generator().manual_seed(7)
        x = torch.randn(30, 10, generator=g, dtype=torch.float64) * scale
        codebook = torch.randn(300, 10, generator=g, dtype=torch.float64) * scale
        indices, decided_exactly = run_one(simulator.nearest(x, codebook))
        assert torch.equal(indices, nearest(x, codebook)) and decided_exactly <= 2

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_and_infinity(self, dtype):
        g = torch.Generator().manual_seed(8)
        x, codebook = torch.randn(40, 6, generator=g), torch.randn(300, 6, generator=g)
        x[3], x[4, 2], x[5, 0] = torch.nan, torch.nan, torch.inf
        codebook[0, 1], codebook[1], codebook[2, 0], codebook[299] = torch.nan, torch.nan, -torch.inf, torch.inf
        x, codebook = x.to(dtype), codebook.to(dtype)
        indices, decided_exactly = run_one(simulator.nearest(x, codebook))
        assert torch.equal(indices, nearest(x, codebook))
        assert indices[3:6].tolist() == [0, 0, 0] and decided_exactly < 10
        nothing, _ = run_one(simulator.nearest(x, torch.full_like(codebook, torch.nan)))
        assert nothing.tolist() == [0] * 40

    def test_most_rows_are_decided_by_their_scores(self):
        """Scores with a bound that is too wide would be right and slow."""
        g = torch.Generator().manual_seed(9)
        x, codebook = torch.randn(512, 64, generator=g) + 30, torch.randn(256, 64, generator=g) + 30
        _, decided_exactly = run_one(simulator.nearest(x, codebook))
        assert decided_exactly <= 2


class TestLookup:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_channel_first_input_and_gradient(self, dtype):
        g = torch.Generator().manual_seed(1)
        x, grad = channel_first(2, 5, 9, 40, dtype=dtype), channel_first(2, 5, 9, 40, dtype=dtype, seed=1)
        codebook = torch.randn(7, 40, generator=g).to(dtype)
        indices = torch.randint(-1, 7, (2, 5, 9), generator=g)
        grad_error = torch.randn(2, 5, 9, generator=g).to(torch.promote_types(dtype, torch.float32))
        forward = (x, codebook, indices)
        SPEC["lookup"].check(tuple(run_one(simulator.lookup(*forward))), forward)
        for grad_quantized in (grad, grad.contiguous()):
            args = (grad_quantized, grad_error, x, codebook, indices)
            SPEC["lookup_backward"].check(run_one(simulator.lookup_backward(*args))[0], args)

    def test_input_that_does_not_start_at_a_multiple_of_16_bytes(self):
        g = torch.Generator().manual_seed(2)
        memory, codebook = torch.randn(1 + 10 * 8, generator=g), torch.randn(5, 8, generator=g)
        x, indices = memory[1:].view(10, 8), torch.randint(5, (10,), generator=g)
        call = simulator.lookup(x, codebook, indices)
        call.integers[6] = 4
        call.buffers[0] = memory
        SPEC["lookup"].check(tuple(run_one(call)), (x, codebook, indices))

    @pytest.mark.parametrize("D", [8, 9])
    def test_an_index_out_of_range_is_brought_into_it(self, D):
        g = torch.Generator().manual_seed(3)
        x, codebook = torch.randn(4, D, generator=g), torch.randn(3, D, generator=g)
        wild = torch.tensor([3, -7, 1 << 62, -(1 << 63)])
        tame = torch.tensor([2, -1, 2, -1])
        for got, want in zip(run_one(simulator.lookup(x, codebook, wild)), lookup(x, codebook, tame), strict=True):
            torch.testing.assert_close(got, want)
        [got] = run_one(simulator.lookup_backward(x, torch.ones(4), x, codebook, wild))
        torch.testing.assert_close(got, lookup_backward(x, torch.ones(4), x, codebook, tame))
        counts, sums = run_one(simulator.codebook_stats(x, wild, None, 3))
        torch.testing.assert_close((counts, sums), codebook_stats(x, tame, None, 3))


class TestCodebookStats:
    @pytest.mark.parametrize("codebook_size", [1, 2, 40, 700])
    def test_codes_that_cross_the_pieces_of_a_sum(self, codebook_size):
        """Exact values, so that a row lost or counted twice cannot hide in a tolerance."""
        g = torch.Generator().manual_seed(codebook_size)
        x = torch.randint(-8, 9, (1000, 5), generator=g).float()
        weights = torch.randint(0, 5, (1000,), generator=g).float()
        indices = torch.randint(-1, codebook_size, (1000,), generator=g)
        args = (x, indices, weights, codebook_size)
        for got, want in zip(run_one(simulator.codebook_stats(*args)), codebook_stats(*args), strict=True):
            assert torch.equal(got, want)

    def test_all_masked_and_channel_first(self):
        x = channel_first(2, 3, 5, 4)
        counts, sums = run_one(simulator.codebook_stats(x, torch.full((2, 3, 5), -1), None, 6))
        assert counts.tolist() == [0] * 6 and not sums.any()
        indices = torch.arange(30).view(2, 3, 5) % 6
        torch.testing.assert_close(
            tuple(run_one(simulator.codebook_stats(x, indices, None, 6))), codebook_stats(x, indices, None, 6)
        )


class TestPacking:
    """Whatever the values are, nothing outside the buffers is read or written."""

    wild = torch.tensor([-1, 2, 1 << 40, -(1 << 62), 0, 1, 15, 16])

    def test_grains_out_of_range_are_brought_into_it(self):
        grains = self.wild.reshape(1, 2, 4)
        args = (torch.arange(32).reshape(1, 4, 8), grains, False, 32)
        SPEC["pack"].check(tuple(run_one(simulator.pack(*args))), args)

    @pytest.mark.parametrize("capacity", [0, 1, 7])
    def test_a_capacity_that_is_too_small(self, capacity):
        args = (torch.randn(2, 4, 8, 4), torch.ones(2, 2, 4, dtype=torch.int64), True, capacity)
        SPEC["pack"].check(tuple(run_one(simulator.pack(*args))), args)

    def test_sequences_that_are_none(self):
        grains = torch.randint(2, (2, 2, 4), generator=torch.Generator().manual_seed(1))
        position, grain = self.wild.repeat(8), self.wild.repeat_interleave(8)
        limits = torch.tensor([[0, 30, 64], [5, 3, 1 << 30], [-(1 << 31), -3, 2], [70, 60, 50]], dtype=torch.int32)
        for cu_seqlens in limits:
            tokens = (cu_seqlens, position, grain, grains, 2)
            [grid] = run_one(simulator.unpack(torch.randn(64, 8), *tokens, True))
            [grad] = run_one(simulator.unpack_backward(torch.randn(2, 4, 8, 3), *tokens))
            assert grid.isfinite().all() and grad.isfinite().all()

    def test_positions_that_are_none(self):
        args = (self.wild[None], self.wild[None].flip(1), torch.tensor([9]), 2, 4, 2, 40)
        SPEC["position_mask"].check(run_one(simulator.position_mask(*args))[0], args)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_channel_first_features(self, dtype):
        grains = torch.randint(2, (2, 3, 4), generator=torch.Generator().manual_seed(2))
        args = (channel_first(2, 6, 8, 9, dtype=dtype), grains, False, 96)
        packed = run_one(simulator.pack(*args))
        SPEC["pack"].check(tuple(packed), args)
        args = (channel_first(2, 6, 8, 9, dtype=dtype, seed=1), *packed[1:], grains, 2)
        SPEC["unpack_backward"].check(run_one(simulator.unpack_backward(*args))[0], args)


@pytest.mark.parametrize("op", ["diffusion_loss", "posterior", "posterior_backward", "p_sample"])
def test_rows_that_do_not_fit_in_shared_memory_are_read_again_with_the_same_result(op):
    spec = SPEC[op]
    shapes = [dict(shape) | {"L": min(shape["L"], 6)} for shape in spec.test_shapes[3:]]
    cases = [spec.inputs(shape, dtype, "cpu", 4) for shape in shapes for dtype in DTYPES[:3]]
    calls = [simulator.CALLS[op](*args) for args in cases]
    for args, kept, again in zip(cases, simulator.run(calls), simulator.run(calls, shared_bytes=2048), strict=True):
        spec.check(simulator.result(op, again), args)
        for a, b in zip(kept, again, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("diffusion_loss", dict(B=1, L=1, K=12288, T=4)),
        ("posterior", dict(B=1, L=1, K=12288, T=4)),
        ("posterior_backward", dict(B=1, L=1, K=12288, T=4)),
        ("p_sample", dict(B=1, L=1, K=12288, T=4)),
        ("matrix_loss", dict(B=1, L=2, K=170, T=2)),
    ],
)
def test_rows_that_fill_48_kilobytes_leave_none_for_the_kernels_own_variables(op, shape):
    """Dynamic shared memory alone is not beyond what a launch may have unasked: with the kernel's own it is."""
    args = SPEC[op].inputs(shape, torch.float32, "cpu", 2)
    SPEC[op].check(simulator.result(op, run_one(simulator.CALLS[op](*args))), args)


def test_what_a_kernel_may_have_of_shared_memory_is_never_lowered():
    spec = SPEC["p_sample"]
    cases = [spec.inputs(dict(B=1, L=1, K=K, T=4), torch.float32, "cpu", 3) for K in (13000, 16384, 13000)]
    for args, written in zip(cases, simulator.run([simulator.p_sample(*args) for args in cases]), strict=True):
        spec.check(simulator.result("p_sample", written), args)


def test_tokens_that_logits_cannot_matter_to_read_none():
    """Absorbing diffusion's tokens that are not masked; in the loss also those of scale 0. AddressSanitizer watches."""
    levels = torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.2, 0.8]], dtype=torch.float64)
    x_t = torch.arange(30).view(2, 15)
    step = (x_t, torch.tensor([2, 1]), torch.tensor([1, 0]), levels, None)
    key = random_key("cpu", 1)
    draw = simulator.p_sample(torch.zeros(2, 15, 30), None, *step, None, False, 1.0, 1.0, 0, 1.0, key)
    draw.buffers[0] = torch.zeros(1)
    assert torch.equal(run_one(draw)[0], x_t)
    for seen, scale, aux_weight in ((x_t, 1.0, 0.0), (torch.full_like(x_t, 30), 0.0, 0.5)):
        arguments = (x_t, seen, *step[1:], torch.full((2, 15), scale, dtype=torch.float64), False, aux_weight, True)
        loss = simulator.diffusion_loss(torch.zeros(2, 15, 30), *arguments)
        loss.buffers[0] = torch.zeros(1)
        for written in run_one(loss):
            assert not written.any()


class TestDiffusionLoss:
    def test_without_gradient(self):
        args = SPEC["diffusion_loss"].inputs(dict(B=3, L=4, K=37, T=10), torch.float32, "cpu", 5)
        [loss] = run_one(simulator.diffusion_loss(*args[:-1], False))
        assert torch.equal(loss, run_one(simulator.diffusion_loss(*args))[0])

    def test_logits_of_minus_infinity_nan_and_certainty(self):
        x0, *step = noised(dict(B=2, L=6, K=8, T=10), "cpu", 6)
        logits = torch.randn(2, 6, 8)
        logits[:, 0] = torch.nan
        logits[:, 1, 3] = -torch.inf
        logits[:, 2] = -torch.inf
        logits[:, 3] = 200.0 * torch.nn.functional.one_hot(x0[:, 3], 8)
        logits[:, 4] = -200.0 * torch.nn.functional.one_hot(x0[:, 4], 8)
        scale = torch.ones(2, 6, dtype=torch.float64)
        loss, grad = run_one(simulator.diffusion_loss(logits, x0, *step, scale, False, 0.0, True))
        want = diffusion_loss(logits.double(), x0, *step, False, 0.0)
        torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6, equal_nan=True)
        assert loss[:, [0, 2]].isnan().all() and grad[:, [1, 3, 4, 5]].isfinite().all()

    def test_levels_and_codes_out_of_range_stay_within_memory(self):
        x0 = torch.tensor([[5, -1], [1 << 40, 0]])
        t, s = torch.tensor([99, -5]), torch.tensor([-3, 1 << 50])
        alpha_bar = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
        scale = torch.ones(2, 2, dtype=torch.float64)
        for levels in (alpha_bar[:, None], torch.stack([alpha_bar, 0.7 * (1 - alpha_bar)], dim=1)):
            for K in (4, 5):
                logits = torch.randn(2, 2, K)
                step = (x0.flip(0), t, s, levels, None)
                run_one(simulator.diffusion_loss(logits, x0, *step, scale, True, 0.1, True))
                sample = simulator.p_sample(logits, None, *step, None, True, 1.0, 1.0, 2, 0.9, random_key("cpu", 1))
                [x_s] = run_one(sample)
                assert x_s.min() >= 0 and x_s.max() < K + levels.shape[1] - 1


class TestPosterior:
    @staticmethod
    def assert_match_the_reference(cases: list[tuple], **device) -> None:
        """cases: arguments of `posterior`; its gradient is that of a random vector."""
        backward = []
        for case in cases:
            B, L, K = case[0].shape
            g = torch.Generator().manual_seed(K)
            grad = torch.randn(B, L, K + case[4].shape[1] - 1, generator=g).to(case[0].dtype)
            backward.append((grad, *case))
        for op, arguments in (("posterior", cases), ("posterior_backward", backward)):
            results = simulator.run([simulator.CALLS[op](*args) for args in arguments], **device)
            for args, written in zip(arguments, results, strict=True):
                SPEC[op].check(simulator.result(op, written), args)

    @pytest.mark.parametrize("family", ["uniform", "absorbing", "mask_and_replace", "marginal"])
    def test_the_logarithm_of_a_one_hot_is_the_true_x0(self, family):
        cases = []
        for K, step in ((12, 1), (12, 3), (12, 10), (1, 1)):
            x0, *tokens = noised(dict(B=3, L=6, K=K, T=10, family=family, step=step), "cpu", 7)
            one_hot = torch.nn.functional.one_hot(x0, K).log()
            cases += [(one_hot.to(dtype), *tokens, rule) for dtype in DTYPES for rule in (False, True)]
        self.assert_match_the_reference(cases)

    def test_codes_that_no_noise_gives_keep_probabilities_below_float32(self):
        x0, x_t, t, s, levels, noise = noised(dict(B=3, L=6, K=40, T=10, family="marginal"), "cpu", 8)
        noise[::2] = 0
        x_t[:] = torch.randint(40, x_t.shape, generator=torch.Generator().manual_seed(1)) // 2 * 2 + 1
        logits = torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(2))
        logits[..., :8] -= 300
        self.assert_match_the_reference([(logits, x_t, t, s, levels, noise / noise.sum(), rule) for rule in (0, 1)])

    @pytest.mark.parametrize("logit", [-200.0, 60.0, 110.0, 200.0])
    def test_a_shift_may_take_the_largest_logit_below_all_others(self, logit):
        """A code that noise hardly ever gives: by the marginal rule some 138 less."""
        noise = torch.tensor([1e-60, 0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
        levels = torch.tensor([[1.0], [0.9], [0.5], [0.1]], dtype=torch.float64)
        x_t, t = torch.zeros(2, 2, dtype=torch.int64), torch.tensor([2, 3])
        logits = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(3))
        logits[..., 0] = logit
        self.assert_match_the_reference(
            [(logits.to(dtype), x_t, t, s, levels, noise, True) for dtype in DTYPES for s in (t - 1, t * 0)]
        )

    def test_many_codes(self):
        shapes = [dict(B=1, L=1, K=50257, T=10, family=family) for family in ("uniform", "mask_and_replace")]
        cases = [SPEC["posterior"].inputs(shape, torch.float32, "cpu", 9) for shape in shapes]
        for device in (dict(), dict(shared_bytes=99 << 10)):
            self.assert_match_the_reference(cases, **device)

    def test_logits_that_are_not_numbers_spoil_their_row_alone(self):
        for family in ("uniform", "absorbing"):
            logits, x_t, *rest = SPEC["posterior"].inputs(
                dict(B=2, L=6, K=8, T=10, family=family), torch.float32, "cpu", 10
            )
            logits[:, 0], logits[:, 1, 3], logits[:, 2] = torch.nan, torch.nan, -torch.inf
            logits[:, 3, 5] = torch.inf
            logits[0, 4].scatter_(-1, x_t[0, 4:5].clamp(max=7), torch.nan)
            self.assert_match_the_reference([(logits, x_t, *rest)])

    def test_tokens_that_are_certain_read_no_logits(self):
        levels = torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.2, 0.8]], dtype=torch.float64)
        x_t = torch.arange(30).view(2, 15)
        step = (x_t, torch.tensor([2, 1]), torch.tensor([1, 0]), levels, None, True)
        log_p = simulator.posterior(torch.zeros(2, 15, 30), *step)
        log_p.buffers[0] = torch.zeros(1)
        assert torch.equal(run_one(log_p)[0], torch.nn.functional.one_hot(x_t, 31).log())
        gradient = simulator.posterior_backward(torch.zeros(2, 15, 31), torch.zeros(2, 15, 30), *step)
        gradient.buffers[:2] = [torch.zeros(1)] * 2
        assert not run_one(gradient)[0].any()

    def test_levels_and_codes_out_of_range_stay_within_memory(self):
        x_t = torch.tensor([[5, -1], [1 << 40, -(1 << 63)]])
        t, s = torch.tensor([99, -5]), torch.tensor([-3, 1 << 50])
        alpha_bar = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
        for levels in (alpha_bar[:, None], torch.stack([alpha_bar, 0.7 * (1 - alpha_bar)], dim=1)):
            for K in (4, 5):
                args = (torch.randn(2, 2, K), x_t, t, s, levels, None, True)
                run_one(simulator.posterior(*args))
                run_one(simulator.posterior_backward(torch.randn(2, 2, K + levels.shape[1] - 1), *args))


class TestPSample:
    def test_given_positions_read_no_logits(self):
        x0, *step = noised(dict(B=3, L=5, K=64, T=10), "cpu", 1)
        s = step[2]
        key = random_key("cpu", 1)
        call = simulator.p_sample(torch.zeros(3, 5, 64), None, *step, x0, False, 1.0, 1.0, 0, 1.0, key)
        call.buffers[0] = torch.zeros(1)
        [x_s] = run_one(call)
        assert torch.equal(x_s[s == 0], x0[s == 0]) and bool((s == 0).any())

    def test_a_row_that_is_nan_or_infinite_keeps_x_t(self):
        _, *step = noised(dict(B=2, L=50, K=9, T=2), "cpu", 2)
        logits = torch.randn(2, 50, 9)
        logits[:, ::3], logits[:, 1::3, 4] = torch.nan, torch.nan
        logits[:, 2::3, 5] = torch.inf
        for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.5)):
            args = (logits, None, *step, None, False, 1.0, 1.0, top_k, top_p, random_key("cpu", 2))
            [x_s] = run_one(simulator.p_sample(*args))
            assert torch.equal(x_s, step[0])

    @pytest.mark.parametrize("value", [0.0, -3.25])
    def test_of_equal_codes_the_lowest_are_kept(self, value):
        """All codes have one score: top_k keeps the first, top_p the first of those whose share it asks for."""
        B, L, K = 2, 60, 64
        levels = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
        t, s = torch.ones(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
        x_t = torch.full((B, L), K - 1)
        for top_k, top_p, most in ((5, 1.0, 5), (0, 0.25, 16), (8, 0.5, 4)):
            logits = torch.full((B, L, K), value)
            args = (logits, None, x_t, t, s, levels, None, None, False, 1.0, 1.0, top_k, top_p, random_key("cpu", 5))
            [x_s] = run_one(simulator.p_sample(*args))
            assert sorted(set(x_s.flatten().tolist())) == list(range(most))

    def test_locates_the_code_at_which_the_cumulative_weight_passes_the_target(self):
        """Also on a boundary, at zero, and, as rounding can ask for, beyond the end: the last code of any weight."""
        K = 520
        scores = torch.full((K,), -torch.inf)
        scores[[2, 3, 255, 256, 300, 517]] = 0
        targets = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 3.999, 4.0, 5.5, 6.0, 1e30]
        codes = [2, 2, 3, 3, 255, 256, 256, 300, 517, 517, 517]
        call = Call("locate", [K, len(targets)], [], [
            scores, torch.tensor(targets, dtype=torch.float64), Written((len(targets),), torch.int32)
        ])  # fmt: skip
        for settings in (dict(), dict(order=1), dict(sanitizer="races")):
            assert run_one(call, **settings)[0].tolist() == codes

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("K", [12, 13, 2048])
    def test_codes_without_probability_are_never_drawn(self, K, dtype):
        B, L = 2, 100
        alpha_bar = torch.tensor([1.0, 0.0], dtype=torch.float64)
        t, s = torch.ones(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
        logits = torch.full((B, L, K), -torch.inf, dtype=dtype)
        logits[..., [1, 4, K - 3]] = torch.tensor([0.0, 1.0, -1.0], dtype=dtype)
        for temperature in (1.0, 1e-40, 1e300):
            step = (torch.zeros(B, L, dtype=torch.int64), t, s, alpha_bar[:, None], None)
            args = (logits, None, *step, None, False, temperature, 1.0, 0, 1.0, random_key("cpu", 3))
            [x_s] = run_one(simulator.p_sample(*args))
            drawn = {1: [1, 4, K - 3], 1e-40: [4], 1e300: [1, 4, K - 3]}[temperature]
            assert sorted(set(x_s.flatten().tolist())) == drawn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [8, 131])
def test_scale_rows_multiplies_each_row_in_place_and_leaves_rows_of_scale_one(dtype, K):
    rows = torch.randn(30, K, generator=torch.Generator().manual_seed(K)).to(dtype)
    rows[3, 0] = torch.nan
    scale = torch.linspace(0, 2, 30, dtype=torch.promote_types(dtype, torch.float32))
    scale[3] = 1
    [got] = run_one(simulator.scale_rows_(rows, scale))
    want = (rows.to(scale.dtype) * scale[:, None]).to(dtype)
    assert torch.equal(got[3].view(torch.uint8), rows[3].view(torch.uint8))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    [got] = run_one(simulator.scale_rows_(rows, scale[10:11]))
    torch.testing.assert_close(got, (rows.to(scale.dtype) * scale[10]).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_rows_more_than_two_to_the_31_elements_apart():
    g = torch.Generator().manual_seed(1)
    for D in (8, 9):
        x, codebook = torch.randn(3, D, generator=g), torch.randn(40, D, generator=g)
        outputs = [
            Written((3,), torch.int64), Written((3, D), x.dtype), Written((3,), x.dtype), Written((40,), torch.int64),
            Written((40,), x.dtype), Written((40, D), x.dtype),
        ]  # fmt: skip
        indices, *rest = run_one(Call("far_rows", [3, D, 40], [], [x, codebook, *outputs]))
        want = nearest(x, codebook)
        assert torch.equal(indices, want)
        for a, b in zip(rest, [*lookup(x, codebook, want), *codebook_stats(x, want, None, 40)], strict=True):
            torch.testing.assert_close(a, b)


def test_a_device_that_does_not_exist_is_an_error_code():
    with pytest.raises(RuntimeError, match="error code 1101"):
        run_one(Call("wrong_device", [0], [], [Written((1,), torch.float32), torch.ones(1)]))
