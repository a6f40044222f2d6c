"""Discrete diffusion: noise schedules, the training process and bound, the sampler."""

from vqfast.diffusion.process import DiscreteDiffusion, Elbo, Objective, prior_kl
from vqfast.diffusion.sampler import sample, sample_steps
from vqfast.diffusion.schedules import SCHEDULES, schedule
from vqfast.ops import Uniform

__all__ = [
    "SCHEDULES",
    "DiscreteDiffusion",
    "Elbo",
    "Objective",
    "Uniform",
    "prior_kl",
    "sample",
    "sample_steps",
    "schedule",
]
