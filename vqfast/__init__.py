"""vqfast: fused kernels for vector quantisation and discrete diffusion, and the models they power."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqfast.ops import backend, checked

__version__ = "0.1.0"

__all__ = ["backend", "checked"]


def __getattr__(name: str) -> Any:
    """The ops, and torch with them, when they are first asked for: until then the command line can be interrupted."""
    # torch first: it maps the OpenMP runtime that the CPU extension shares with it, and `from vqfast import _cpu` asks
    # here before it loads that.
    import torch  # noqa: F401

    if name == "ops" or name in __all__:
        from importlib import import_module

        ops = import_module("vqfast.ops")
        return ops if name == "ops" else getattr(ops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
