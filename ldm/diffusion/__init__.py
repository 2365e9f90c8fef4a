"""Diffusion as functions of tensors: schedules of noise, denoisers, samplers, likelihoods.

Nothing here knows a network's class or a file of weights: a network is any callable (x, t, cond) -> output.
"""

from ldm.diffusion.affine import CosineSchedule, LinearAlphaSchedule, PolynomialSchedule
from ldm.diffusion.denoiser import Denoiser, Prediction, Target, clipped, guided, make_denoiser, make_target
from ldm.diffusion.epsilon_scaling import EpsilonScaling, load_scaling, save_scaling, scaled
from ldm.diffusion.flow_matching import diffusers_network, from_flow_matching, to_flow_matching
from ldm.diffusion.likelihood import Likelihood, log_likelihood
from ldm.diffusion.noise import ImageNoise, keyed_normal
from ldm.diffusion.samplers import SAMPLERS, Step, make_sampler, make_times, run
from ldm.diffusion.schedule import (
    AffineSchedule,
    EDMSchedule,
    FlowSchedule,
    LinearVPSchedule,
    Schedule,
    VESchedule,
    VPSchedule,
    make_betas,
)

__all__ = [
    "SAMPLERS",
    "AffineSchedule",
    "CosineSchedule",
    "Denoiser",
    "EDMSchedule",
    "EpsilonScaling",
    "FlowSchedule",
    "ImageNoise",
    "Likelihood",
    "LinearAlphaSchedule",
    "LinearVPSchedule",
    "PolynomialSchedule",
    "Prediction",
    "Schedule",
    "Step",
    "Target",
    "VESchedule",
    "VPSchedule",
    "clipped",
    "diffusers_network",
    "from_flow_matching",
    "guided",
    "keyed_normal",
    "load_scaling",
    "log_likelihood",
    "make_betas",
    "make_denoiser",
    "make_sampler",
    "make_target",
    "make_times",
    "run",
    "save_scaling",
    "scaled",
    "to_flow_matching",
]
