"""vqfast's operations on tensors."""

from vqfast.ops import registry as _registry  # registers the ops before anything binds them
from vqfast.ops.diffusion import diffusion_loss, p_sample, q_sample
from vqfast.ops.search import Quantized, codebook_stats, nearest_code, quantize
from vqfast.ops.transitions import Uniform

backend = _registry.backend

__all__ = [
    "Quantized",
    "Uniform",
    "backend",
    "codebook_stats",
    "diffusion_loss",
    "nearest_code",
    "p_sample",
    "q_sample",
    "quantize",
]
