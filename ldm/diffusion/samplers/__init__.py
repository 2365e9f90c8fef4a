"""Samplers: times, the transitions between them, and the solvers that step along them."""

from ldm.diffusion.ode.adaptive import dopri5
from ldm.diffusion.ode.runge_kutta import heun, midpoint, rk4
from ldm.diffusion.samplers.ancestral import ancestral
from ldm.diffusion.samplers.multistep import dpm_solver_2m, plms
from ldm.diffusion.samplers.registry import SAMPLERS, make_sampler
from ldm.diffusion.times import make_times, vp_times
from ldm.diffusion.transition import Step, Transition, ddim, euler, run

__all__ = [
    "SAMPLERS",
    "Step",
    "Transition",
    "ancestral",
    "ddim",
    "dopri5",
    "dpm_solver_2m",
    "euler",
    "heun",
    "make_sampler",
    "make_times",
    "midpoint",
    "plms",
    "rk4",
    "run",
    "vp_times",
]
