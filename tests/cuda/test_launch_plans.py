"""How ops are cut into blocks: within every device's limits, complete, and balanced, for sizes from 0 to huge."""

import ctypes
import os
import shutil
import subprocess
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRID_X, GRID_Y, THREADS = 2**31 - 1, 65535, 1024
# Multiprocessors and shared memory per block: consumer sm_86 and sm_89, A100, H200, B200, and one small device.
DEVICES = [(28, 99 << 10), (128, 99 << 10), (108, 163 << 10), (132, 227 << 10), (148, 227 << 10), (1, 48 << 10)]
H200 = (132, 227 << 10)
SIZES = [1, 2, 31, 32, 33, 127, 128, 129, 1000, 8192, 65536, 10**6, 2**31 - 200, 2**31 + 5, 10**10]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """plan(name, *sizes, device=...) -> the numbers of a plan, from a small library built of launch.h."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or CXX)")
    library = tmp_path_factory.mktemp("plans") / "plans.so"
    source = Path(__file__).with_name("launch_plans.cpp")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    flags += [f"-I{ROOT / folder}" for folder in ("csrc/cuda", "csrc/include")]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    fields = {
        "search": "row_tiles code_tiles splits tiles_per_split padded_codes padded_features exact_blocks".split(),
        "hopper": (
            "groups panel panels stages with_bias chunk room tile_codes code_tiles splits tiles_per_split".split()
        ),
        "tensor": "stages pitch chunk code_tiles splits tiles_per_split".split(),
        "stats": "chunks rows_per_chunk pieces".split(),
    }

    def call(name: str, *sizes: int, device: tuple[int, int] = H200, capability: int = 90) -> SimpleNamespace:
        out = (ctypes.c_int64 * 16)()
        limits = (ctypes.c_int64 * 4)(*device, GRID_X, capability)
        getattr(loaded, name)(*(ctypes.c_int64(size) for size in sizes), limits, out)
        names = ["grid_x", "grid_y", "threads", "shared_bytes", *fields.get(name, [])]
        return SimpleNamespace(**dict(zip(names, out, strict=False)))

    return call


def assert_launchable(plan, device, where) -> None:
    assert 1 <= plan.grid_x <= GRID_X and 1 <= plan.grid_y <= GRID_Y, where
    assert 32 <= plan.threads <= THREADS and plan.threads % 32 == 0, where
    assert 0 <= plan.shared_bytes <= device[1] - 1024, where


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"{d[0]}x{d[1] >> 10}K")
def test_every_plan_is_within_the_limits_of_the_device(plan, device):
    for n, K in product([0, *SIZES], SIZES[:12]):
        for name, sizes in [
            ("softmax", (n, K, 4, 4)), ("softmax", (n, K, 8, 4)), ("softmax", (n, K, 1, 8)), ("lookup", (n, 0)),
            ("lookup", (n, 1)), ("stats", (n, K, 1)), ("stats", (n, K, 10**6)), ("tokens", (n,)), ("scale_rows", (n,)),
        ]:  # fmt: skip
            assert_launchable(plan(name, *sizes, device=device), device, (name, sizes))
        if n > 0:
            assert_launchable(plan("search", n, 64, K, device=device), device, ("search", n, K))


def test_every_code_and_every_row_is_searched_once(plan):
    for n, K, device in product(SIZES, SIZES[:12], DEVICES):
        p = plan("search", n, 64, K, device=device)
        assert 128 * (p.row_tiles - 1) < n <= 128 * p.row_tiles
        assert (
            p.splits == p.grid_y and (p.splits - 1) * p.tiles_per_split < p.code_tiles <= p.splits * p.tiles_per_split
        )
        # Whole tiles of either kind of scores.
        assert p.padded_codes % 512 == 0 and 0 <= p.padded_codes - K < 512
        # Partial results: at most eight waves of blocks.
        assert p.splits == 1 or p.splits * p.row_tiles <= 8 * 2 * device[0]


def test_tensor_cores_get_every_row_and_code_once_in_chunks_that_fit(plan):
    for n, K, D, device in product(SIZES, SIZES[:12], (1, 8, 64, 200, 256, 512, 513, 4096), DEVICES):
        p = plan("tensor", n, D, K, device=device)
        assert p.pitch % 16 == 0 and 0 <= p.pitch - D < 16
        if not p.stages:
            assert D > {163 << 10: 256, 227 << 10: 512}.get(device[1], 0), "what the README promises fits"
            continue
        # The kernel's own variables take less than 28 KiB.
        assert p.shared_bytes + (28 << 10) <= device[1] + 1024, (n, K, D, device)
        assert 1 <= p.chunk <= n and (p.chunk == n or p.chunk % 128 == 0) and p.grid_x <= GRID_X
        assert p.chunk * p.pitch * 2 <= 128 << 20 or p.chunk <= 128
        assert (
            p.splits == p.grid_y and (p.splits - 1) * p.tiles_per_split < p.code_tiles <= p.splits * p.tiles_per_split
        )


def test_warpgroups_get_every_row_and_code_once_in_tiles_that_fit(plan):
    for n, K, D in product(SIZES, SIZES[:12], (1, 8, 13, 14, 29, 30, 64, 256, 384, 512, 704, 768)):
        p = plan("hopper", n, D, K)
        if p.groups == 0:
            assert D > 704, "what the README promises fits"
            continue
        rows, width, features = 64 * p.groups, 1 << p.panel, D + 3 * p.with_bias
        assert p.groups == (3 if D <= 384 else 2) and p.threads == 128 * (p.groups + 1)
        assert width == (32 if D <= 13 else 64 if D <= 29 else 128) and p.with_bias == (D <= 29)
        assert width * (p.panels - 1) < 2 * features <= width * p.panels
        assert p.groups <= p.stages <= 8
        # Start, rows and ring; then lists, reaches and barriers.
        assert p.shared_bytes == 1024 + p.panels * rows * width + p.stages * (16 << 10)
        assert p.shared_bytes + rows * (4 + 8 * 16 + 4) + 8 * 18 <= 227 << 10
        assert 1 <= p.chunk <= n and (p.chunk == n or p.chunk % rows == 0)
        assert p.room % rows == 0 and 0 <= p.room - p.chunk < rows and p.room % 8 == 0
        # Stages never read beyond the padded codes.
        codes = p.tile_codes
        assert codes % 256 == 0 and codes % ((16 << 10) // width) == 0
        assert codes * (p.code_tiles - 1) < K <= codes * p.code_tiles <= plan("search", n, D, K).padded_codes
        assert (p.splits - 1) * p.tiles_per_split < p.code_tiles <= p.splits * p.tiles_per_split
        assert p.grid_x == min(132, -(-p.chunk // rows) * p.splits) and p.grid_y == 1


def test_only_capability_9_0_gets_warpgroups_products(plan):
    for device, capability in (((108, 163 << 10), 80), ((148, 227 << 10), 100), ((128, 99 << 10), 89)):
        assert plan("hopper", 8192, 64, 1024, device=device, capability=capability).groups == 0
    assert plan("hopper", 8192, 64, 1024, device=(132, 99 << 10)).groups in (0, 2, 3)


FLOAT32, BFLOAT16, HOPPER = 1, 2, 3


def test_scores_are_those_of_the_nearest_measured_size(plan):
    def scores(N, K, D, wanted=0, hopper_built=1, capability=90) -> int:
        return plan("scores", N, D, K, wanted, hopper_built, capability=capability).grid_x

    # The sizes of kLines in launch_plans.cpp, and others next to them.
    for N, K, D, fastest in (
        (64, 64, 64, FLOAT32),
        (1, 1, 1, FLOAT32),
        (64, 4096, 64, BFLOAT16),
        (511, 10**6, 64, BFLOAT16),
        (4096, 4096, 64, HOPPER),
        (10**6, 1024, 64, HOPPER),
        (4096, 64, 64, BFLOAT16),
    ):
        assert scores(N, K, D) == fastest, (N, K, D)
    # What cannot serve gives way to the next fastest; so does what is wanted by name.
    assert scores(4096, 4096, 64, hopper_built=0) == BFLOAT16
    assert scores(4096, 4096, 1024) == FLOAT32
    assert [scores(64, 64, 64, wanted) for wanted in (FLOAT32, BFLOAT16, HOPPER)] == [FLOAT32, BFLOAT16, HOPPER]
    assert scores(64, 64, 64, HOPPER, hopper_built=0) == BFLOAT16 and scores(64, 64, 1024, HOPPER) == FLOAT32
    # Another device's lines are its own; without any, the rule.
    assert scores(64, 64, 64, capability=80) == scores(10**5, 10**5, 64, capability=80) == BFLOAT16
    for capability in (86, 100):
        assert scores(512, 512, 64, capability=capability) == BFLOAT16
        assert scores(511, 512, 64, capability=capability) == scores(512, 511, 64, capability=capability) == FLOAT32


def test_few_rows_are_split_so_that_the_device_is_full(plan):
    for n, K in [(1, 16384), (128, 8192), (1024, 16384), (8192, 8192), (8192, 16384), (17920, 4096)]:
        p = plan("search", n, 256, K)
        slots = 2 * 132
        waves = -(-p.row_tiles * p.splits // slots)
        busy = p.row_tiles * p.code_tiles / (waves * slots * p.tiles_per_split)
        whole = min(1.0, p.row_tiles * p.code_tiles / slots)
        assert busy >= 0.8 * whole, (n, K, p, busy)


def test_many_rows_are_not_split(plan):
    assert plan("search", 10**6, 64, 8192).splits == 1


def test_a_row_of_scores_stays_in_shared_memory_where_it_fits(plan):
    assert plan("softmax", 8192, 1024, 4, 4).shared_bytes == 4096
    assert plan("softmax", 8192, 16384, 4, 4).shared_bytes == 65536
    assert plan("softmax", 8192, 16384, 2, 8).shared_bytes == 131072
    assert plan("softmax", 8192, 16384, 2, 8, device=(128, 99 << 10)).shared_bytes == 0
    assert plan("softmax", 8192, 10**6, 4, 4).shared_bytes == 0
    for K, vector in product(SIZES[:10], (1, 2, 4, 8)):
        p = plan("softmax", 4, K, vector, 4)
        if p.shared_bytes:
            assert p.shared_bytes >= 4 * K and p.shared_bytes % (4 * vector * p.threads) == 0


def test_statistics_cover_every_row_with_a_bounded_table(plan):
    for n, K in product([0, *SIZES[:13]], SIZES[:12]):
        p = plan("stats", n, K, 65)
        assert p.chunks * p.rows_per_chunk >= n and (p.chunks - 1) * p.rows_per_chunk <= n
        assert p.rows_per_chunk % 32 == 0 and p.pieces * 64 >= n
        assert p.chunks * K * 4 <= max(32 << 20, 32 * K)
