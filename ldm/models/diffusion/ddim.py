"""DDIM behind latent-diffusion's call signature."""

from __future__ import annotations

from ldm.models.diffusion.shell import SamplerShell


class DDIMSampler(SamplerShell):
    """`sample(...)` by DDIM at any eta (Song et al. 2021); see `SamplerShell`."""

    sampler_name = "DDIM"
    quantizes = True
