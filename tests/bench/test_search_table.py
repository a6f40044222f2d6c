"""The table by which a search chooses its path, as the benchmarks write it."""

import os
import sys

import pytest
import torch

from bench import search_paths, search_scores, search_table
from bench.search_table import Device

_cpu = pytest.importorskip("vqfast._cpu", reason="the CPU extension is not built")


def test_every_path_is_timed_at_every_size(monkeypatch, capsys):
    monkeypatch.setattr(search_paths, "GRID", ((4, 64, 8), (3, 1024, 90)))
    monkeypatch.setenv("VQFAST_CPU_SCORES", "")
    device = search_paths.ways(0.0)
    assert device.name == _cpu.isa() and device.ways == tuple(_cpu.nearest_paths())
    assert list(device.times) == [(4, 64, 8), (3, 1024, 90)]
    assert all(len(times) == len(device.ways) and min(times) > 0 for times in device.times.values())
    assert "VQFAST_CPU_SCORES" not in os.environ
    search_paths.fastest(device)
    lines = capsys.readouterr().out.splitlines()
    best = device.ways[device.times[4, 64, 8].index(min(device.times[4, 64, 8]))]
    assert len(lines) == 2 and lines[0].startswith(f"| {device.name} | 4, 64 | {best} ")


def test_a_path_that_finds_other_codes_is_not_timed(monkeypatch):
    monkeypatch.setattr(search_paths, "GRID", ((4, 64, 8),))
    monkeypatch.setattr(search_paths, "by_product", lambda x, *rest: torch.full(x.shape[:1], 63))
    with pytest.raises(AssertionError, match="unfused differ from float32/1"):
        search_paths.ways(0.0)


def test_new_lines_replace_those_of_their_device_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(search_table, "TABLE", tmp_path / "nearest_paths.inc")
    old = Device("amx", "an old machine", ("float32/1",), {(1, 2, 3): (0.5,)})
    other = Device("sm_90", "a GPU", ("float32", "hopper"), {(4, 5, 6): (1.0, 0.0)})
    search_table.TABLE.write_text(search_table.text_of([old, other]))
    new = Device("amx", "a machine", ("float32/1", "tiles/2"), {(262144, 16384, 256): (123.0, 0.0456)})
    search_table.replace([new])
    assert search_table.read() == {"amx": new, "sm_90": other}
    assert "SHAPE(262144, 16384, 256,     123,  0.0456)\n" in search_table.TABLE.read_text()


def test_scores_need_a_device():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert search_scores.main([]) == 2


def test_a_kind_that_hangs_or_crashes_is_left_out(capsys):
    does = {"float32": "", "bfloat16": "import time; time.sleep(60)", "hopper": "import os; os.abort()"}
    assert search_scores.usable(lambda kind: [sys.executable, "-c", does[kind]], seconds=3) == ("float32",)
    lines = capsys.readouterr().out.splitlines()
    assert "bfloat16 | left out: no end after 3 s" in lines[0] and "hopper | left out: exit code -6" in lines[1]
