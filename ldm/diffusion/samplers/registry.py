"""Samplers by name, and binding their options: what a sampler does not act on is an error, not ignored."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ldm.diffusion.ode.adaptive import dopri5
from ldm.diffusion.ode.own_time import euler_in_time, heun_in_time
from ldm.diffusion.ode.runge_kutta import heun, midpoint, rk4
from ldm.diffusion.samplers.ancestral import ancestral
from ldm.diffusion.samplers.multistep import dpm_solver_2m, plms
from ldm.diffusion.transition import BoundSampler, Steps, ddim, euler

Sampler = Callable[..., Steps]

SAMPLERS: dict[str, Sampler] = {
    "DDIM": ddim,
    "DDPM": ancestral,
    "PLMS": plms,
    "DPM-Solver++": dpm_solver_2m,
    "dpmpp_2m": dpm_solver_2m,
    "Heun": heun,
    "Euler": euler,
    "Midpoint": midpoint,
    "RK4": rk4,
    "Euler-time": euler_in_time,
    "Heun-time": heun_in_time,
    "Dopri5": dopri5,
}
# Values of options that are true of every deterministic sampler.
DETERMINISTIC = {"eta": 0, "temperature": 1}


def sampler_options(name: str) -> tuple[str, ...]:
    """What a sampler acts on, beside `noise` and `start`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {list(SAMPLERS)}, got '{name}'")
    parameters = inspect.signature(SAMPLERS[name]).parameters.values()
    named = (parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
    return tuple(option for option in named if option not in ("noise", "start"))


def make_sampler(name: str, **options: Any) -> Sampler:
    """The sampler `name` with its options bound, as `(denoiser, schedule, x, times, *, noise=None, start=0) -> Steps`.

    An option that is None counts as not given. `noise` may always be passed; deterministic samplers draw nothing.

    Raises:
        ValueError: for an unknown name, or an option that the sampler does not act on (eta = 0 and temperature = 1 are
            true of every deterministic one, and accepted).
    """
    known = sampler_options(name)
    solver = SAMPLERS[name]
    draws = "noise" in inspect.signature(solver).parameters
    neutral = {} if "temperature" in known else DETERMINISTIC
    bound = {option: value for option, value in options.items() if value is not None}
    foreign = [option for option, value in bound.items() if option not in known and neutral.get(option) != value]
    if foreign:
        raise ValueError(f"sampler {name} has no {', '.join(foreign)}; its options: {', '.join(known) or 'none'}")
    bound = {option: value for option, value in bound.items() if option in known}
    return BoundSampler(solver, bound, draws)
