"""vqfast: fused kernels for vector quantisation and discrete diffusion, and the models they power."""

# torch first: it maps the OpenMP runtime that the CPU extension shares with it.
import torch  # noqa: F401  # isort: skip

from vqfast.ops import backend, checked

__version__ = "0.1.0"

__all__ = ["backend", "checked"]
