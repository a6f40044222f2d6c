"""Discrete diffusion: noise schedules, the training process and bound, the samplers."""

from vqfast.diffusion.confidence import sample_by_confidence
from vqfast.diffusion.interpolation import interpolate
from vqfast.diffusion.process import DiscreteDiffusion, Elbo, Objective
from vqfast.diffusion.sampler import sample, sample_steps
from vqfast.diffusion.schedules import SCHEDULES, mask_and_replace, schedule
from vqfast.diffusion.windows import WindowedDenoiser
from vqfast.ops import Absorbing, Marginal, MaskAndReplace, Transition, Uniform, prior_kl

__all__ = [
    "SCHEDULES",
    "Absorbing",
    "DiscreteDiffusion",
    "Elbo",
    "Marginal",
    "MaskAndReplace",
    "Objective",
    "Transition",
    "Uniform",
    "WindowedDenoiser",
    "interpolate",
    "mask_and_replace",
    "prior_kl",
    "sample",
    "sample_by_confidence",
    "sample_steps",
    "schedule",
]
