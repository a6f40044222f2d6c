"""`make gpu`: build for the CUDA device that is here, test, sanitise, measure its ceilings, benchmark.

Needs a python3 with torch, triton, numpy, pytest, hypothesis, pybind11, setuptools and ninja; nvcc; no package index.
With pytest-xdist tests run side by side, and one that hangs or breaks the device ends its own process only (guard.py).
Environment:

    STAGE   comma-separated of build,test,sanitize,ceilings,scores,bench (default all)
    OPS     comma-separated ops to sanitise and benchmark (default all)
    OUT     folder for results (default bench/out): gpu.log, report.json, ceilings.json, <device>.csv, table.md, a
            chart, nearest_paths.inc
    LIMIT   seconds for everything (default 540)

A stage that fails does not stop the next ones. Exit code 0 if all went well, 1 if a stage failed, 2 without a device.
To keep the figures, copy <device>.csv to bench/results/, the chart to docs/ and nearest_paths.inc to csrc/include/:
"scores" writes this device's lines of that table, by which searches choose their path, and builds again, so that the
figures are of a build that reads them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "test", "sanitize", "ceilings", "scores", "bench")
# Seconds that a stage may take: more where the stages after it leave some, less where the total runs out; those after
# it keep their share.
MOST = {"build": 150, "test": 150, "sanitize": 120, "ceilings": 40, "scores": 120, "bench": 260}
SHARE = {"build": 60, "test": 60, "sanitize": 60, "ceilings": 15, "scores": 70, "bench": 120}
_MOST_WORKERS = 12  # of the tests: each has the device's context and torch's memory for itself
SANITIZERS = (("cuda", "memcheck"), ("cuda", "racecheck"), ("cuda", "synccheck"), ("triton", "memcheck"))
PROBE = """
import json, torch
found = torch.cuda.is_available()
p = torch.cuda.get_device_properties(0) if found else None
print(json.dumps(dict(torch=torch.__version__, name=p and p.name, arch=p and f"{p.major}{p.minor}")))
"""


def probe() -> dict:
    """The device's name and architecture; "why" says why there is none."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"why": f"{sys.executable} has no usable torch ({lines[-1] if lines else 'it crashed'})"}
    found = json.loads(done.stdout.splitlines()[-1])
    return found if found["name"] else {"why": f"torch {found['torch']} sees none"}


class Session:
    """The log, the clock, and the programs that stages run."""

    def __init__(self, out: Path, device: dict, limit: float):
        self.out, self.device = out, device
        self.end = time.time() + limit
        self.ops = os.environ.get("OPS", "")
        # Appended to by this process and by those that it starts.
        self.log_path = out / "gpu.log"
        self.log_path.unlink(missing_ok=True)
        self.log = self.log_path.open("a")
        self.environment = dict(os.environ, PYTHONUNBUFFERED="1")
        self.environment.setdefault("VQFAST_CUDA_ARCHS", device["arch"])

    def start(self, command: list[str], file, **environment: str) -> subprocess.Popen:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=self.environment | environment,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen, until: float) -> str:
        """Empty when it ended well, else what went wrong; it is ended, children and all, at the time `until`."""
        try:
            code = process.wait(max(1.0, until - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "out of time"
        return "" if code == 0 else f"exit code {code}"

    def run(self, command: list[str], until: float, **environment: str) -> tuple[str, list[str]]:
        """What went wrong (empty: nothing), and the lines that the program wrote."""
        process = self.start(command, self.log, **environment)
        before = self.log_path.stat().st_size
        trouble = self.finish(process, until)
        text = self.log_path.read_bytes()[before:].decode(errors="replace")
        return trouble, [line.rstrip()[:160] for line in text.splitlines() if line.strip()]


def show(lines: list[str], last: int) -> None:
    for line in lines[-last:]:
        print(f"  {line}")


def build(session: Session, until: float) -> str:
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]
    start = time.time()
    trouble, lines = session.run(pip, until)
    if trouble:
        show([line for line in lines if "error" in line.lower()][:10] or lines, 10)
        return trouble
    print(f"  built for sm_{session.environment['VQFAST_CUDA_ARCHS']} in {time.time() - start:.0f} s")
    trouble, lines = session.run([sys.executable, "-c", "from vqfast.doctor import report; print(report())"], until)
    show([line for line in lines if "ready" in line or "built" in line or "cuda:" in line], 8)
    return trouble


def test(session: Session, until: float) -> str:
    """The tests that are marked gpu, and every backend against the float64 reference on cuda."""
    pytest = [sys.executable, "-m", "pytest", "-v", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    pytest += ["-p", "bench.guard", "--continue-on-collection-errors", "-W", "ignore"]
    if find_spec("xdist"):
        # Most of the time Triton compiles, on a processor.
        pytest += ["-n", str(min(os.cpu_count() or 1, _MOST_WORKERS)), "--dist", "worksteal"]
    # Only files that mark a test: others may import what is not installed here.
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text()]
    selection = [*marked, "tests/ops", "-k", "gpu or cuda"]
    alone = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")}
    trouble, lines = session.run(pytest + selection, until, GUARD_LOG=str(session.log_path), **alone)
    failed: dict[str, str] = {}
    for line in lines:
        if line.startswith(("FAILED ", "ERROR ")):  # when it happens, and once more in pytest's summary
            failed.setdefault(line.split(" - ")[0].split(" ", 1)[1], line)
    show(list(failed.values()), 20)
    print(f"  {sum(' PASSED ' in line for line in lines)} passed, {len(failed)} failed")
    show(lines, 1)
    return trouble


def sanitize(session: Session, until: float) -> str:
    """compute-sanitizer's tools side by side: they are slow, and none is timed."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return "compute-sanitizer was not found"
    running = []
    for backend, check in SANITIZERS:
        file = (session.out / f".{backend}-{check}").open("w+")
        driver = [sys.executable, "-m", "bench.sanitize", "--backend", backend, "--ops", session.ops]
        command = [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "5", *driver]
        # Without torch's cache of memory each tensor is an allocation of its own, and its end is watched.
        process = session.start(command, file, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        running.append((backend, check, file, process))
    troubles = []
    for backend, check, file, process in running:
        trouble = session.finish(process, until)
        file.seek(0)
        text = file.read()
        file.close()
        session.log.write(text[-200_000:])
        Path(file.name).unlink()
        lines = [line[:160] for line in text.splitlines() if line.strip()]
        summary = [line for line in lines if "SUMMARY" in line or "calls right" in line]
        print(f"  {backend} {check}: {trouble or 'clean'}; {' | '.join(summary[-2:])}")
        if trouble:
            show([line for line in lines if line.startswith(("=", "WRONG")) and "SUMMARY" not in line], 6)
            troubles.append(f"{backend} {check}: {trouble}")
    return ", ".join(troubles)


def ceilings(session: Session, until: float) -> str:
    file = session.out / "ceilings.json"
    trouble, lines = session.run([sys.executable, "-m", "bench.ceilings", "--out", str(file)], until)
    show(lines, 6 if trouble else 2)
    return trouble


def scores(session: Session, until: float) -> str:
    """Each kind of scores that a search can be made of. Their times go into the table by which searches choose one."""
    table = ROOT / "csrc" / "include" / "nearest_paths.inc"
    before = table.read_text()
    trouble, lines = session.run([sys.executable, "-m", "bench.search_scores", "--write"], until)
    show(lines, 20)
    if table.read_text() == before:
        return trouble
    shutil.copy(table, session.out)
    return ", ".join(filter(None, [trouble, build(session, until)]))


def bench(session: Session, until: float) -> str:
    # No new size is started in the last seconds: a chart and a table are still to be made.
    command = [sys.executable, "-m", "bench.run", "--out", str(session.out), "--ops", session.ops]
    trouble, lines = session.run([*command, "--until", f"{until - 35:.0f}"], until - 10)
    show(lines, 25)
    files = sorted(str(file) for file in session.out.glob("*.csv"))
    if files:
        session.run([sys.executable, "-m", "bench.plot", *files, "--out", str(session.out)], until)
    return trouble


def closing_table(session: Session) -> None:
    files = sorted(str(file) for file in session.out.glob("*.csv"))
    if not files:
        return
    table = [sys.executable, "-m", "bench.table", *files]
    short, full = (
        subprocess.run(table + more, cwd=ROOT, capture_output=True, text=True).stdout for more in ([], ["--all"])
    )
    (session.out / "table.md").write_text(full)
    print("\n" + short[-7000:])


def end_of(order: list[str], position: int, now: float, end: float) -> float:
    """When the stage at this position of `order` has to end, if it starts now and everything has to end at `end`."""
    stage, later = order[position], order[position + 1 :]
    most = max(now + MOST[stage], end - sum(MOST[other] for other in later))
    return max(now + 5, min(most, end - sum(SHARE[other] for other in later)))


def main() -> int:
    wanted = [stage.strip() for stage in os.environ.get("STAGE", "").split(",") if stage.strip()] or list(STAGES)
    unknown = [stage for stage in wanted if stage not in STAGES]
    if unknown:
        print(f"make gpu: no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
        return 1
    device = probe()
    if "why" in device:
        print(f"make gpu: needs a CUDA device, and there is none: {device['why']}")
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "out").resolve()
    out.mkdir(parents=True, exist_ok=True)
    session = Session(out, device, float(os.environ.get("LIMIT", "540")))
    print(f"{device['name']}, sm_{device['arch']}, torch {device['torch']}, results in {out}", flush=True)
    report = {"device": device, "stages": {}}
    order = [stage for stage in STAGES if stage in wanted]
    for position, stage in enumerate(order):
        start = time.time()
        until = end_of(order, position, start, session.end)
        print(f"{stage}:", flush=True)
        try:
            trouble = globals()[stage](session, until)
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        took = time.time() - start
        report["stages"][stage] = {"trouble": trouble, "seconds": round(took, 1)}
        print(f"  {'FAILED, ' + trouble if trouble else 'ok'} ({took:.0f} s)", flush=True)
        (out / "report.json").write_text(json.dumps(report, indent=1))
    session.log.close()
    if "bench" in order:
        closing_table(session)
    for stage, result in report["stages"].items():
        print(f"{stage}: {result['trouble'] or 'ok'}, {result['seconds']:.0f} s")
    return 1 if any(result["trouble"] for result in report["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
