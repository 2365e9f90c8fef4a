"""Samples of a diffusion model: `decu sample model`, with latent-diffusion's options as well (--help)."""

from ldm.commands.compvis import run_sample_diffusion

if __name__ == "__main__":
    run_sample_diffusion()
