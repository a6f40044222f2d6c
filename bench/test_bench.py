"""One pytest-benchmark group an op and size, one test a contender. A wrong contender is not timed.

pytest-benchmark would time one contender after the other; the samples come from interleaved rounds (measure.py), and
`recorded` plays them back to it as its clock.
"""

from collections import deque

import pytest

from bench.case import VQFAST
from bench.rows import OK

_readings: deque[float] = deque()


def recorded() -> float:
    """The next reading of a clock that runs through the samples: each round lasts as long as its sample did."""
    return _readings.popleft()


@pytest.mark.benchmark(timer=recorded, disable_gc=False, warmup=False)
def test_contender(case, contender, measurement, benchmark):
    benchmark.group, benchmark.name = str(case), contender
    entry = measurement(case)[contender]
    if entry.row is None:
        benchmark.skipped = True
        pytest.skip(entry.reason)
    benchmark.extra_info.update(peak_bytes=entry.row.peak_bytes, mismatches=entry.row.mismatches)
    if entry.row.status != OK:
        benchmark.skipped = True
        text = f"{entry.row.status}, not timed: {entry.row.note}"
        pytest.fail(text) if entry.contender.role == VQFAST else pytest.skip(text)
    for sample in entry.samples:
        _readings.extend((0.0, sample))
    benchmark.pedantic(lambda: None, rounds=len(entry.samples))
    _readings.clear()
