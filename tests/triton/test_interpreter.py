"""Every Triton kernel, run by Triton's interpreter on CPU tensors.

Triton reads TRITON_INTERPRET where a kernel is defined, so no case can run in this process: each group of cases runs
in a process of its own (`python test_interpreter.py GROUP OUTCOMES.json`), and the tests read what became of them.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the process that interprets

from tests.triton import diffusion_promises, posterior_promises, search_promises  # noqa: F401  (they add theirs)
from tests.triton.interpreter_cases import CASES, GROUP
from vqfast.kernels.specs import SPECS
from vqfast.ops.backends.triton import KERNELS

pytest.importorskip("triton")


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str | None]]:
    """Case -> None or its traceback, for a group of cases; run once, by the first worker that asks."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent / f"interpreter-{run}" if run else folder
    folder.mkdir(exist_ok=True)

    def read(group: str) -> dict[str, str | None]:
        report = folder / f"{group}.json"
        with FileLock(f"{report}.lock"):
            if not report.exists():
                interpret = {"TRITON_INTERPRET": "1", "VQFAST_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
                subprocess.run([sys.executable, __file__, group, str(report)], env=os.environ | interpret, check=True)
        return json.loads(report.read_text())

    return read


def test_every_op_with_a_triton_kernel_is_interpreted() -> None:
    missing = {spec.op for spec in SPECS} & KERNELS.keys() - GROUP.keys()
    assert not missing, f"GROUP has no group of {', '.join(sorted(missing))}"


@pytest.mark.parametrize(("group", "case"), [(group, case) for group, cases in CASES.items() for case in cases])
def test_interpreted(group: str, case: str, outcomes: Callable[[str], dict[str, str | None]]) -> None:
    import numpy
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 7) and tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
        pytest.skip(f"the interpreter of triton {triton.__version__} needs numpy below 2.4")
    trace = outcomes(group)[case]
    assert trace is None, trace


def _run(case: Callable[[], None]) -> str | None:
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Written whole or not at all: a report that exists is complete.
    results = {name: _run(case) for name, case in CASES[sys.argv[1]].items()}
    Path(sys.argv[2]).write_text(json.dumps(results))
