"""Three ways to time a call: the wall on a CPU, events on a CUDA device, replays of a captured CUDA graph.

A clock is made for one contender and gives one sample, seconds a call, each time it is asked; `measure.py` asks the
contenders in turn, so that whatever else the machine does falls on all of them.
"""

import time
from collections.abc import Sequence
from contextlib import contextmanager

import torch

from bench.case import Run

# A sample lasts at least this long, by repeating short calls.
_SAMPLE_S = {"wall": 0.02, "events": 0.002, "graph": 0.002}
_MOST_CALLS = 10000


def _calls(name: str, seconds_a_call: float) -> int:
    return max(1, min(_MOST_CALLS, round(_SAMPLE_S[name] / max(seconds_a_call, 1e-9))))


class WallClock:
    """Blocks of calls on the CPU.

    One untimed call goes first where it is short: it wakes this contender's threads, and lets those of the one before,
    which may spin in another OpenMP runtime, fall asleep.
    """

    name = "wall"

    def __init__(self, runs: Sequence[Run]):
        (self.run,) = runs
        self.calls = _calls(self.name, self._time(1))

    def _time(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self.run.call()
        return (time.perf_counter() - start) / calls

    def sample(self) -> float:
        self.run.reset()
        if self.calls > 1:
            time.sleep(0.002)
            self.run.call()
        return self._time(self.calls)


class EventClock:
    """Calls enqueued between two CUDA events, going round several sets of inputs so that the cache does not help."""

    name = "events"

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        for run in runs:
            run.call()
        torch.cuda.synchronize()
        self.calls = len(runs)
        self.calls = max(len(runs), _calls(self.name, self._time()))

    def _time(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(self.calls):
            self.runs[i % len(self.runs)].call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / self.calls

    def sample(self) -> float:
        for run in self.runs:
            run.reset()
        return self._time()


class GraphClock:
    """Replays of one CUDA graph that holds a call on every set of inputs: the device's time, without Python's.

    Raises:
        RuntimeError: the call cannot be captured (it waits for the device, say).
    """

    name = "graph"

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for run in runs:
                run.call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with _quiet_capture(), torch.cuda.graph(self.graph):
            for run in runs:
                run.call()
        self.replays = 1
        self._time()
        self.replays = _calls(self.name, self._time() * len(runs))

    def _time(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self.replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / (self.replays * len(self.runs))

    def sample(self) -> float:
        for run in self.runs:
            run.reset()
        return self._time()


@contextmanager
def _quiet_capture():
    """A capture that fails leaves the stream unusable until it is ended; torch does so on the way out."""
    try:
        yield
    except Exception as error:
        torch.cuda.synchronize()
        raise RuntimeError(f"cannot be captured in a CUDA graph: {str(error).splitlines()[0]}") from error
