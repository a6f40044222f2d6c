"""Being asked to stop: a signal becomes a question that the training loop asks between two steps."""

import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist


class Stopped(SystemExit):
    """A training that was asked to stop and did, with a checkpoint; uncaught it ends the process with exit code 0."""

    def __init__(self, message: str):
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """While entered, SIGTERM and the first Ctrl-C only set `asked`; a second Ctrl-C interrupts at once.

    With several processes, one that was asked speaks for all: `agreed` is the same in each of them.
    """

    def __init__(self):
        self._asked = False
        self._before: dict[int, signal.Handlers] = {}
        # Of its own, on the host: the answer must not wait for the device.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None

    def agreed(self) -> bool:
        """Whether to stop before the next step; every process must ask at the same step."""
        if self._group is None:
            return self._asked
        asked = torch.tensor(int(self._asked))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return bool(asked)

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; a training in another one is stopped by its owner.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
