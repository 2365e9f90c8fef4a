"""Samplers: generators of `Step`, functions of (denoiser, schedule, x, times); here those with one evaluation a step.

A sampler neither parses, prints, plots nor measures: whoever wants intermediates, branches or norms
iterates over its steps.
`start` begins at step k with empty history: branching is a new generator. A caller may `send` a state in place
of `step.x_next` (inpainting); iterating as usual changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Noise, Step, Steps, advance, ddim_transition, following, intervals


def ddim(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 0.0,
    temperature: float = 1.0,
    noise: Noise | None = None,
    start: int = 0,
) -> Steps:
    """DDIM at any eta (Song et al. 2021); eta = 0 is also the Euler step of EDM and of a flow.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        times: descending times, see `grids`.
        eta: 0 deterministic .. 1 the variance of ancestral sampling.
        temperature: multiplies the noise, not the mean.
    """
    for index, u, s in intervals(times, start):
        prediction = denoiser(x, u)
        transition = ddim_transition(schedule, u, s, eta, temperature)
        step = advance(index, x, prediction.x0, prediction.eps, transition, noise)
        x = following(step, (yield step))


def euler(denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, *, start: int = 0) -> Steps:
    """Euler's method along straight lines of the schedule: line 2 without noise, which is DDIM at eta = 0."""
    return ddim(denoiser, schedule, x, times, start=start)


@torch.no_grad()
def run(steps: Iterator[Step]) -> Tensor:
    """Walk a sampler to its end, without gradients; return the final state."""
    last = None
    for step in steps:
        last = step
    assert last is not None
    return last.x_next
