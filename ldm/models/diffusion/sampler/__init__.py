"""Samplers: grids of times, transitions between them, and the solvers that walk them."""

from ldm.models.diffusion.sampler.adaptive import dopri5
from ldm.models.diffusion.sampler.ancestral import ancestral
from ldm.models.diffusion.sampler.grids import make_grid, vp_grid
from ldm.models.diffusion.sampler.multistep import dpm_solver_2m, plms
from ldm.models.diffusion.sampler.registry import SAMPLERS, make_sampler
from ldm.models.diffusion.sampler.runge_kutta import heun, midpoint, rk4
from ldm.models.diffusion.sampler.solvers import ddim, euler, run
from ldm.models.diffusion.sampler.transition import Step, Transition

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
    "make_grid",
    "make_sampler",
    "midpoint",
    "plms",
    "rk4",
    "run",
    "vp_grid",
]
