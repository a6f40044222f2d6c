"""Every path that a search can take gives the reference's codes, and the table says which one it takes."""

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import vqfast
from bench import search_table
from bench.search_scores import KINDS
from vqfast.kernels.nearest import library
from vqfast.kernels.nearest.reference import nearest
from vqfast.ops import nearest_code, prepare, registry, residual_nearest
from vqfast.ops.backends import cpu

pytestmark = pytest.mark.skipif(registry.status("cpu")["cpu"] is not None, reason="the CPU extension is not built")
ISAS = ("generic", "avx2", "avx512", "amx")
PATHS = cpu._cpu.nearest_paths() if cpu._cpu else []


@pytest.fixture(autouse=True)
def cpu_backend():
    with vqfast.backend("cpu"):
        yield


def pairs(N: int, K: int, D: int, dtype: torch.dtype = torch.float32):
    """Rows and codes that scores settle, that they leave open, and that they say nothing of."""
    g = torch.Generator().manual_seed(0)
    x, codebook = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (N, K))
    yield x.to(dtype), codebook.to(dtype)
    yield (x + 100).to(dtype), (codebook + 100).to(dtype)
    twice = torch.cat([codebook[: K // 2]] * 2)
    odd = x.clone()
    odd[0], odd[1, 0], odd[2], odd[3, 0] = 0, math.nan, twice[K // 2], math.inf
    yield odd.to(dtype), twice.to(dtype)
    broken = codebook.clone()
    broken[0, 0], broken[3, D - 1] = math.nan, -math.inf
    yield x.to(dtype), broken.to(dtype)


@cache
def cases(size: tuple[int, int, int], dtype: torch.dtype) -> list[tuple]:
    """(x, codebook, metric, the reference's indices)"""
    return [
        (x, codebook, metric, nearest(x, codebook, None, metric))
        for x, codebook in pairs(*size, dtype)
        for metric in ("l2", "dot", "cosine")
    ]


def assert_found(sizes, dtypes) -> None:
    for size in sizes:
        for dtype in dtypes:
            for x, codebook, metric, want in cases(size, dtype):
                assert torch.equal(nearest_code(x, codebook, metric=metric), want), (size, dtype, metric)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_finds_the_reference_s_codes(path, monkeypatch):
    monkeypatch.setenv("VQFAST_CPU_SCORES", path)
    assert cpu._cpu.nearest_path(70, 300, 40) == path
    # The last size is large enough for a library's product.
    assert_found([(40, 300, 7), (20, 97, 40), (8, 1100, 33)], [torch.float32, torch.bfloat16])


SIZES = [[int(2 ** (16 * u)) for u in row] for row in torch.rand(40, 3, generator=torch.Generator().manual_seed(0))]
SIZES += [[9, 10**5, 8], [9, 511, 8], [9, 512, 31], [9, 512, 32], [9, 512, 127], [9, 512, 128]]
IN_ANOTHER_SET = """
import json, os, sys
sys.path[:0] = [{folder!r}, {root!r}]
from test_search_paths import *
print(json.dumps([cpu._cpu.isa(), PATHS, [cpu._cpu.nearest_path(*size) for size in json.load(sys.stdin)]]))
if cpu._cpu.isa() == os.environ["VQFAST_ISA"]:
    for path in PATHS:
        os.environ["VQFAST_CPU_SCORES"] = path
        with vqfast.backend("cpu"):
            assert_found([(9, 70, 20), (4, 1100, 65)], [torch.float32])
"""


@cache
def in_set(isa: str) -> tuple[list[str], dict[tuple[int, ...], str]]:
    """The paths of an instruction set, after every one has found the reference's codes; those chosen for sizes."""
    folder = Path(__file__).parent
    sizes = SIZES + [list(size) for device in search_table.read().values() for size in device.times]
    environment = {name: value for name, value in os.environ.items() if name != "VQFAST_CPU_SCORES"}
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_SET.format(folder=str(folder), root=str(folder.parents[1]))],
        env=environment | {"VQFAST_ISA": isa, "OMP_NUM_THREADS": "1"}, cwd=folder, input=json.dumps(sizes),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name, paths, chosen = json.loads(done.stdout)
    return (paths if name == isa else []), dict(zip(map(tuple, sizes), chosen, strict=True))


def in_set_or_skip(isa: str):
    if not in_set(isa)[0]:
        pytest.skip(f"this processor has no {isa}")
    return in_set(isa)


@pytest.mark.parametrize("isa", ISAS)
def test_every_path_of_every_instruction_set(isa):
    paths, _ = in_set_or_skip(isa)
    assert paths[:3] == ["float32/1", "float32/2", "float32/4"] and paths[-1] == "unfused"


@pytest.mark.parametrize("isa", ["avx2", "avx512", "amx"])
def test_a_size_takes_the_fastest_path_of_the_nearest_measured_one(isa):
    device = search_table.read()[isa]
    paths, chosen = in_set_or_skip(isa)
    assert set(device.ways) <= set(paths)
    for size in [*device.times, *map(tuple, SIZES)]:
        logs = {s: [math.log2(a / b) ** 2 for a, b in zip(s, size, strict=True)] for s in device.times}
        times = device.times[min(device.times, key=lambda s: sum(logs[s]))]  # noqa: B023
        assert size not in device.times or times == device.times[size]
        assert times[device.ways.index(chosen[size])] == min(time for time in times if time > 0), size


def test_an_instruction_set_that_was_not_measured_follows_the_rule():
    assert "generic" not in search_table.read()
    expected = ["float32/4", "float32/1", "float32/4", "float32/2", "float32/2", "float32/1"]
    assert [in_set("generic")[1][tuple(size)] for size in SIZES[-6:]] == expected


def test_the_table_names_what_exists_and_survives_being_read_and_written():
    devices = search_table.read()
    assert search_table.parse(search_table.text_of(devices.values())) == devices
    assert search_table.TABLE.read_text() == search_table.text_of(devices.values())
    for device in devices.values():
        assert device.name in ISAS or (device.name.startswith("sm_") and device.ways == KINDS)
        assert all(max(times) > 0 for times in device.times.values())
    with pytest.raises(ValueError, match="expected DEVICE.*got 'SHAPE\\(1, 2, 3\\)'"):
        search_table.parse("SHAPE(1, 2, 3)")


def test_no_measured_size_below_that_of_an_unfused_search_would_want_one():
    for device in search_table.read().values():
        for (N, K, D), times in device.times.items():
            if N * K * D < cpu._LEAST_UNFUSED:
                assert device.ways[times.index(min(times))] != "unfused", (device.name, N, K, D)


def test_a_path_that_does_not_exist_is_named_with_those_that_do(monkeypatch):
    x, codebook = torch.randn(5, 4), torch.randn(6, 4)
    for name in ("float32", "float32/3", "float32/", "float32/22", "hopper"):
        monkeypatch.setenv("VQFAST_CPU_SCORES", name)
        for call in (
            lambda: nearest_code(x, codebook),
            lambda: prepare(codebook),
            lambda: residual_nearest(x, codebook[None]),
            lambda: cpu._cpu.nearest_path(5, 6, 4),
        ):
            with pytest.raises(ValueError, match=f"VQFAST_CPU_SCORES: expected one of float32/1, .*got {name}$"):
                call()


@pytest.mark.parametrize("path", PATHS)
def test_a_codebook_stays_with_the_engine_that_it_was_prepared_for(path, monkeypatch):
    x, codebook = torch.randn(50, 3, 40), torch.randn(3, 130, 40)
    monkeypatch.setenv("VQFAST_CPU_SCORES", path)
    ready = prepare(codebook)
    want = torch.stack([nearest(x[:, h], codebook[h]) for h in range(3)], dim=1)
    for other in ("", *PATHS):
        monkeypatch.setenv("VQFAST_CPU_SCORES", other)
        assert torch.equal(nearest_code(x, ready), want), other


@pytest.mark.parametrize("path", PATHS)
def test_residual_stages_take_any_path(path, monkeypatch):
    x, codebooks = torch.randn(60, 24), torch.randn(3, 70, 24)
    with vqfast.backend("reference"):
        want = residual_nearest(x, codebooks)
    monkeypatch.setenv("VQFAST_CPU_SCORES", path)
    for got, expected in zip(residual_nearest(x, codebooks), want, strict=True):
        assert torch.equal(got, expected)


class TestUnfused:
    @pytest.fixture
    def products(self, monkeypatch):
        """How many rows each product left open."""
        monkeypatch.setenv("VQFAST_CPU_SCORES", "unfused")
        left = []

        def counted(x, codebook, metric, search):
            left.append(0)

            def searched(rows):
                left[-1] = len(rows)
                return search(rows)

            return library.by_product(x, codebook, metric, searched)

        monkeypatch.setattr(cpu, "by_product", counted)
        return left

    def test_rows_that_its_scores_settle_are_not_searched_again(self, products):
        x, codebook = torch.randn(3, 4, 64), torch.randn(1024, 64)
        for metric in ("l2", "dot"):
            assert torch.equal(nearest_code(x, codebook, metric=metric), nearest(x, codebook, None, metric))
        assert len(products) == 2 and max(products) <= 5
        x[1, 3] = codebook[5]
        codebook[7] = codebook[5]
        assert nearest_code(x, codebook)[1, 3] == 5 and 1 <= products[-1] <= 6

    def test_its_memory_is_bounded(self, products, monkeypatch):
        monkeypatch.setattr(library, "_SCORES", 3000)
        x, codebook = torch.randn(50, 40), torch.randn(1024, 40)
        assert torch.equal(nearest_code(x, codebook), nearest(x, codebook))
        assert len(products) == 1

    @pytest.mark.parametrize(
        ("row", "code"), [(s, s) for s in (1e-38, 1e-30, 1e-20, 1e18, 1e19, 1e30)]
        + [(1, 1e-20), (1e-20, 1), (1e10, 1e-10), (1e-30, 1), (1e30, 1e20)],
    )  # fmt: skip
    def test_what_under_or_overflows_is_left_open(self, products, row, code, monkeypatch):
        x, codebook = torch.randn(30, 64) * row, torch.randn(1024, 64) * code
        got = [nearest_code(x, codebook, metric=metric) for metric in ("l2", "dot")]
        assert len(products) == 2
        monkeypatch.setenv("VQFAST_CPU_SCORES", "float32/1")
        for metric, indices in zip(("l2", "dot"), got, strict=True):
            assert torch.equal(nearest_code(x, codebook, metric=metric), indices)

    def test_it_leaves_what_it_cannot_serve_to_the_others(self, products):
        x, codebook = torch.randn(20, 64), torch.randn(1024, 64)
        mask = torch.rand(20) < 0.5
        nearest_code(x, codebook, mask=mask)
        nearest_code(x, codebook, metric="cosine")
        nearest_code(x, codebook, precision="fast")
        nearest_code(x, prepare(codebook))
        nearest_code(x.double(), codebook.double())
        nearest_code(x[:, :8].contiguous(), codebook[:, :8].contiguous())
        nearest_code(x[:0], codebook)
        assert products == []

    def test_no_product_where_libraries_may_round_their_inputs(self, products):
        x, codebook = torch.randn(20, 64), torch.randn(1024, 64)
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            assert torch.equal(nearest_code(x, codebook), nearest(x, codebook))
        finally:
            torch.set_float32_matmul_precision(before)
        assert products == []

    def test_autocast_and_gradients_change_nothing(self, products):
        x, codebook = torch.randn(20, 64, requires_grad=True), torch.randn(1024, 64, requires_grad=True)
        want = nearest(x.detach(), codebook.detach())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(nearest_code(x, codebook), want)
        assert len(products) == 1 and products[0] <= 3
