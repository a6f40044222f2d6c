"""Which backend runs an op: what is available, who supports what, in which order, and how to choose by name.

A backend is a module of `vqfast.ops.backends` with
    NAME, PRIORITY (higher is tried first), DEVICES (device types whose tensors it takes),
    unavailable(device_type) -> None, or why it cannot run on that kind of device,
    KERNELS: op name -> function with the op's arguments,
    unsupported(op, args) -> None, or why it cannot take these arguments.
A kernel with a true attribute `looks_at_values` raises ValueError itself where a value is out of range.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch

from vqfast.ops import schema
from vqfast.ops.backends import cpu, cuda, reference, triton
from vqfast.ops.checks import check_values, has_value_checks

BACKENDS: dict[str, ModuleType] = {b.NAME: b for b in sorted((cuda, triton, cpu, reference), key=lambda b: -b.PRIORITY)}

# The environment's choice is read once: looking it up takes a microsecond, a tenth of a small op.
# Process-wide rather than per thread: autograd runs the backward of CUDA ops in threads of its own.
_forced: str | None = os.environ.get("VQFAST_BACKEND") or None


@cache
def status(device_type: str) -> dict[str, str | None]:
    """Backend name -> None where it can run on this kind of device, else the reason why not."""
    return {
        name: (
            b.unavailable(device_type) if device_type in b.DEVICES else f"takes {' and '.join(b.DEVICES)} tensors only"
        )
        for name, b in BACKENDS.items()
    }


@cache
def _there(device_type: str) -> tuple[ModuleType, ...]:
    """Those that can run, in the order to try them."""
    return tuple(BACKENDS[name] for name, reason in status(device_type).items() if reason is None)


def _listing(device_type: str) -> str:
    states = status(device_type)
    there = ", ".join(name for name, reason in states.items() if reason is None)
    missing = "; ".join(f"{name}: {reason}" for name, reason in states.items() if reason is not None)
    return f"available for {device_type} tensors: {there} (not {missing})" if missing else f"available: {there}"


def _require(name: str, device_type: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} does not exist; {_listing(device_type)}")
    reason = status(device_type)[name]
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run here: {reason}; {_listing(device_type)}")
    return BACKENDS[name]


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every vqfast op inside the block on the backend `name`, in all threads.

    Raises:
        ValueError: no such backend, or no kind of device on which it can run.
    """
    global _forced
    devices = BACKENDS[name].DEVICES if name in BACKENDS else ("cpu",)
    if not any(name in BACKENDS and status(d)[name] is None for d in devices):
        _require(name, devices[0])
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def select(op: str, device_type: str, args: tuple) -> Callable[..., Any]:
    """The kernel that would run `op` on these arguments.

    Raises:
        ValueError: the backend asked for by name cannot take them.
    """
    if _forced:
        chosen = _require(_forced, device_type)
        reason = chosen.unsupported(op, args)
        if reason is not None:
            raise ValueError(f"backend {_forced!r} cannot run {op} on these arguments: {reason}")
        return chosen.KERNELS[op]
    for candidate in _there(device_type):
        if candidate.unsupported(op, args) is None:
            return candidate.KERNELS[op]
    raise ValueError(f"no backend runs {op} on {device_type} tensors; {_listing(device_type)}")


def _dispatcher(op: str, device_type: str) -> Callable[..., Any]:
    looked_at = has_value_checks(op)

    def run(*args: Any) -> Any:
        kernel = select(op, device_type, args)
        if looked_at:
            check_values(op, args, in_kernel=hasattr(kernel, "looks_at_values"))
        return kernel(*args)

    def run_in_place(*args: Any) -> None:
        run(*args)
        # A kernel writes through a raw pointer: without this autograd would not see that a saved tensor has changed.
        torch.autograd.graph.increment_version(args[0])

    return run_in_place if op.endswith("_") else run


for _op in schema.OPS:
    schema.LIBRARY.impl(_op, _dispatcher(_op, "cpu"), "CPU")
    schema.LIBRARY.impl(_op, _dispatcher(_op, "cuda"), "CUDA")
