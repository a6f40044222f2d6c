"""vqfast's operations on tensors.

All of them go through torch.compile and through torch.func: vmap, and where there is a gradient grad, vjp and jacrev;
not jvp, and no second derivative. Rows that vmap adds to a search or a loss are rows of one call; other ops are called
once an example.
"""

from vqfast.ops.registry import backend  # isort: skip  (first: it registers the ops that the others bind)
from vqfast.ops import batching  # noqa: F401  (registers how ops are mapped)
from vqfast.ops.checks import checked
from vqfast.ops.diffusion import diffusion_loss, p_sample, posterior, prior_kl, q_sample, transition_matmul
from vqfast.ops.dynamic import DynamicQuantized, code_weights, dynamic_quantize, grain_budget_loss
from vqfast.ops.matrix_transitions import (
    Dense,
    Gaussian,
    Nearest,
    SymmetricRate,
    embedding_neighbours,
    neighbour_rate,
)
from vqfast.ops.packing import Packed, grain_entropy, pack, position_mask, unpack
from vqfast.ops.padded import Padded, from_padded, special_tokens, to_padded
from vqfast.ops.prepared import PreparedCodebook, prepare
from vqfast.ops.residual import ResidualCodes, residual_nearest
from vqfast.ops.search import Quantized, codebook_stats, nearest_code, quantize
from vqfast.ops.transitions import Absorbing, Marginal, MaskAndReplace, Transition, Uniform

__all__ = [
    "Absorbing",
    "Dense",
    "DynamicQuantized",
    "Gaussian",
    "Marginal",
    "MaskAndReplace",
    "Nearest",
    "Packed",
    "Padded",
    "PreparedCodebook",
    "Quantized",
    "ResidualCodes",
    "SymmetricRate",
    "Transition",
    "Uniform",
    "backend",
    "checked",
    "code_weights",
    "codebook_stats",
    "diffusion_loss",
    "dynamic_quantize",
    "embedding_neighbours",
    "from_padded",
    "grain_budget_loss",
    "grain_entropy",
    "nearest_code",
    "neighbour_rate",
    "p_sample",
    "pack",
    "position_mask",
    "posterior",
    "prepare",
    "prior_kl",
    "q_sample",
    "quantize",
    "residual_nearest",
    "special_tokens",
    "to_padded",
    "transition_matmul",
    "unpack",
]
