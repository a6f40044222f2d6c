"""Checks every contender of a benchmark, times those that are right, in turns, and makes a row of each.

Rounds are interleaved: in each, every contender gives one sample, in a new random order, so that what else the machine
does meanwhile meets all of them. pytest-benchmark times one test after the other, so the samples are taken here and
handed to it (test_bench.py).
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

import torch

from bench.case import PEER, VQFAST, Case, Contender, Run, Verdict
from bench.clocks import EventClock, GraphClock, WallClock
from bench.device import device_text, others_share
from bench.memory import cpu_peak, cuda_peak
from bench.rows import BUSY, FAILED, OK, WRONG, Row
from bench.sources import commit, kernel_hash

_CACHE_BYTES = 256 << 20  # inputs in rotation are this large together: several times any GPU's cache
_MOST_SETS = 16
_BUSY_SHARE = 0.1
# Who takes so long is not helped by the cache: one set of inputs will do.
_SLOW_S = 0.5


@dataclass(frozen=True)
class Effort:
    """How long to time: until a contender has had `seconds` and `least` rounds, or `most` rounds. One so slow that
    those rounds would take four times as long stops at three.
    """

    seconds: float = 1.0
    least: int = 5
    most: int = 50
    memory: bool = True
    compiled: bool = True


@dataclass
class Measured:
    """A row, and the samples behind it (seconds a call); `reason` says why there is no row: it could not run here."""

    contender: Contender
    row: Row | None = None
    samples: list[float] = field(default_factory=list)
    reason: str = ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:120]


def interleaved(clocks: Mapping[str, Callable[[], float]], effort: Effort) -> dict[str, list[float]]:
    """Samples of each clock, taken in turns until each has used its time."""
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    spent = dict.fromkeys(clocks, 0.0)
    order = random.Random(0)
    open_names = list(clocks)
    while open_names:
        order.shuffle(open_names)
        for name in open_names:
            start = time.perf_counter()
            samples[name].append(clocks[name]())
            spent[name] += time.perf_counter() - start
        open_names = [name for name in open_names if _goes_on(len(samples[name]), spent[name], effort)]
    return samples


def _goes_on(rounds: int, spent: float, effort: Effort) -> bool:
    if rounds < effort.least:
        return rounds < 3 or spent < 4 * effort.seconds
    return rounds < effort.most and spent < effort.seconds


def spread(samples: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    if len(samples) == 1:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, high - low


def _problems(case: Case) -> list:
    """Inputs to go round: one set on a CPU, on a GPU so many that they do not fit the cache."""
    if torch.device(case.device).type == "cpu":
        return [case.problem(0)]
    sets = -(-_CACHE_BYTES // max(1, case.bytes_moved))
    return [case.problem(seed) for seed in range(max(1, min(_MOST_SETS, sets)))]


def _judged(case: Case, contender: Contender, problems: Sequence) -> tuple[list[Run], Verdict]:
    """The contender's runs on every set of inputs, and the worst verdict on them; on one set of a peer that is slow."""
    runs, worst = [], Verdict()
    for problem in problems:
        run = contender.prepare(problem)
        start = time.perf_counter()
        verdict = case.judge(contender, run, problem)
        took = time.perf_counter() - start
        runs.append(run)
        worst = Verdict(
            _larger(worst.mismatches, verdict.mismatches), _larger(worst.error, verdict.error), verdict.wrong
        )
        if verdict.wrong or (took > _SLOW_S and contender.role != VQFAST and _seconds_of(case, run) > _SLOW_S):
            break
    return runs, worst


def _seconds_of(case: Case, run: Run) -> float:
    start = time.perf_counter()
    run.call()
    if torch.device(case.device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _larger(a, b):
    return b if a is None else a if b is None else max(a, b)


def _admit(
    case: Case, contender: Contender, problems: Sequence, row: Row, effort: Effort
) -> tuple[Measured, list[Run]]:
    """The contender with a row that has no time yet, and its runs: none where it cannot run, fails, or is wrong."""
    if contender.unavailable or (contender.compiled and not effort.compiled):
        return Measured(contender, reason=contender.unavailable or "compiled contenders were left out"), []
    try:
        runs, verdict = _judged(case, contender, problems)
    except Exception as error:
        return Measured(contender, replace(row, status=FAILED, note=_first_line(error))), []
    row = replace(row, mismatches=verdict.mismatches, error=verdict.error)
    if verdict.wrong:
        return Measured(contender, replace(row, status=WRONG, note=verdict.wrong)), []
    return Measured(contender, row), runs


def measure(case: Case, effort: Effort, floor: Callable[[Case], float | None] = lambda case: None) -> list[Measured]:
    """Every contender of the case, in its order; on a CUDA device timed by events, then those that capture by graph.

    A result that is wrong is never timed: its row has status "wrong", the number of mismatches, and no time.

    Args:
        floor: the least seconds that the device's ceilings allow.
    """
    torch._dynamo.reset()
    problems, base = _problems(case), _blank(case, floor(case))
    entries = [_admit(case, c, problems, _named(base, c), effort) for c in case.contenders]
    measured = [entry for entry, _ in entries]
    ready = {i: runs for i, (_, runs) in enumerate(entries) if runs}
    if torch.device(case.device).type == "cuda":
        times = _timed(ready, EventClock, effort)
        _peaks(measured, ready, effort, lambda i: cuda_peak(ready[i][0]))
        # What the calls above left in torch's cache is out of reach of a capture.
        torch.cuda.empty_cache()
        graphs = _timed({i: runs for i, runs in ready.items() if case.contenders[i].captured}, GraphClock, effort)
    else:
        times, graphs = _timed(ready, WallClock, effort), {}
        _peaks(measured, ready, effort, lambda i: cpu_peak(case, case.contenders[i].name, torch.get_num_threads()))
    replays = [
        _with_times(case, Measured(measured[i].contender, replace(measured[i].row, clock=GraphClock.name)), samples)
        for i, samples in graphs.items()
        if not isinstance(samples, str)
    ]
    for i, samples in times.items():
        _with_times(case, measured[i], samples)
    entries.clear()
    ready.clear()
    gc.collect()
    return _with_ratios(measured + replays)


def _peaks(measured: list[Measured], ready: Mapping, effort: Effort, peak: Callable[[int], int | None]) -> None:
    for i in ready if effort.memory else ():
        measured[i].row = replace(measured[i].row, peak_bytes=peak(i))


def _timed(runs: Mapping[int, list[Run]], kind, effort: Effort) -> dict[int, list[float] | str]:
    """Samples of each contender by its position, or why it could not be timed."""
    outcome: dict[int, list[float] | str] = {}
    clocks = {}
    for i, mine in runs.items():
        try:
            clocks[i] = kind(mine)
        except Exception as error:
            outcome[i] = _first_line(error)
    outcome.update(interleaved({i: clock.sample for i, clock in clocks.items()}, effort))
    return outcome


def _blank(case: Case, floor_s: float | None) -> Row:
    on_cuda = torch.device(case.device).type == "cuda"
    busy = 0.0 if on_cuda else others_share()
    return Row(
        op=case.op,
        backend="",
        role="",
        shape=case.shape_text,
        dtype=case.dtype_text,
        device=device_text(case.device),
        threads=0 if on_cuda else torch.get_num_threads(),
        clock=EventClock.name if on_cuda else WallClock.name,
        status=OK,
        note=f"{BUSY}: other programs took {busy:.0%} of the processors" if busy > _BUSY_SHARE else "",
        floor_s=floor_s,
        commit=commit(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )


def _named(row: Row, contender: Contender) -> Row:
    return replace(
        row,
        backend=contender.name,
        role=contender.role,
        version=contender.version,
        kernel_hash=kernel_hash(contender.name, row.op) if contender.role == VQFAST else "",
    )


def _with_times(case: Case, entry: Measured, samples: list[float] | str) -> Measured:
    """The entry with its samples and what follows from them; with the reason where there are none."""
    if isinstance(samples, str):
        entry.row = replace(entry.row, status=FAILED, note=samples)
        return entry
    median, iqr = spread(samples)
    entry.samples = samples
    entry.row = replace(
        entry.row,
        median_s=median,
        iqr_s=iqr,
        rounds=len(samples),
        gbytes_per_s=case.bytes_moved / median / 1e9,
        gflops_per_s=case.flops / median / 1e9,
    )
    return entry


def _with_ratios(measured: list[Measured]) -> list[Measured]:
    """Each row's ratio to the fastest peer that was right, by the same clock."""
    best: dict[str, float] = {}
    for entry in measured:
        row = entry.row
        if row is not None and row.role == PEER and row.median_s is not None:
            best[row.clock] = min(best.get(row.clock, row.median_s), row.median_s)
    for entry in measured:
        row = entry.row
        if row is not None and row.median_s is not None and row.clock in best:
            entry.row = replace(row, ratio_to_best_peer=best[row.clock] / row.median_s)
    return measured
