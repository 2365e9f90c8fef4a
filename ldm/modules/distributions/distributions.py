"""The diagonal Gaussian that a KL autoencoder's encoder predicts, and the divergence of two."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal_kl(mean1: Tensor, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL divergence of N(mean1, exp(logvar1)) to N(mean2, exp(logvar2)), in nats, element by element.

    The arguments broadcast; numbers stand for tensors. It has latent-diffusion's name, for code that imports it there.
    """
    first, second = (torch.as_tensor(value).to(mean1) for value in (logvar1, logvar2))
    return 0.5 * (second - first + (first - second).exp() + (mean1 - mean2) ** 2 * (-second).exp() - 1.0)


class DiagonalGaussianDistribution:
    """Normal distribution over latents from its mean and log-variance (clamped to [-30, 20]).

    Args:
        parameters: mean and log-variance stacked, `[B, 2 C, H, W]`.
        deterministic: take the variance as zero.

    Source: Kingma & Welling 2014 (appendix B), as published in latent-diffusion.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        if parameters.shape[1] % 2:
            raise ValueError(f"parameters must have shape [B, 2 C, H, W], got {list(parameters.shape)}")
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)  # 2 x [B, C, H, W]
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.var = torch.zeros_like(self.mean) if deterministic else self.logvar.exp()
        self.std = self.var.sqrt()

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw `[B, C, H, W]`; the generator may live on another device."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The mean `[B, C, H, W]`."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL divergence to another Gaussian, or to the standard normal, in nats, `[B]`; 0 if deterministic."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar  # [B, C, H, W]
        else:
            distance = (self.mean - other.mean).square()  # [B, C, H, W]
            terms = (distance + self.var) / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor) -> Tensor:
        """Negative log density of a sample `[B, C, H, W]`, in nats, `[B]`; 0 if deterministic."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        terms = math.log(2 * math.pi) + self.logvar + (sample - self.mean).square() / self.var  # [B, C, H, W]
        return 0.5 * terms.flatten(1).sum(1)
