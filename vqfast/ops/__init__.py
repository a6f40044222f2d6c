"""vqfast's operations on tensors."""

from vqfast.ops.registry import backend  # isort: skip  (first: it registers the ops that the others bind)
from vqfast.ops.diffusion import diffusion_loss, p_sample, posterior, prior_kl, q_sample
from vqfast.ops.prepare import PreparedCodebook, prepare
from vqfast.ops.search import Quantized, codebook_stats, nearest_code, quantize
from vqfast.ops.transitions import Absorbing, Marginal, MaskAndReplace, Transition, Uniform

__all__ = [
    "Absorbing",
    "Marginal",
    "MaskAndReplace",
    "PreparedCodebook",
    "Quantized",
    "Transition",
    "Uniform",
    "backend",
    "codebook_stats",
    "diffusion_loss",
    "nearest_code",
    "p_sample",
    "posterior",
    "prior_kl",
    "prepare",
    "q_sample",
    "quantize",
]
