"""Samplers: grids of times, transitions between them, and the solvers that walk them."""

from ldm.models.diffusion.sampler.grids import make_grid, vp_grid
from ldm.models.diffusion.sampler.solvers import ddim, run
from ldm.models.diffusion.sampler.transition import Step, Transition

SAMPLERS = {"DDIM": ddim}

__all__ = ["SAMPLERS", "Step", "Transition", "ddim", "make_grid", "run", "vp_grid"]
