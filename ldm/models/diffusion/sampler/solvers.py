"""Samplers: generators of `Step`, functions of (denoiser, path, x, grid); here those with one evaluation a step.

A sampler neither parses, prints, plots nor measures: whoever wants intermediates, branches or norms walks it.
`start` begins at grid step k with empty history: branching is a new generator. A caller may `send` a state in place
of `step.x_next` (inpainting); iterating as usual changes nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.path import Path
from ldm.models.diffusion.sampler.transition import Noise, Step, advance, ddim_transition

Steps = Generator[Step, Tensor | None, None]


def intervals(grid: Tensor, start: int) -> list[tuple[int, float, float]]:
    """(index, from, to) of every step from `start` on.

    Raises:
        ValueError: if the times do not descend, or `start` is not a step of the grid.
    """
    times = grid.tolist()
    if not 0 <= start < len(times) - 1:
        raise ValueError(f"step {start} is not on a grid of {len(times) - 1} steps (0 is the noisiest)")
    if bool((grid.diff() >= 0).any()):
        raise ValueError(f"the times of a grid must descend from noise to data, got {times[:4]} ..")
    return [(k, times[k], times[k + 1]) for k in range(start, len(times) - 1)]


def following(step: Step, sent: Tensor | None) -> Tensor:
    """The state to go on from: what the caller sent, else where the step led."""
    return step.x_next if sent is None else sent


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
) -> Steps:
    """DDIM at any eta (Song et al. 2021); eta = 0 is also the Euler step of EDM and of a flow.

    Args:
        x: state [..., B, C, H, W] at `grid[start]`.
        grid: descending times, see `grids`.
        eta: 0 deterministic .. 1 the variance of ancestral sampling.
        temperature: multiplies the noise, not the mean.
    """
    for index, u, s in intervals(grid, start):
        prediction = denoiser(x, u)
        transition = ddim_transition(path, u, s, eta, temperature)
        step = advance(index, x, prediction.x0, prediction.eps, transition, noise)
        x = following(step, (yield step))


def euler(denoiser: Denoiser, path: Path, x: Tensor, grid: Tensor, *, start: int = 0) -> Steps:
    """Euler's method along straight lines of the path: line 2 without noise, which is DDIM at eta = 0."""
    return ddim(denoiser, path, x, grid, start=start)


@torch.no_grad()
def run(steps: Iterator[Step]) -> Tensor:
    """Walk a sampler to its end, without gradients; return the final state."""
    last = None
    for step in steps:
        last = step
    assert last is not None
    return last.x_next
