"""First stages of diffusers as first stages here: `encode` gives a latent or a distribution, `decode` an image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class StagedAutoencoderKL(AutoencoderKL):
    """`diffusers.AutoencoderKL`. Its latents are z - shift_factor, so that a scale alone is left to the model."""

    def __init__(self, **config: Any):
        super().__init__(**config)
        self.shift = float(self.config.shift_factor or 0.0)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:  # type: ignore[override]
        """Posterior over latents `[B, C, h, w]`, of images `[B, 3, H, W]`."""
        mean, log_variance = super().encode(x).latent_dist.parameters.chunk(2, dim=1)
        return DiagonalGaussianDistribution(torch.cat([mean - self.shift, log_variance], dim=1))

    def decode(self, z: Tensor) -> Tensor:  # type: ignore[override]
        """Images `[B, 3, H, W]` of latents `[B, C, h, w]`."""
        return super().decode(z + self.shift).sample

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Reconstruction of images, from the mode of their posterior."""
        return self.decode(self.encode(x).mode())


class StagedVQModel(VQModel):
    """`diffusers.VQModel`: latents before quantisation are diffused, decoding quantises them."""

    has_posterior = False

    def encode(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Latents `[B, D, h, w]` before quantisation, of images `[B, 3, H, W]`."""
        return super().encode(x).latents

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:  # type: ignore[override]
        """Images `[B, 3, H, W]` of latents `[B, D, h, w]`, quantised first unless `force_not_quantize`."""
        return super().decode(h, force_not_quantize=force_not_quantize).sample

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Reconstruction of images."""
        return self.decode(self.encode(x))
