"""One benchmark: an op at a shape, who competes in it, and how a result is judged before anybody is timed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

VQFAST, PEER, YARDSTICK = "vqfast", "peer", "yardstick"

# A float32 peer may miss near-ties: it is timed, with the number of rows it got wrong beside the time.
PEER_MISMATCHES = 1e-3


@dataclass(frozen=True)
class Verdict:
    """mismatches: how many discrete results differ from the exact answer.
    error: ||got - exact|| / ||exact|| of real results, the exact answer in float64.
    wrong: why the result is not worth timing; empty where it is.
    """

    mismatches: int | None = None
    error: float | None = None
    wrong: str = ""


@dataclass(frozen=True)
class Run:
    """`call` does the work once and returns its result. `evidence` gives the judge something more than that: what
    the call left behind, or a draw from a fixed seed. `reset`, never timed, undoes what calls leave behind.
    """

    call: Callable[[], Any]
    reset: Callable[[], None] = lambda: None
    evidence: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Contender:
    """`role` is VQFAST, PEER, or YARDSTICK: part of the work only, shown for scale and never the best peer.

    `prepare(problem)` does what a user does once and returns the Run. `unavailable` says why it cannot run here.
    `compiled` takes seconds before its first result; `captured`: it may go into a CUDA graph, as it never waits.
    """

    name: str
    role: str
    prepare: Callable[[Any], Run]
    version: str = ""
    unavailable: str = ""
    compiled: bool = False
    captured: bool = True


@dataclass(frozen=True, eq=False)
class Case:
    """`problem(seed)` makes fresh inputs; `judge(contender, run, problem)` calls the run and looks at its result.

    `bytes_moved` reads each input once and writes each output once; `flops` are the operations that no method avoids,
    done by the matrix units where `matmul` is set.
    """

    op: str
    shape: Mapping[str, Any]
    dtype: torch.dtype
    device: str
    problem: Callable[[int], Any]
    judge: Callable[[Contender, Run, Any], Verdict]
    contenders: tuple[Contender, ...]
    bytes_moved: int
    flops: int
    matmul: bool = False

    @property
    def shape_text(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.shape.items())

    @property
    def dtype_text(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.op} {self.shape_text} {self.dtype_text}"


def judge_indices(contender: Contender, got: torch.Tensor, exact: torch.Tensor) -> Verdict:
    """vqfast may miss none; a peer fewer than one in a thousand."""
    if got.shape != exact.shape:
        return Verdict(wrong=f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    wrong = int((got != exact).sum())
    allowed = 0 if contender.role == VQFAST else PEER_MISMATCHES * exact.numel()
    return Verdict(mismatches=wrong, wrong=f"{wrong} of {exact.numel()} indices differ" if wrong > allowed else "")


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """||got - exact|| / ||exact||; infinite where got is not finite."""
    error = float((got.double() - exact).norm() / exact.norm().clamp(min=1e-300))
    return error if error == error else float("inf")


def judge_values(contender: Contender, errors: Mapping[str, float], ours: float, theirs: float) -> Verdict:
    """The largest of the relative errors, against the limit of the contender's role."""
    what, worst = max(errors.items(), key=lambda item: item[1])
    limit = ours if contender.role == VQFAST else theirs
    return Verdict(error=worst, wrong=f"{what} is off by {worst:.1e} (limit {limit:.0e})" if worst > limit else "")
