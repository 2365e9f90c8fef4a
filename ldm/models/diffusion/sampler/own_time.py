"""Euler and Heun in a path's own time u, where the samplers before EDM stepped.

    dx/du = alpha'(u) x_0 + sigma'(u) eps

Other solvers here step in the variables in which lines are straight; on EDM's path the two are one. Source: Karras et
al. 2022 (arXiv 2206.00364), eq. 4 and alg. 3, whose ablations they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.path import Path
from ldm.models.diffusion.sampler.runge_kutta import churned
from ldm.models.diffusion.sampler.solvers import Steps, following, intervals
from ldm.models.diffusion.sampler.transition import Noise, Step, advance, ddim_transition


def velocity_at(denoiser: Denoiser, path: Path, x: Tensor, u: float) -> Tensor:
    """dx/du at (x, u), shape of the prediction."""
    prediction = denoiser(x, u)
    alpha_rate, sigma_rate = (rate.to(x) for rate in path.rates(u))
    return alpha_rate * prediction.x0 + sigma_rate * prediction.eps


def line_to(path: Path, index: int, x: Tensor, after: Tensor, u: float, s: float) -> Step:
    """The step from (x, u) to (after, s); its x_0 and eps are those of the straight line that joins the two."""
    (alpha, sigma), (alpha_s, sigma_s) = path.per_image(u), path.per_image(s)
    determinant = alpha * sigma_s - sigma * alpha_s
    x0 = (sigma_s / determinant).to(x) * x - (sigma / determinant).to(x) * after
    eps = (alpha / determinant).to(x) * after - (alpha_s / determinant).to(x) * x
    return advance(index, x, x0, eps, ddim_transition(path, u, s))


def euler_in_time(denoiser: Denoiser, path: Path, x: Tensor, grid: Tensor, *, start: int = 0) -> Steps:
    """Euler's method in the path's own time; S evaluations. x: state [..., B, C, H, W] at `grid[start]`."""
    for index, u, s in intervals(grid, start):
        step = line_to(path, index, x, x + (s - u) * velocity_at(denoiser, path, x, u), u, s)
        x = following(step, (yield step))


def heun_in_time(
    denoiser: Denoiser,
    path: Path,
    x: Tensor,
    grid: Tensor,
    *,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    noise: Noise | None = None,
    start: int = 0,
) -> Steps:
    """Heun's method in the path's own time, Euler's to clean data; 2S - 1 evaluations. Arguments of `heun`."""
    gamma = min(S_churn / (len(grid) - 1), math.sqrt(2) - 1)
    for index, u, s in intervals(grid, start):
        x, u = churned(path, index, x, u, gamma, (S_min, S_max), S_noise, noise)
        first = velocity_at(denoiser, path, x, u)
        after = x + (s - u) * first
        if index < len(grid) - 2:
            after = x + (s - u) * torch.lerp(first, velocity_at(denoiser, path, after, s), 0.5)
        step = line_to(path, index, x, after, u, s)
        x = following(step, (yield step))
