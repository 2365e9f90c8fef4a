"""DPM-Solver++(2M) behind latent-diffusion's call signature."""

from __future__ import annotations

from ldm.models.diffusion.shell import SamplerShell


class DPMSolverSampler(SamplerShell):
    """`sample(...)` by DPM-Solver++(2M) (Lu et al. 2022b), eta = 0; see `SamplerShell`."""

    sampler_name = "DPM-Solver++"
