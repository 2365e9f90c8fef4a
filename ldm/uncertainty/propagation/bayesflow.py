"""BayesFlow's recursion as published, kept so that its maps can be shown beside others; take `tangents` instead.

Along Euler's method for a flow, with v the velocity, gamma^2 its variance over weights, E and V mean and variance:

    x' = x + h (v(x) + gamma(x) z),   E' = E + h v(x),   V' = V + h^2 gamma^2(x) + 2 h Cov(X, v(X)),  X ~ N(E, V)

What is wrong with it, beside the weights drawn again at every step (`fresh`): it leaves out Var v(X), so that V can
turn negative; its mean moves by v at a random state; and as its code ran, every velocity was evaluated at the time of
pure noise (whole numbers held the times) and every covariance one step after it: `frozen_time`.
The corrected recursion is `bayesdiff(form="total")` along Euler.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.diffusion.samplers import Step
from ldm.diffusion.transition import ddim_transition, intervals
from ldm.uncertainty.propagation.fresh import PredictiveDenoiser, VarianceStep


@torch.no_grad()
def bayesflow(
    denoiser: PredictiveDenoiser,
    x: Tensor,
    times: Tensor,
    *,
    particles: int = 100,
    source: torch.Generator,
    frozen_time: bool = False,
) -> Iterator[VarianceStep]:
    """Walk a flow from x [B, C, H, W] at times[0]; its images are random, as published.

    Args:
        particles: states that the covariance is estimated from; 1 + particles evaluations a step.
        source: generator of all draws.
        frozen_time: evaluate velocities at times[0] and covariances at times[1], at every step.

    Yields steps and their variance [B, C, H, W], which may be negative.

    Raises:
        ValueError: for a schedule on which Euler's step is not x + h v: a flow's only.
    """
    if denoiser.schedule.field != "velocity":
        raise ValueError(f"BayesFlow's recursion is that of a flow; {type(denoiser.schedule).__name__} is none")

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64).to(x)

    mean, var = x, torch.zeros_like(x)
    for index, u, s in intervals(times, 0):
        at, later = (float(times[0]), float(times[1])) if frozen_time else (u, u)
        transition = ddim_transition(denoiser.schedule, u, s)
        a, b = denoiser.slopes(transition, x)
        v, gamma = denoiser.law(x, at)
        covariance = torch.zeros_like(x)
        if index:
            states = mean + var.clamp(min=0).sqrt() * draw((particles, *x.shape))
            speeds, _ = denoiser.states(states, later)
            covariance = ((states - mean) * (speeds - speeds.mean(0))).mean(0)
        drawn = v + gamma.sqrt() * draw(tuple(x.shape))
        mean = a * mean + b * v
        var = a**2 * var + b**2 * gamma + 2 * a * b * covariance
        parts = denoiser.target.solve(drawn, x, *denoiser.schedule.per_image(u))
        step = Step(index, u, x, *parts, transition, transition.mean(*parts))
        yield VarianceStep(step, var)
        x = step.x_next
