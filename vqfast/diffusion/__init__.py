"""Discrete diffusion: noise schedules, the training process and bound, the samplers."""

from vqfast.diffusion.confidence import sample_by_confidence
from vqfast.diffusion.interpolation import interpolate
from vqfast.diffusion.process import DiscreteDiffusion, Elbo, Objective
from vqfast.diffusion.sampler import sample, sample_steps
from vqfast.diffusion.schedules import SCHEDULES, gaussian_betas, mask_and_replace, schedule
from vqfast.diffusion.windows import WindowedDenoiser
from vqfast.ops import (
    Absorbing,
    Dense,
    Gaussian,
    Marginal,
    MaskAndReplace,
    Nearest,
    SymmetricRate,
    Transition,
    Uniform,
    prior_kl,
)

__all__ = [
    "SCHEDULES",
    "Absorbing",
    "Dense",
    "DiscreteDiffusion",
    "Elbo",
    "Gaussian",
    "Marginal",
    "MaskAndReplace",
    "Nearest",
    "Objective",
    "SymmetricRate",
    "Transition",
    "Uniform",
    "WindowedDenoiser",
    "gaussian_betas",
    "interpolate",
    "mask_and_replace",
    "prior_kl",
    "sample",
    "sample_by_confidence",
    "sample_steps",
    "schedule",
]
