"""Steering: samples are led away from states at which a number J(x) of the state is large, at a stated strength.

    eps' = eps + s |eps| g / |g|        x_0' = (x - sigma eps') / alpha        g = grad_x J(x, u)

so the score loses a part along g whose length is the share s of the predicted noise's: whatever J is, two of them with
one s act equally strongly, and their directions alone differ. J may be how far the members of an ensemble are apart
(`ldm.pipelines.steering`), or a control that knows nothing of weights. s below 0 leads towards large J.

Guidance by an uncertainty's gradient: De Vita and Belagiannis 2025 (arXiv 2412.00205); their strength is that of J.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.schedule import Schedule

# (x [B, C, H, W], u) -> one number an image [B].
StateMeasure = Callable[[Tensor, Tensor | float], Tensor]


@dataclass(frozen=True)
class SteeredDenoiser:
    """A denoiser whose predicted noise is bent along the gradient of a measure of the state.

    Where there is no data (alpha = 0), and where the gradient is 0, nothing changes.

    Args:
        denoiser: with all that wraps it; steering is the last wrapper.
        schedule: its schedule.
        measure: J.
        strength: s.
    """

    denoiser: Denoiser
    schedule: Schedule
    measure: StateMeasure
    strength: float

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        prediction = self.denoiser(x, u)
        alpha, sigma = self.schedule.coefficients(u, x)
        if bool((alpha == 0).any()):
            return prediction
        direction = self.direction(x, u)
        shift = self.strength * _lengths(prediction.eps) * direction
        eps = prediction.eps + shift
        return Prediction(prediction.x0 - sigma / alpha * shift, eps, prediction.var_fraction)

    def direction(self, x: Tensor, u: Tensor | float) -> Tensor:
        """Return grad_x J over its length in each image [B, C, H, W]; 0 where there is no gradient."""
        slope = grad(lambda state: self.measure(state, u).sum())(x)
        length = _lengths(slope)
        return torch.where(length > 0, slope / length.clamp(min=torch.finfo(slope.dtype).tiny), 0.0)


def _lengths(values: Tensor) -> Tensor:
    """Return the length of each image [..., 1, 1, 1] of [..., C, H, W]."""
    return values.flatten(-3).norm(dim=-1)[..., None, None, None]


def spread_times(times: Tensor, density: Tensor, power: float = 1.0) -> Tensor:
    """Return times [S + 1] with the same ends, closer to one another where a density is high.

    Each of the new steps holds an equal share of the sum of density^power over the old ones, along which it is
    constant: at power 0, or where the density is the same everywhere, the times stay as they are.

    Args:
        times: [S + 1], descending.
        density: of each step [S], above 0.

    Raises:
        ValueError: for a density that is not above 0, or not of the steps.
    """
    if density.shape != (len(times) - 1,) or not bool((density > 0).all()):
        raise ValueError(f"expected a density above 0 for each of {len(times) - 1} steps, got {density.tolist()}")
    steps = len(density)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), density.double().cpu().pow(power).cumsum(0)])
    wanted = mass[-1] * torch.arange(steps + 1, dtype=torch.float64) / steps
    step = torch.searchsorted(mass, wanted, right=True).clamp(1, steps) - 1
    share = (wanted - mass[step]) / (mass[step + 1] - mass[step])
    grid = times.double().cpu()
    spread = grid[step] + share * (grid[step + 1] - grid[step])
    spread[0], spread[-1] = grid[0], grid[-1]
    return spread.to(times)
