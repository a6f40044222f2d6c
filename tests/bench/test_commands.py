"""`make bench` and `make gpu` as a person starts them."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu, sanitize
from bench.rows import OK, read
from bench.sources import ROOT
from vqfast.kernels.specs import SPECS


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    # pytest-benchmark refuses to time where it sees that these tests run in parallel.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )


def test_bench_times_a_group_and_keeps_its_rows(tmp_path):
    pytest.importorskip("pytest_benchmark")
    done = run("-m", "pytest", "bench", "-q", OPS="nearest", BENCH="tiny", RESULTS=str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:]
    assert "benchmark 'nearest N=256 K=64 D=16 float32'" in done.stdout and "vqfast cpu" in done.stdout
    (path,) = tmp_path.glob("*.csv")
    rows = {row.backend: row for row in read(path)}
    assert rows["vqfast cpu"].status == OK and rows["vqfast cpu"].mismatches == 0
    assert rows["torch addmm + argmax"].median_s > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_without_a_device_says_so_in_one_line_and_exits_with_2(tmp_path):
    done = run("bench/gpu.py", OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout.startswith("make gpu: needs a CUDA device") and done.stdout.count("\n") == 1
    assert not done.stderr and not (tmp_path / "out").exists()


def test_gpu_refuses_an_unknown_stage():
    done = run("bench/gpu.py", STAGE="build,tests")
    assert done.returncode == 1 and "no stage tests; there are build, test" in done.stdout


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A machine that claims to have a device, and an empty folder for results."""
    monkeypatch.setattr(gpu, "probe", lambda: {"name": "a GPU", "arch": "90", "torch": "2"})
    monkeypatch.setenv("OUT", str(tmp_path))
    return tmp_path


def test_gpu_goes_on_after_a_stage_that_fails_and_reports_it(device, monkeypatch, capsys):
    def crashing(session, until):
        raise OSError("disk full")

    monkeypatch.setattr(gpu, "build", lambda session, until: "exit code 1")
    monkeypatch.setattr(gpu, "test", crashing)
    monkeypatch.setattr(gpu, "ceilings", lambda session, until: "")
    monkeypatch.setenv("STAGE", "build,test,ceilings")
    assert gpu.main() == 1
    stages = json.loads((device / "report.json").read_text())["stages"]
    troubles = {name: stage["trouble"] for name, stage in stages.items()}
    assert troubles == {"build": "exit code 1", "test": "OSError: disk full", "ceilings": ""}
    assert "FAILED, OSError: disk full" in capsys.readouterr().out
    monkeypatch.setenv("STAGE", "ceilings")
    assert gpu.main() == 0


def test_gpu_builds_again_where_scores_have_changed_the_table_of_paths(device, monkeypatch):
    table = device / "csrc" / "include" / "nearest_paths.inc"
    table.parent.mkdir(parents=True)
    table.write_text("old")
    monkeypatch.setattr(gpu, "ROOT", device)
    monkeypatch.setattr(gpu, "build", lambda session, until: "exit code 1")
    session = gpu.Session(device, gpu.probe(), limit=60)
    monkeypatch.setattr(session, "run", lambda command, until: ("out of time", []))
    assert gpu.scores(session, time.time()) == "out of time" and not (device / table.name).exists()
    monkeypatch.setattr(session, "run", lambda command, until: (str(table.write_text("new") - 3 or ""), []))
    assert gpu.scores(session, time.time()) == "exit code 1" and (device / table.name).read_text() == "new"
    session.log.close()


def test_gpu_ends_a_program_that_outlasts_its_time_and_keeps_what_it_wrote(device):
    session = gpu.Session(device, gpu.probe(), limit=60)
    assert session.run([sys.executable, "-c", "print('one')"], time.time() + 30) == ("", ["one"])
    assert session.run([sys.executable, "-c", "print('two'); exit(3)"], time.time() + 30) == ("exit code 3", ["two"])
    sleeper = [sys.executable, "-c", "import time; print('three'); time.sleep(60)"]
    start = time.time()
    assert session.run(sleeper, start + 1) == ("out of time", ["three"])
    assert time.time() - start < 20
    session.log.close()
    assert [line for line in (device / "gpu.log").read_text().split() if line in ("one", "two", "three")]


def test_gpu_gives_every_stage_some_of_the_time():
    assert sum(gpu.SHARE.values()) <= 540 and set(gpu.SHARE) == set(gpu.MOST) == set(gpu.STAGES)
    assert all(gpu.SHARE[stage] <= gpu.MOST[stage] for stage in gpu.STAGES)
    assert all(callable(getattr(gpu, stage)) for stage in gpu.STAGES)


def test_gpu_lets_a_stage_have_what_the_others_do_not_take():
    def seconds(stages: tuple[str, ...], stage: str, left: float) -> float:
        return gpu.end_of(list(stages), stages.index(stage), 0.0, left)

    assert seconds(gpu.STAGES, "build", 540) == gpu.MOST["build"]
    assert seconds(("build", "test", "scores"), "test", 440) == 440 - gpu.MOST["scores"]
    assert seconds(("bench",), "bench", 540) == 540
    for left in (100, 200, 540):
        later = sum(gpu.SHARE[stage] for stage in ("sanitize", "ceilings", "scores", "bench"))
        assert seconds(gpu.STAGES, "test", left) <= max(5, left - later)


GUARDED = """
import ctypes, os, time
def test_is_right(): pass
def test_is_wrong(): assert 1 == 2, "one is not two"
def test_hangs(): ctypes.PyDLL(None).sleep(60)
def test_crashes(): os.abort()
def test_is_right_too(): pass
"""


def test_a_test_that_hangs_or_crashes_takes_no_other_along(tmp_path):
    """A launch that waits for ever holds Python's lock."""
    pytest.importorskip("xdist")
    (tmp_path / "test_guarded.py").write_text(GUARDED)
    log = tmp_path / "log"
    options = "-q -p no:cacheprovider -p bench.guard -n 2 --dist worksteal -c pyproject.toml --rootdir .".split()
    done = run("-m", "pytest", *options, str(tmp_path), GUARD_LOG=str(log), GUARD_SECONDS="3")
    assert "3 failed, 2 passed" in done.stdout, done.stdout[-3000:]
    assert "test_is_wrong - one is not two" in log.read_text() and "Timeout" in log.read_text()


def test_the_sanitised_list_touches_every_op():
    for backend in ("cuda", "triton"):
        assert {spec.op for spec, _, _ in sanitize.calls("", backend)} == {spec.op for spec in SPECS}
    assert len(list(sanitize.calls("", "triton"))) < 50 < 300 < len(list(sanitize.calls("", "cuda")))
    assert {spec.op for spec, _, _ in sanitize.calls("nearest")} == {"nearest"}
    step = {spec.op for spec, _, _ in sanitize.calls("quantize_step")}
    assert step == {"nearest", "lookup", "lookup_backward", "codebook_stats"}


def test_a_search_is_sanitised_by_every_kind_of_scores_and_layout():
    assert sanitize.variants("nearest", "cuda") == ("float32", "bfloat16", "hopper")
    assert sanitize.variants("nearest", "triton") == sanitize.variants("lookup", "cuda") == (None,)
    x = torch.randn(5, 3)
    assert torch.equal(sanitize.strided(x), x) and sanitize.strided(x).stride() == (1, 5)
    assert sanitize.strided("l2") == "l2"


def test_the_sanitised_list_is_right_on_the_definition(capsys):
    assert sanitize.main(["--backend", "reference", "--device", "cpu"]) == 0
    assert "0 wrong" in capsys.readouterr().out
