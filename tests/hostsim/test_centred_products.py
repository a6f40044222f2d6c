"""Products and cosines with a codebook far from the origin, on the simulated device, by every kind of scores: the codes
are centred, so that the scores still tell most of them apart, and the nearest code is found in any case."""

import pytest
import simulator
import torch
from torch import Tensor

from vqfast.kernels.nearest.reference import nearest
from vqfast.ops.prepared import METRICS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PRODUCTS = ("dot", "cosine")


@pytest.fixture(autouse=True, params=["float32", "bfloat16", "hopper"])
def scores(monkeypatch, request) -> str:
    monkeypatch.setenv("VQFAST_CUDA_SCORES", request.param)
    return request.param


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_found(cases, **device) -> list[int]:
    """The nearest of every (x, codebook, mask, metric), and how many rows each says were left open."""
    calls = [simulator.nearest(x, codebook, mask, metric=metric) for x, codebook, mask, metric in cases]
    results = simulator.run(calls, **device)
    for number, (case, (indices, _)) in enumerate(zip(cases, results, strict=True)):
        assert torch.equal(indices, nearest(*case)), f"case {number}: {case[3]}, {case[1].dtype}"
    return [int(count) for _, count in results]


def most_open(scores: str, near: int) -> int:
    """How many of 200 rows may be left open where `near` are at the origin: rounding gives and takes a few."""
    return near + (2 if scores == "float32" else 10)


def test_as_few_rows_stay_open_as_at_the_origin(scores):
    """For cosines, an offset makes a narrow cone of the codes."""
    x, codebook, offset = gaussian(200, 24), gaussian(300, 24, seed=1), gaussian(24, seed=2)
    codebooks = [codebook + size * offset for size in (0, 1e2, 1e3, 1e4)]
    counts = assert_found([(x.float(), codes.float(), None, metric) for metric in PRODUCTS for codes in codebooks])
    for near, *far in (counts[:4], counts[4:]):
        assert max(far) <= most_open(scores, near)


def test_rows_as_far_out_as_the_codes(scores):
    """Rows are not centred: in a cone that is narrower still, bfloat16 and then float32 leaves most of them open."""
    x, codebook, offset = gaussian(200, 24), gaussian(300, 24, seed=1), gaussian(24, seed=2)
    both = {size: ((x + size * offset).float(), (codebook + size * offset).float()) for size in (1e1, 1e2, 1e4)}
    cases = [(*both[1e2], None, "dot"), (*both[1e4], None, "dot"), (*both[1e1], None, "cosine")]
    assert max(assert_found([*cases, (*both[1e4], None, "cosine")])[: 2 if scores != "float32" else 3]) <= 2


def test_every_dtype(scores):
    x, codebook, offset = gaussian(60, 17), gaussian(90, 17, seed=1), 6 * gaussian(17, seed=2)
    pairs = [(rows.to(t), (codebook + offset).to(t)) for rows in (x, x + offset) for t in DTYPES]
    counts = assert_found([(*pair, None, metric) for pair in pairs for metric in PRODUCTS])
    assert scores != "float32" or max(counts) <= 2


def test_codes_that_are_not_finite_move_no_centre(scores):
    """Half of them; and zero codes and zero rows, whose products and cosines are 0."""
    x, codebook = gaussian(200, 12).float(), (gaussian(300, 12, seed=1) + 1e3 * gaussian(12, seed=2)).float()
    clean = codebook[1::2].clone()
    codebook[::4, 3], codebook[2::8], codebook[6::8, 0] = torch.inf, torch.nan, -torch.inf
    for near, far in torch.tensor(
        assert_found([(x, codes, None, metric) for metric in PRODUCTS for codes in (clean, codebook)])
    ).view(2, 2):
        assert far <= most_open(scores, near)
    codebook[5], codebook[150] = 0, codebook[149]
    rows = x[:40].clone()
    rows[3], rows[4, 2], rows[5, 0] = 0, torch.nan, torch.inf
    codebooks = [codebook, -codebook.abs(), torch.full_like(codebook, torch.inf)]
    assert_found([(rows, codes, None, metric) for metric in PRODUCTS for codes in codebooks])


def test_any_scale(scores):
    x, codebook = gaussian(40, 10).float(), (gaussian(60, 10, seed=1) + 100 * gaussian(10, seed=2)).float()
    pairs = [(x * s, codebook * s) for s in (1e-30, 1e-20, 1e-6, 1e6, 1e18, 1e30)]
    # Rows of every size beside each other.
    pairs.append((x * torch.logspace(-18, 18, 40)[:, None], codebook))
    counts = assert_found([(*pair, None, metric) for metric in PRODUCTS for pair in pairs])
    assert scores != "float32" or max(*counts[:6], *counts[7:13]) <= 2


def test_ties_and_near_ties():
    """Every code again, and again one rounding away: in the direction of some rows, against that of others."""
    x, codebook = gaussian(40, 9).float(), (gaussian(40, 9, seed=1) + 300).float()
    up, down = torch.nextafter(codebook, torch.tensor(torch.inf)), torch.nextafter(codebook, torch.tensor(-torch.inf))
    near = torch.cat([codebook, up, codebook, down])
    one_bit = codebook.repeat(3, 1)
    one_bit[::2, 4] = torch.nextafter(one_bit[::2, 4], torch.tensor(torch.inf))
    pairs = [(rows, codes) for codes in (near, near.flip(0), one_bit) for rows in (x, codebook)]
    assert_found([(*pair, None, metric) for metric in METRICS for pair in pairs])


def test_one_code_one_feature_and_codes_of_one_direction(scores):
    x, codebook = gaussian(50, 8).float(), (gaussian(30, 8, seed=1) + 1e3).float()
    direction = codebook[:1] * torch.arange(1, 70)[:, None]
    cases = [(x, codebook[:1]), (x[:, :1], codebook[:, :1]), (x[:, :1], -codebook[:, :1]), (x, direction)]
    counts = assert_found([(*pair, None, metric) for pair in cases for metric in PRODUCTS])
    assert counts[:2] == [0, 0]


def test_heads_and_masks():
    x, codebook = gaussian(60, 2, 7).float(), gaussian(2, 80, 7, seed=1).float()
    codebook[0] += 200 * gaussian(7, seed=2).float()
    mask = torch.rand(60, 2, generator=torch.Generator().manual_seed(3)) > 0.3
    assert_found([(x, codes, mask, metric) for codes in (codebook, codebook.flip(0)) for metric in PRODUCTS])


def test_float64_that_a_common_scale_brings_to_the_edge_of_its_range():
    """Deviations of 1e-250 from codes at 1e20; a code that no sample meets, far beyond the others; norms whose inverse
    is no normal number; and cones narrower than float32 can tell from a line."""
    x, codebook = gaussian(30, 6), gaussian(40, 6, seed=1)
    tiny = torch.cat([codebook * 1e-250, torch.full((40, 1), 1e20)], 1).repeat(2, 1)
    large = gaussian(600, 6, seed=2)
    large[1] *= 1e303
    rows = torch.cat([x, torch.zeros(30, 1)], 1)
    cases = [(rows, tiny, None, metric) for metric in PRODUCTS] + [(x, large.repeat(2, 1), None, "dot")]
    cases += [(x, codebook * scale, None, "cosine") for scale in (1e-320, 1e-308, 3e307)]
    cone = torch.ones(6, dtype=torch.float64)
    cases += [(x, cone + width * codebook, None, "cosine") for width in (1e-6, 1e-8, 1e-10, 1e-13)]
    assert_found(cases)


def test_same_bits_in_any_order_of_threads_and_blocks_and_on_any_size_of_device():
    x, codebook = gaussian(140, 21).float(), (gaussian(300, 21, seed=1) + 100).float()
    calls = [simulator.nearest(x, codebook, metric=metric) for metric in PRODUCTS]
    expected = simulator.run(calls)
    for device in (dict(order=5), dict(multiprocessors=132)):
        for first, other in zip(expected, simulator.run(calls, **device), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), device


def test_a_fast_search_finds_a_code_that_is_nearly_the_best():
    x, codebook = gaussian(100, 16), gaussian(200, 16, seed=1) + 50
    calls = [simulator.nearest(x.float(), codebook.float(), metric=metric, exact=False) for metric in PRODUCTS]
    for metric, (indices, _) in zip(PRODUCTS, simulator.run(calls), strict=True):
        worth = x @ codebook.T / (codebook.norm(dim=1) if metric == "cosine" else 1)
        best = worth.max(1).values
        assert ((best - worth.gather(1, indices[:, None])[:, 0]) <= 0.02 * (best - worth.mean(1))).all()
