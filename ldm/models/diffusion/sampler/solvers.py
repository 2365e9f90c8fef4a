"""Samplers: generators of `Step`, functions of (denoiser, path, x, grid).

A sampler neither parses, prints, plots nor measures: whoever wants intermediates, branches or norms walks it.
`start` begins at grid step k with empty history: branching is a new generator.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.path import Path
from ldm.models.diffusion.sampler.transition import Noise, Step, advance, ddim_transition


def _intervals(grid: Tensor, start: int) -> list[tuple[int, float, float]]:
    """(index, from, to) of every step from `start` on."""
    times = grid.tolist()
    if not 0 <= start < len(times) - 1:
        raise ValueError(f"step {start} is not on a grid of {len(times) - 1} steps (0 is the noisiest)")
    return [(k, times[k], times[k + 1]) for k in range(start, len(times) - 1)]


def ddim(
    denoiser: Denoiser,
    path: Path,
    x: Tensor,
    grid: Tensor,
    *,
    eta: float = 0.0,
    temperature: float = 1.0,
    noise: Noise | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """DDIM at any eta (Song et al. 2021); eta = 0 is also the Euler step of EDM and of a flow.

    Args:
        x: state [..., B, C, H, W] at `grid[start]`.
        grid: descending times, see `grids`.
        eta: 0 deterministic .. 1 the variance of ancestral sampling.
        temperature: multiplies the noise, not the mean.
    """
    for index, u, s in _intervals(grid, start):
        prediction = denoiser(x, u)
        transition = ddim_transition(path, u, s, eta, temperature)
        step = advance(index, x, prediction.x0, prediction.eps, transition, noise)
        yield step
        x = step.x_next


@torch.no_grad()
def run(steps: Iterator[Step]) -> Tensor:
    """Walk a sampler to its end, without gradients; return the final state."""
    step = None
    for step in steps:
        pass
    assert step is not None
    return step.x_next
