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
    for _ in range(5):
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
        torch.cuda._sleep(20_000_000)
        result = op_of(spec)(*args)
        assert not stream.query(), "the op waited for the device"
    stream.synchronize()
    spec.check(result, args)


def test_tensors_of_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    x, codebook = torch.randn(100, 8, device="cuda:1"), torch.randn(50, 8, device="cuda:1")
    assert torch.equal(vqfast.ops.nearest_code(x, codebook), nearest(x, codebook))
    assert torch.cuda.current_device() == 0


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
