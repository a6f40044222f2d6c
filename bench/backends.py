"""vqfast's own contenders: one for each backend that exists for a device."""

from collections.abc import Callable
from typing import Any

import torch

import vqfast
from bench.case import VQFAST, Contender, Run
from vqfast.ops.registry import BACKENDS, status


def vqfast_backends(
    device: str, ops: tuple[str, ...], call: Callable[[Any], Callable[[], Any]], *, reference: bool = True
) -> list[Contender]:
    """`call(problem)` gives the function to time; it runs on each backend in turn.

    Args:
        ops: operators that it goes through, to know whether a backend has them all.
        reference: whether the plain-torch definition competes; at some sizes it takes minutes.
    """

    def contender(name: str, reason: str | None) -> Contender:
        missing = [op for op in ops if op not in BACKENDS[name].KERNELS]
        if reason is None and missing:
            reason = f"no kernel for {', '.join(missing)}"

        def prepare(problem: Any) -> Run:
            work = call(problem)
            run = work if isinstance(work, Run) else Run(work)

            def on_backend(function: Callable[[], Any]) -> Callable[[], Any]:
                def forced() -> Any:
                    with vqfast.backend(name):
                        return function()

                return forced

            return Run(on_backend(run.call), run.reset, on_backend(run.evidence))

        return Contender(f"vqfast {name}", VQFAST, prepare, vqfast.__version__, reason or "")

    return [
        contender(name, reason)
        for name, reason in status(torch.device(device).type).items()
        if torch.device(device).type in BACKENDS[name].DEVICES
        and (reference or name != "reference")
        # The interpreter runs Triton's kernels one block at a time in Python: right, but not to be timed.
        and not (name == "triton" and torch.device(device).type == "cpu")
    ]
