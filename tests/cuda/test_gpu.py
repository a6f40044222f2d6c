"""What only a device shows: graphs, streams, several devices, memory beyond 2^31 elements, races of real threads."""

import pytest
import torch

import vqfast
from vqfast.kernels.nearest.reference import nearest
from vqfast.kernels.specs import SPECS as ALL_SPECS
from vqfast.ops import registry
from vqfast.ops.backends import cuda
from vqfast.ops.prepared import METRICS

pytestmark = pytest.mark.gpu
SPECS = [spec for spec in ALL_SPECS if spec.op in cuda.KERNELS]
SPEC = {spec.op: spec for spec in SPECS}
GRAPH_SHAPES = {spec.op: spec.test_shapes[:4][-1] for spec in SPECS}
# Noise of its own has its running sum taken inside the op.
GRAPH_CASES = list(GRAPH_SHAPES.items()) + [
    (spec.op, shape) for spec in SPECS for shape in spec.test_shapes if shape.get("family") == "marginal"
]


@pytest.fixture(autouse=True)
def _device():
    reason = registry.status("cuda")["cuda"]
    if reason is not None:
        pytest.skip(reason)
    with vqfast.backend("cuda"):
        yield


def op_of(spec):
    return getattr(torch.ops.vqfast, spec.op)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.op)
def test_bench_shapes_match_the_reference(spec):
    for shape in spec.bench_shapes:
        for dtype in spec.dtypes[:1] + spec.dtypes[2:3]:
            args = spec.inputs(shape, dtype, "cuda", seed=1)
            spec.check(op_of(spec)(*args), args)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scores", ["float32", "bfloat16", "hopper"])
def test_search_by_every_kind_of_scores(scores, metric, monkeypatch):
    """A kind that the device does not have gives way to the next best."""
    monkeypatch.setenv("VQFAST_CUDA_SCORES", scores)
    g = torch.Generator("cuda").manual_seed(0)
    for N, K, D in (
        (3000, 5000, 8),
        (30000, 1100, 20),  # more items than multiprocessors
        (26000, 600, 61),
        (700, 2000, 64),
        (129, 257, 100),
        (1000, 3000, 256),
        (300, 700, 512),
        (40, 600, 700),
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x, codebook = (torch.randn(n, D, generator=g, device="cuda").to(dtype) for n in (N, K))
            codebook[K // 2 :] = codebook[: K - K // 2]
            x[3], x[5, 0] = 0, torch.nan
            got = vqfast.ops.nearest_code(x, codebook, metric=metric)
            assert torch.equal(got, nearest(x, codebook, None, metric)), (N, K, D, dtype)


@pytest.mark.parametrize(("name", "shape"), GRAPH_CASES)
def test_a_cuda_graph_replays_the_op_on_new_inputs(name, shape):
    spec = SPEC[name]
    op, dtype = op_of(spec), spec.dtypes[0]
    args = spec.inputs(shape, dtype, "cuda", seed=1)
    op(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*args)
    for seed in (2, 3):
        for held, new in zip(args, spec.inputs(shape, dtype, "cuda", seed=seed), strict=True):
            if isinstance(held, torch.Tensor):
                held.copy_(new)
        for output in captured if isinstance(captured, tuple) else (captured,):
            output.view(torch.uint8).fill_(0xFF)
        graph.replay()
        torch.cuda.synchronize()
        spec.check(captured, args)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.op)
def test_same_bits_every_time(spec):
    args = spec.inputs(spec.bench_shapes[0], spec.dtypes[0], "cuda", seed=4)
    first = op_of(spec)(*args)
    for _ in range(50):
        other = op_of(spec)(*args)
        pairs = zip(first, other, strict=True) if isinstance(first, tuple) else [(first, other)]
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.op)
def test_work_goes_to_the_current_stream(spec):
    args = spec.inputs(GRAPH_SHAPES[spec.op], spec.dtypes[0], "cuda", seed=5)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        op_of(spec)(*args)  # its memory is in torch's cache from now on: a fresh allocation would wait
        torch.cuda._sleep(100_000_000)  # 50 ms: other tests may keep the processors busy
        result = op_of(spec)(*args)
        assert not stream.query(), "the op waited for the device"
    stream.synchronize()
    spec.check(result, args)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.op)
def test_two_streams_at_once(spec):
    """Each with memory of its own, though allocated, given back and allocated again meanwhile."""
    args = [spec.inputs(GRAPH_SHAPES[spec.op], spec.dtypes[0], "cuda", seed=seed) for seed in (6, 7)]
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, own in zip(streams, args, strict=True):
            with torch.cuda.stream(stream):
                results.append((op_of(spec)(*own), own))
    torch.cuda.synchronize()
    for result, own in results:
        spec.check(result, own)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.op)
def test_tensors_of_another_device_than_the_current_one(spec):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    args = spec.inputs(GRAPH_SHAPES[spec.op], spec.dtypes[0], "cuda:1", seed=8)
    spec.check(op_of(spec)(*args), args)
    assert torch.cuda.current_device() == 0


CHAIN = vqfast.ops.Uniform(50, torch.linspace(1, 0.01, 11, dtype=torch.float64))


def _quantized(estimator: str):
    def result(x, codebook):
        out = vqfast.ops.quantize(x, codebook, estimator=estimator)
        return out.loss + (out.quantized * torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype)).sum()

    return result


def _diffused(logits):
    B, L, K = logits.shape
    x0, x_t = (torch.arange(step, step + step * B * L, step, device="cuda").view(B, L) % K for step in (1, 7))
    return 3 * vqfast.ops.diffusion_loss(logits, x0, x_t, 5, CHAIN, aux_weight=0.1)


def _predicted(logits):
    B, L, K = logits.shape
    x_t = torch.arange(0, 7 * B * L, 7, device=logits.device).view(B, L) % K
    log_p = vqfast.ops.posterior(logits, x_t, 5, 3, CHAIN, rule="marginal")
    return (log_p * torch.linspace(-1, 1, K, device=logits.device, dtype=logits.dtype)).sum()


def _repacked(x):
    grains = (torch.arange(2 * 4 * 4, device="cuda") % 2).view(2, 4, 4)
    packed = vqfast.ops.pack(x, grains)
    return vqfast.ops.unpack(packed, grains).square().sum()


DIFFERENTIABLE = {
    **{f"quantize-{name}": (_quantized(name), (200, 16), (40, 16)) for name in ("ste", "rotation", "none")},
    "posterior": (_predicted, (3, 7, 50)),
    "diffusion_loss": (_diffused, (3, 7, 50)),
    "unpack": (_repacked, (2, 8, 8, 5)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_those_of_the_definition_in_float64(name, compiled):
    function, *shapes = DIFFERENTIABLE[name]
    g = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(shape, generator=g, device="cuda") for shape in shapes]

    def gradients(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [value.to(dtype).requires_grad_() for value in inputs]
        result = function(*leaves)
        return [result.detach(), *torch.autograd.grad(result, leaves)]

    torch._dynamo.reset()
    got = gradients(torch.compile(function, fullgraph=True) if compiled else function, torch.float32)
    with vqfast.backend("reference"):
        want = gradients(function, torch.float64)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


def test_channel_first_input_of_more_than_two_to_the_31_elements():
    """(2, 8, 12000, 12000) bfloat16 is 2.3 * 10^9 elements; the last rows lie beyond 2^31."""
    x = torch.empty(2, 8, 12000, 12000, dtype=torch.bfloat16, device="cuda")
    for part in x:
        part.normal_()
    codebook = torch.randn(40, 8, device="cuda").bfloat16()
    rows = x.permute(0, 2, 3, 1)
    indices = vqfast.ops.nearest_code(rows, codebook)
    quantized, error, counts = torch.ops.vqfast.lookup(rows, codebook, indices)
    assert int(counts.sum()) == indices.numel()
    tail = rows[-1, -2:]
    assert torch.equal(indices[-1, -2:], nearest(tail, codebook))
    assert torch.equal(quantized[-1, -2:], codebook[indices[-1, -2:]])
    torch.testing.assert_close(error[-1, -2:], (tail.float() - quantized[-1, -2:].float()).square().sum(-1))


def test_more_than_two_to_the_31_logits():
    B, L, K = 1, 2**17 + 3, 2**14
    logits = torch.randn(B, L, K, dtype=torch.bfloat16, device="cuda")
    transition = vqfast.ops.Uniform(K, torch.linspace(1, 0.01, 11, dtype=torch.float64))
    x0 = torch.randint(K, (B, L), device="cuda")
    x_t = vqfast.ops.q_sample(x0, 5, transition)
    loss = vqfast.ops.diffusion_loss(logits, x0, x_t, 5, transition, reduction="none")
    with vqfast.backend("reference"):
        want = vqfast.ops.diffusion_loss(logits[:, -4:], x0[:, -4:], x_t[:, -4:], 5, transition, reduction="none")
    torch.testing.assert_close(loss[:, -4:], want, rtol=2e-6, atol=2e-6)
    x_s = vqfast.ops.p_sample(logits, x_t, 5, 2, transition)
    assert int(x_s.min()) >= 0 and int(x_s.max()) < K


def test_collapsed_codebook_and_hard_rows_at_size():
    """Every vector at one code, and every row undecided by its scores: slow paths, still right."""
    x = torch.randn(20000, 16, device="cuda")
    indices = torch.zeros(20000, dtype=torch.int64, device="cuda")
    args = (x, indices, None, 64)
    SPEC["codebook_stats"].check(torch.ops.vqfast.codebook_stats(*args), args)
    codebook = torch.randn(128, 16, device="cuda").repeat(8, 1)
    assert torch.equal(vqfast.ops.nearest_code(x, codebook), nearest(x, codebook))
