"""The conventions of flow_matching and of diffusers, for their users.

    here                    u = 0 data .. 1 noise, field eps - x_0, `Sampler(denoiser, schedule, x, times)`
    flow_matching           t = 0 noise .. 1 data, field x_1 - x_0 with x_0 the noise: t = 1 - u, minus our field
    diffusers (SD3, Flux)   sigma = u, timestep = 1000 u, field noise - data: ours

So a velocity network of either is a network here, with `FlowSchedule(reversed_time=True)` and its sign turned, or with
`FlowSchedule(time_scale=1000)`. And any denoiser of this project, whatever its schedule and target, is a velocity
model there.

Sources: Lipman et al. 2024 (arXiv 2412.06264); Esser et al. 2024 (arXiv 2403.03206, section 3 and eq. 23).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import NEAR_END, Denoiser, Network, NetworkDenoiser, Target
from ldm.diffusion.likelihood import log_likelihood, standard_normal
from ldm.diffusion.ode.tableau import Integrator, tableau
from ldm.diffusion.schedule import FlowSchedule, Schedule
from ldm.diffusion.shifted import shifted_times

__all__ = ["ODESolver", "diffusers_network", "from_flow_matching", "shifted_times", "to_flow_matching"]

# v(x [B, C, H, W], t [] or [B] with 0 at noise, **extras) -> [B, C, H, W] towards the data
VelocityModel = Callable[..., Tensor]


def from_flow_matching(model: VelocityModel, **extras: Any) -> Denoiser:
    """A velocity model of flow_matching's users as a denoiser on `FlowSchedule()`; `extras` go to every call of it."""

    def network(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return -model(x, t, **extras)

    return NetworkDenoiser(network, FlowSchedule(reversed_time=True), Target("velocity"))


def to_flow_matching(denoiser: Denoiser, schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    """Any denoiser on any schedule as a velocity model (x, t) of the straight schedule, t = 0 at noise.

    States of another schedule with the same sigma / alpha differ by their scale alone, which this takes into account;
    more noise than a schedule knows counts as its end, and at clean data, which only a flow's network knows, the
    velocity is x itself (eps has mean 0 there). t is one number: flow_matching's solvers ask for a batch at one time.
    """

    def velocity(x: Tensor, t: Tensor | float) -> Tensor:
        u = 1 - torch.as_tensor(t, dtype=torch.float64).flatten()[0]
        own = schedule.time_at(u / (1 - u)).clamp(max=schedule.end)
        if schedule.field == "eps" and schedule.ratio(own) <= NEAR_END:
            return x.clone()
        alpha, sigma = schedule.per_image(own)
        prediction = denoiser((alpha + sigma).to(x) * x, own)
        return prediction.x0 - prediction.eps

    return velocity


def diffusers_network(transformer: Callable[..., Any], **extras: Any) -> Network:
    """A flow transformer of diffusers, `transformer(hidden_states=, timestep=, **extras)`, as a network (x, t, cond).

    Use it on `FlowSchedule(time_scale=1000)` with the target "velocity": its output, noise - data, is that of our
    schedule. A
    condition goes in as `encoder_hidden_states`; outputs with a `sample` and tuples are unwrapped.
    """

    def network(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        given = extras if cond is None else {**extras, "encoder_hidden_states": cond}
        output = transformer(hidden_states=x, timestep=t, **given)
        return output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.sample

    return network


class ODESolver:
    """d x / d t = velocity_model(x, t) from noise (t = 0) to data (t = 1), with the methods of flow_matching's class.

    For uncertainty along the trajectory take `from_flow_matching(model)`: a denoiser for everything here that samples.
    """

    def __init__(self, velocity_model: VelocityModel):
        self.velocity_model = velocity_model

    def sample(
        self,
        x_init: Tensor,
        step_size: float | None = None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor | Sequence[float] = (0.0, 1.0),
        return_intermediates: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> Tensor:
        """The state at the last time of `time_grid`, or with `return_intermediates` at each of its times [T, B, ...].

        Args:
            x_init: state at the times' first time [B, C, H, W].
            step_size: step of a fixed-step method. As in torchdiffeq, steps are counted from the first time on, the
                last one is shorter where they do not divide the whole, and states at times between two steps lie on
                the straight line between them. None takes the times' own intervals. dopri5 chooses its steps.
            method: euler, midpoint, heun2, heun3, rk4 or dopri5, each torchdiffeq's rule of that name (rk4 is the 3/8
                rule, where the sampler RK4 is the classical one).
            time_grid: times in [0, 1], ascending from noise to data, or descending.
            model_extras: further arguments of the velocity model, a label for example.

        Raises:
            ValueError: for an unknown method, or times that cannot be integrated over.
        """

        def slope(x: Tensor, t: float) -> tuple[Tensor, None]:
            time = torch.tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
            return self.velocity_model(x, time, **model_extras), None

        integrator = Integrator(slope, tableau(method), rtol, atol)
        places = _places(time_grid, None if integrator.tableau.error else step_size)
        wanted = [float(time) for time in time_grid]
        x = x_init
        states = [x_init]
        with torch.set_grad_enabled(enable_grad):
            for start, stop in itertools.pairwise(places):
                after, _ = integrator.across(x, start, stop)
                while len(states) < len(wanted) and abs(wanted[len(states)] - places[0]) <= abs(stop - places[0]):
                    states.append(torch.lerp(x, after, (wanted[len(states)] - start) / (stop - start)))
                x = after
        return torch.stack(states) if return_intermediates else x

    def compute_likelihood(
        self,
        x_1: Tensor,
        log_p0: Callable[[Tensor], Tensor] = standard_normal,
        step_size: float | None = None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor | Sequence[float] = (1.0, 0.0),
        exact_divergence: bool = False,
        generator: torch.Generator | None = None,
        **model_extras: Any,
    ) -> tuple[Tensor, Tensor]:
        """The noise [B, C, H, W] that data x_1 come from and their log density [B] in nats.

        Args:
            log_p0: log density [B] of noise; standard normal where left out.
            time_grid: from 1 (data) down to 0 (noise).
            exact_divergence: else Hutchinson's estimate with one probe of `generator`, as theirs.
        """
        if not exact_divergence and generator is None:
            raise ValueError("pass generator= for the probe of the estimated divergence, or exact_divergence=True")
        places = _places(time_grid, None if tableau(method).error else step_size)
        times = 1 - torch.tensor(places, dtype=torch.float64).flip(0)
        found = log_likelihood(
            from_flow_matching(self.velocity_model, **model_extras),
            FlowSchedule(),
            x_1,
            times,
            method=method,
            rtol=rtol,
            atol=atol,
            probes=None if exact_divergence else 1,
            generator=None if exact_divergence else generator,
            log_prior=log_p0,
        )
        return found.noise, found.log_density


def _places(time_grid: Tensor | Sequence[float], step_size: float | None) -> list[float]:
    """The times between which a solver steps: the grid's own, or every `step_size` from its first time to its last."""
    times = torch.as_tensor(time_grid, dtype=torch.float64)
    widths = times.diff()
    if times.ndim != 1 or len(times) < 2 or not (bool((widths > 0).all()) or bool((widths < 0).all())):
        raise ValueError(f"time_grid must ascend or descend, with at least two times; got {times.tolist()}")
    if bool(((times < 0) | (times > 1)).any()) or (step_size is not None and not step_size > 0):
        raise ValueError(f"expected times in [0, 1] and step_size above 0, got {times.tolist()} and {step_size}")
    if step_size is None:
        return times.tolist()
    first, last = times[[0, -1]].tolist()
    count = math.ceil(abs(last - first) / step_size - 1e-9)
    return [first + math.copysign(step_size, last - first) * k for k in range(count)] + [last]
