"""The search by tensor cores, on the simulated device: whatever bfloat16 leaves open, the nearest code is found.

Both kernels, the portable one and Hopper's.
"""

import pytest
import simulator
import torch

from vqfast.kernels.nearest.reference import nearest
from vqfast.kernels.specs import SPECS
from vqfast.ops.prepared import METRICS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, params=["bfloat16", "hopper"])
def _by_tensor_cores(monkeypatch, request):
    monkeypatch.setenv("VQFAST_CUDA_SCORES", request.param)


def random_pair(N: int, K: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype) for n in (N, K))


def assert_found(cases, **device) -> list[int]:
    """The nearest of every case, and how many rows each says were left open."""
    results = simulator.run([simulator.nearest(*case) for case in cases], **device)
    for case, (indices, _) in zip(cases, results, strict=True):
        assert torch.equal(indices, nearest(*(case[i] if i < len(case) else None for i in range(3)), *case[4:5]))
    return [int(count) for _, count in results]


def test_every_size_of_the_spec():
    spec = next(s for s in SPECS if s.op == "nearest")
    cases = [spec.inputs(shape, dtype, "cpu", 1) for shape in spec.test_shapes for dtype in spec.dtypes[:2]]
    results = simulator.run([simulator.nearest(*args) for args in cases])
    for args, written in zip(cases, results, strict=True):
        spec.check(simulator.result("nearest", written), args)


@pytest.mark.parametrize("D", [1, 16, 17, 64, 65, 200])
def test_features_in_any_number_of_panels(D):
    assert_found([random_pair(130, 300, D, dtype=dtype) for dtype in DTYPES[:3]])


def test_rows_of_any_memory_in_chunks_and_in_any_order():
    x, codebook = random_pair(300, 600, 20)
    expected = nearest(x, codebook)
    # grid_x = 2: the rows are packed 256 at a time. Less shared memory: a ring of two stages.
    for device in (dict(order=1), dict(order=7, grid_x=2), dict(multiprocessors=132), dict(shared_bytes=163 << 10)):
        ((indices, _),) = simulator.run([simulator.nearest(x, codebook)], **device)
        assert torch.equal(indices, expected), device


def test_few_rows_are_left_open_and_most_codes_never_compared():
    x, codebook = random_pair(256, 512, 64)
    (count,) = assert_found([(x, codebook)])
    assert 0 < count < 128


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_heads_masks_and_what_is_not_finite(metric):
    g = torch.Generator().manual_seed(3)
    x, codebook = torch.randn(60, 2, 7, generator=g), torch.randn(2, 150, 7, generator=g).repeat(1, 2, 1)
    codebook[0, 80], codebook[0, 0, 1], codebook[1, 1, 2] = 0, torch.nan, torch.inf
    x[3], x[4, 0, 2], x[5, 1, 0] = 0, torch.nan, -torch.inf
    mask = torch.rand(60, 2, generator=g) > 0.3
    calls = [simulator.nearest(x, codebook, mask, metric=metric, exact=exact) for exact in (True, False)]
    (indices, _), (fast, none) = simulator.run(calls)
    assert torch.equal(indices, nearest(x, codebook, mask, metric)) and none == 0
    assert torch.equal(fast < 0, ~mask) and (fast < 300).all()


def test_more_equal_codes_than_a_row_has_room_for():
    """Lists that are cleared while the scores come in, and such as overflow: near codes grow ever nearer, all tie."""
    x, codebook = random_pair(40, 20, 24)
    ties = codebook.repeat(60, 1)
    direction = x[:1] / x[:1].norm()
    nearing = x[:1] + direction * torch.linspace(3, 0.01, 1500)[:, None]
    assert_found([(x, ties), (x, nearing), (x, nearing.flip(0)), (x, codebook[:1].repeat(700, 1))])


def test_a_fast_search_does_not_depend_on_the_order_of_the_threads():
    """Though more codes tie than a row has room for, and come in in another order."""
    x, codebook = random_pair(40, 20, 24)
    calls = [simulator.nearest(x, codebook.repeat(60, 1), exact=False)]
    found = [simulator.run(calls, order=order)[0][0] for order in range(3)]
    assert all(torch.equal(indices, found[0]) for indices in found)


@pytest.mark.parametrize("metric", METRICS)
def test_scales_and_offsets(metric):
    x, codebook = random_pair(40, 60, 10)
    pairs = [(x * s + m, codebook * s + m) for s, m in ((1e-30, 0), (1e-12, 0), (1, 100), (1, 1e4), (1e20, 0))]
    assert_found([(*pair, None, None, metric) for pair in pairs])


@pytest.mark.parametrize(
    ("N", "K", "D"), [(20, 300, 9), pytest.param(130, 300, 70, marks=pytest.mark.slow)], ids=["small", "several panels"]
)
def test_no_two_threads_race_for_memory(N, K, D):
    x, codebook = random_pair(N, K, D)
    codebook[250:] = codebook[:50]
    x[4] = torch.nan
    assert_found([(x, codebook)], sanitizer="races", multiprocessors=1)
