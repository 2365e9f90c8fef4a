"""Tables of betas, and the helpers that samplers written for latent-diffusion import, under their published names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def make_betas(
    schedule: str, timesteps: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> Tensor:
    """beta_1 .. beta_T as float64 [T] (latent-diffusion's names: "linear" is linear in sqrt(beta)).

    `cosine` follows Nichol and Dhariwal 2021, eq. 17: abar(t) = cos^2((t/T + s)/(1 + s) pi/2), beta at most 0.999.

    Raises:
        ValueError: for an unknown name.
    """
    if schedule == "linear":
        return torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64) ** 2
    if schedule == "sqrt_linear":
        return torch.linspace(linear_start, linear_end, timesteps, dtype=torch.float64)
    if schedule == "sqrt":
        return torch.linspace(linear_start, linear_end, timesteps, dtype=torch.float64) ** 0.5
    if schedule == "cosine":
        ramp = (torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + cosine_s) / (1 + cosine_s)
        abar = torch.cos(ramp * math.pi / 2) ** 2
        abar = abar / abar[0]
        return (1 - abar[1:] / abar[:-1]).clamp(0, 0.999)
    raise ValueError(f"beta_schedule must be linear, sqrt_linear, sqrt or cosine, got '{schedule}'")


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> np.ndarray:
    """Return the betas of `make_betas` as a NumPy array, float64 [T]."""
    return make_betas(schedule, n_timestep, linear_start, linear_end, cosine_s).numpy()


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Return the betas, float64 [T], of a function alpha-bar of time in [0, 1], each at most `max_beta`."""
    ends = [alpha_bar(step / num_diffusion_timesteps) for step in range(num_diffusion_timesteps + 1)]
    levels = np.array(ends, dtype=np.float64)
    return np.minimum(1 - levels[1:] / levels[:-1], max_beta)


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """Return latent-diffusion's ascending network times of DDIM, int64 [S].

    uniform: range(0, T, T // S) + 1, which is longer than S where S does not divide T.
    quad: (linspace(0, sqrt(0.8 T), S))^2 + 1, rounded down; it repeats times from about S = 29 on.

    Args:
        verbose: latent-diffusion prints here; nothing is printed.

    Raises:
        ValueError: for another method, or more steps than the table has entries.
    """
    if not 1 <= num_ddim_timesteps <= num_ddpm_timesteps:
        raise ValueError(f"the number of steps must lie in 1..{num_ddpm_timesteps}, got {num_ddim_timesteps}")
    if ddim_discr_method == "uniform":
        return np.arange(0, num_ddpm_timesteps, num_ddpm_timesteps // num_ddim_timesteps) + 1
    if ddim_discr_method == "quad":
        roots = np.linspace(0, np.sqrt(num_ddpm_timesteps * 0.8), num_ddim_timesteps)
        return (roots**2).astype(int) + 1
    raise ValueError(f"ddim_discr_method must be uniform or quad, got '{ddim_discr_method}'")


def make_ddim_sampling_parameters(
    alphacums: Any, ddim_timesteps: np.ndarray, eta: float, verbose: bool = True
) -> tuple[Any, Any, np.ndarray]:
    """Return sigmas, alphas and previous alphas of DDIM's steps (Song et al. 2021, eq. 16), [S] each.

    Args:
        alphacums: alpha-bar of the table's entries [T], a tensor or an array; the first two results are of its kind.
        ddim_timesteps: ascending network times [S].
        eta: 0 for no noise, 1 for the variance of ancestral sampling.
        verbose: latent-diffusion prints here; nothing is printed.
    """
    alphas = alphacums[ddim_timesteps]
    table = np.asarray(alphacums)
    previous = np.concatenate([table[:1], table[ddim_timesteps[:-1]]]).astype(np.float64)
    own = np.asarray(alphas, dtype=np.float64)
    sigmas = eta * np.sqrt((1 - previous) / (1 - own) * (1 - own / previous))
    return (torch.from_numpy(sigmas) if isinstance(alphacums, Tensor) else sigmas), alphas, previous


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Return a[t], [B, 1, .., 1] with as many axes as `x_shape`, to multiply states of that shape."""
    return a.gather(-1, t).reshape(len(t), *(1 for _ in x_shape[1:]))


def noise_like(
    shape: Sequence[int],
    device: torch.device | str,
    repeat: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw standard normal noise of a shape [B, ...] on a device; with `repeat` all of the batch share one draw.

    Without a generator the draw is torch's own, as samplers written for latent-diffusion expect, which seed that one.
    """
    drawn = (1, *shape[1:]) if repeat else tuple(shape)
    noise = torch.randn(drawn, device=device, generator=generator)
    return noise.expand(*shape).clone() if repeat else noise
