"""What a table of betas says of its entries, under latent-diffusion's names; methods of `LatentDiffusion`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ldm.diffusion.denoiser import Clipping
from ldm.diffusion.noise import CountedNoise
from ldm.models.diffusion.shell import TableModel
from ldm.modules.diffusionmodules.tables import extract_into_tensor


class AncestralModel(TableModel, Protocol):
    """What ancestral sampling asks of a model, beside what CompVis' samplers ask."""

    clip_denoised: Clipping
    sampling_draws: CountedNoise

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of the states."""

    def get_buffer(self, target: str) -> Tensor:
        """Return a table [T] by name."""

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return x_t."""


def q_mean_variance(model: AncestralModel, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean [B, C, H, W], variance and log-variance [B, 1, 1, 1] of q(x_t | x_0) at entries t [B]."""
    mean = extract_into_tensor(model.get_buffer("sqrt_alphas_cumprod"), t, x_start.shape) * x_start
    variance = extract_into_tensor(1 - model.get_buffer("alphas_cumprod"), t, x_start.shape)
    return mean, variance, extract_into_tensor(model.get_buffer("log_one_minus_alphas_cumprod"), t, x_start.shape)


def predict_start_from_noise(model: AncestralModel, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return x_0 = (x_t - sigma eps) / alpha [B, C, H, W] for predicted noise at entries t [B]."""
    scale = extract_into_tensor(model.get_buffer("sqrt_recip_alphas_cumprod"), t, x_t.shape)
    return scale * x_t - extract_into_tensor(model.get_buffer("sqrt_recipm1_alphas_cumprod"), t, x_t.shape) * noise


def predict_start_from_z_and_v(model: AncestralModel, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Return x_0 = alpha x_t - sigma v [B, C, H, W] for a predicted v at entries t [B] (Salimans and Ho 2022)."""
    alpha = extract_into_tensor(model.get_buffer("sqrt_alphas_cumprod"), t, x_t.shape)
    return alpha * x_t - extract_into_tensor(model.get_buffer("sqrt_one_minus_alphas_cumprod"), t, x_t.shape) * v


def predict_eps_from_z_and_v(model: AncestralModel, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Return eps = alpha v + sigma x_t [B, C, H, W] for a predicted v at entries t [B]."""
    alpha = extract_into_tensor(model.get_buffer("sqrt_alphas_cumprod"), t, x_t.shape)
    return alpha * v + extract_into_tensor(model.get_buffer("sqrt_one_minus_alphas_cumprod"), t, x_t.shape) * x_t


def q_posterior(model: AncestralModel, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 6 and 7)."""
    names = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "posterior_log_variance_clipped")
    of_start, of_state, variance, log_variance = (
        extract_into_tensor(model.get_buffer(name), t, x_t.shape) for name in names
    )
    return of_start * x_start + of_state * x_t, variance, log_variance
