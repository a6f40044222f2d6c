"""Figures keep their columns, are replaced by newer ones, and are STALE once their kernel has changed."""

import csv
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest

from bench import table
from bench.device import slug
from bench.plot import draw
from bench.rows import Row, read, store
from bench.sources import KERNELS, ROOT, kernel_hash, source_files

ROW = Row(
    op="nearest",
    backend="vqfast cpu",
    role="vqfast",
    shape="N=8 K=4 D=2",
    dtype="float32",
    device="a processor, 2 cores",
    threads=2,
    clock="wall",
    status="ok",
    median_s=0.001234,
    iqr_s=1e-05,
    rounds=7,
    ratio_to_best_peer=2.5,
    mismatches=0,
    kernel_hash=kernel_hash("vqfast cpu", "nearest"),
    date="2026-01-02",
)
PEER = replace(ROW, backend='torch, "quoted"', role="peer", median_s=0.0025, peak_bytes=5_000_000, kernel_hash="")


def test_rows_come_back_as_they_were_written(tmp_path):
    store(tmp_path / "a.csv", [ROW, PEER])
    assert sorted(read(tmp_path / "a.csv"), key=lambda row: row.role) == [PEER, ROW]


def test_a_row_is_replaced_by_its_key_and_the_others_stay(tmp_path):
    path = tmp_path / "a.csv"
    store(path, [ROW, PEER])
    newer = replace(ROW, median_s=0.5, date="2026-02-03")
    store(path, [newer, replace(ROW, threads=4)])
    assert set(read(path)) == {newer, PEER, replace(ROW, threads=4)}


def test_a_file_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("op,backend\nnearest,x\n")
    with pytest.raises(ValueError, match="expected the columns op,backend,role"):
        read(path)


def test_every_committed_file_has_the_columns():
    for path in (ROOT / "bench" / "results").glob("*.csv"):
        with path.open(newline="") as file:
            assert next(csv.reader(file)) == [f.name for f in fields(Row)]
        assert all(row.op in KERNELS for row in read(path))


@pytest.fixture
def sources(tmp_path) -> Path:
    for folder in ("csrc", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "changes", "keeps"),
    [
        ("csrc/cpu/nearest.cpp", ["cpu nearest", "cpu quantize_step"], ["cpu q_sample", "cuda nearest"]),
        ("csrc/include/vqfast.h", ["cpu p_sample", "cuda nearest"], ["triton nearest"]),
        ("csrc/cuda/nearest_scores.cuh", ["cuda nearest"], ["cpu nearest", "cuda p_sample"]),
        ("kernels/nearest/triton.py", ["triton nearest"], ["cpu nearest"]),
        ("kernels/nearest/reference.py", ["reference nearest"], ["triton nearest"]),
    ],
)
def test_a_changed_kernel_makes_its_own_rows_stale(sources, file, changes, keeps):
    def hashed(which: str) -> str:
        backend, op = which.split()
        return kernel_hash(f"vqfast {backend}", op, sources)

    before = {which: hashed(which) for which in changes + keeps}
    path = sources / file
    path.write_text(path.read_text() + "\n// changed\n")
    kernel_hash.cache_clear()
    assert [which for which in before if hashed(which) != before[which]] == changes


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("backend", ["vqfast cpu", "vqfast reference"])
def test_every_op_depends_on_files_that_exist(backend, op):
    files = source_files(backend, op)
    assert files and all(file.is_file() for file in files)


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("backend", ["vqfast cpu", "vqfast cuda"])
def test_what_an_op_includes_is_among_the_files_it_depends_on(backend, op):
    files = source_files(backend, op)
    # The tables of loop bodies, one an instruction set, name those of every op.
    own = [file for file in files if file.stem != "bodies" and not file.stem.startswith("isa_")]
    included = [re.findall(r'^#include "(.+)"', file.read_text(), re.M) for file in own]
    assert {name for names in included for name in names} <= {file.name for file in files} | {"cuda_shim.h"}  # a test's


def test_stale_rows_are_shown_as_stale_and_peers_never_are(tmp_path):
    stale = replace(ROW, kernel_hash="0" * 12)
    assert stale.stale and not ROW.stale and not PEER.stale
    store(tmp_path / "a.csv", [stale, PEER])
    for full in (False, True):
        assert "STALE" in table.report([tmp_path / "a.csv"], full=full)
    store(tmp_path / "a.csv", [ROW])
    assert "STALE" not in table.report([tmp_path / "a.csv"])


def test_the_table_names_both_sides_and_a_wrong_contender_has_no_time(tmp_path):
    wrong = replace(PEER, backend="another", status="wrong", note="4 of 8 indices differ", median_s=None, mismatches=4)
    store(tmp_path / "a.csv", [ROW, PEER, wrong])
    short = table.report([tmp_path / "a.csv"])
    assert "1.23 ms (cpu)" in short and '2.5 ms (torch, "quoted")' in short and "2×" in short and "another" not in short
    assert "wrong: 4 of 8 indices differ" in table.report([tmp_path / "a.csv"], full=True)


def test_the_table_replaces_what_stands_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n")
    table.write_between(page, "new")
    table.write_between(page, "newer")
    assert page.read_text() == f"above\n{table.BEGIN}\nnewer\n{table.END}\nbelow\n"
    with pytest.raises(ValueError, match="expected the lines"):
        table.write_between(tmp_path / "a.md" if (tmp_path / "a.md").write_text("x") else page, "new")


def test_the_chart_is_drawn_and_an_empty_file_has_none(tmp_path):
    pytest.importorskip("matplotlib")
    wrong = replace(PEER, backend="another", status="wrong", note="4 of 8 indices differ", median_s=None)
    store(tmp_path / "device.csv", [ROW, PEER, wrong])
    picture = draw(tmp_path / "device.csv", tmp_path / "docs")
    assert picture == tmp_path / "docs" / "bench-device.png" and picture.stat().st_size > 5000
    assert draw(tmp_path / "none.csv", tmp_path) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA H200, sm_90", "nvidia-h200-sm-90"),
        ("Intel(R) Xeon(R) CPU E5 @ 2.30GHz, 2 cores, avx512", "intel-xeon-e5-2-cores-avx512"),
    ],
)
def test_a_device_has_one_file_name(text, name):
    assert slug(text) == name
