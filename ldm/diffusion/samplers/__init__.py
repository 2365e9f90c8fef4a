"""Samplers: times, the transitions between them, and the solvers that step along them."""

from ldm.diffusion.ode.adaptive import dopri5
from ldm.diffusion.ode.runge_kutta import euler, heun, midpoint, rk4
from ldm.diffusion.samplers.adaptive import dpm_adaptive
from ldm.diffusion.samplers.ancestral import ancestral
from ldm.diffusion.samplers.multistep import dpm_solver_2m, lms, plms
from ldm.diffusion.samplers.registry import SAMPLERS, make_sampler
from ldm.diffusion.samplers.sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde, euler_ancestral
from ldm.diffusion.samplers.singlestep import (
    dpm_2_ancestral,
    dpm_fast,
    dpm_solver_2,
    dpm_solver_3,
    dpmpp_2s_ancestral,
)
from ldm.diffusion.times import make_times, vp_times
from ldm.diffusion.transition import Step, Transition, ddim, run

__all__ = [
    "SAMPLERS",
    "Step",
    "Transition",
    "ancestral",
    "ddim",
    "dopri5",
    "dpm_2_ancestral",
    "dpm_adaptive",
    "dpm_fast",
    "dpm_solver_2",
    "dpm_solver_2m",
    "dpm_solver_3",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "heun",
    "lms",
    "make_sampler",
    "make_times",
    "midpoint",
    "plms",
    "rk4",
    "run",
    "vp_times",
]
