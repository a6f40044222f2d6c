"""A pytest plugin of `make gpu`: a test that hangs, or breaks the device for its process, takes no other along.

It ends its process, which under pytest-xdist is a worker's: another one takes its place. What failed is written to the
file that GUARD_LOG names at once, for the whole run may be ended before its summary.
"""

import faulthandler
import os
from collections.abc import Generator

import pytest
import torch

# No test takes long; Triton compiles some thirty kernels in the longest.
LIMIT_S = float(os.environ.get("GUARD_SECONDS", "100"))
LOG = open(os.environ.get("GUARD_LOG", os.devnull), "a", buffering=1)


def _broken() -> str:
    """Why the device is of no use to this process any more; empty where it is, or was not used."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    # By a thread that needs no lock of Python's: a launch that waits for ever holds it.
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=LOG)
    try:
        done = yield
        if why := _broken():
            LOG.write(f"FAILED {item.nodeid} - its process was ended: {why}\n")
            os._exit(1)
        return done
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, object, object]:
    report = yield
    if report.failed:
        lines = (str(call.excinfo.value).strip() if call.excinfo else "").splitlines() or [report.when]
        LOG.write(f"FAILED {item.nodeid} - {lines[0]}\n")
    return report
