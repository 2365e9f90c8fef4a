"""PLMS behind latent-diffusion's call signature."""

from __future__ import annotations

from ldm.models.diffusion.shell import SamplerShell


class PLMSSampler(SamplerShell):
    """`sample(...)` by pseudo linear multi-step (Liu et al. 2022), eta = 0; see `SamplerShell`."""

    sampler_name = "PLMS"
