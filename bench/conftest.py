"""The CPU benchmarks as pytest sees them: OPS= chooses ops, and each contender's row goes to the device's CSV.

RESULTS= names another folder for it. BENCH=quick takes few rounds and no memory, BENCH=tiny takes tiny sizes too: for a
look, and for the tests of the benchmarks, but never for a result. Their rows go nowhere unless RESULTS= says where.
"""

import os
from functools import cache
from pathlib import Path

import pytest
import torch

from bench.device import device_text, same_threads, slug
from bench.measure import Effort, Measured, measure
from bench.peers import cases
from bench.rows import RESULTS, store

EFFORTS = {
    "": Effort(),
    "quick": Effort(seconds=0.2, least=3, most=10, memory=False),
    "tiny": Effort(seconds=0.01, least=3, most=5, memory=False, compiled=False),
}
BENCH = os.environ.get("BENCH", "")


def pytest_generate_tests(metafunc):
    if "contender" in metafunc.fixturenames:
        chosen = cases("cpu", os.environ.get("OPS", ""), tiny=BENCH == "tiny")
        pairs = [(case, c.name) for case in chosen for c in case.contenders]
        metafunc.parametrize(("case", "contender"), pairs, ids=[f"{case}-{name}" for case, name in pairs])


@pytest.fixture(scope="session", autouse=True)
def _threads():
    with same_threads(torch.get_num_threads()):
        yield


@pytest.fixture(scope="session")
def measurement():
    """case -> its contenders by name: all measured together when the first is asked for, and their rows kept."""
    folder = os.environ.get("RESULTS") or (None if BENCH else RESULTS)

    @cache
    def by_name(case) -> dict[str, Measured]:
        measured = measure(case, EFFORTS[BENCH])
        if folder is not None:
            rows = [entry.row for entry in measured if entry.row is not None]
            store(Path(folder) / f"{slug(device_text('cpu'))}.csv", rows)
        return {entry.contender.name: entry for entry in measured}

    return by_name
