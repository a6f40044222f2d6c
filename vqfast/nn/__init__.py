"""Modules built on the ops."""

from vqfast.nn.fsq import FSQ
from vqfast.nn.lfq import LFQ
from vqfast.nn.residual_vq import GroupedResidualVQ, ResidualVQ
from vqfast.nn.routers import EntropyRouter, FeatureRouter, FixedRouter, RandomRouter
from vqfast.nn.sim_vq import SimVQ
from vqfast.nn.vector_quantize import VectorQuantize, accumulate_codebooks

__all__ = [
    "FSQ",
    "LFQ",
    "EntropyRouter",
    "FeatureRouter",
    "FixedRouter",
    "GroupedResidualVQ",
    "RandomRouter",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantize",
    "accumulate_codebooks",
]
