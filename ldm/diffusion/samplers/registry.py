"""Samplers by name, and binding their options: what a sampler does not act on is an error, not ignored."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ldm.diffusion.ode.adaptive import dopri5
from ldm.diffusion.ode.own_time import euler_in_time, heun_in_time
from ldm.diffusion.ode.runge_kutta import euler, heun, midpoint, rk4
from ldm.diffusion.samplers.adaptive import dpm_adaptive
from ldm.diffusion.samplers.ancestral import ancestral
from ldm.diffusion.samplers.multistep import dpm_solver_2m, lms, plms
from ldm.diffusion.samplers.sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde, euler_ancestral
from ldm.diffusion.samplers.singlestep import (
    dpm_2_ancestral,
    dpm_fast,
    dpm_solver_2,
    dpm_solver_3,
    dpmpp_2s_ancestral,
)
from ldm.diffusion.transition import BoundSampler, Steps, ddim
from ldm.settings.names import SECOND_NAMES, suggest

Sampler = Callable[..., Steps]

SAMPLERS: dict[str, Sampler] = {
    "DDIM": ddim,
    "DDPM": ancestral,
    "PLMS": plms,
    "DPM-Solver++": dpm_solver_2m,
    "DPM-Solver-2": dpm_solver_2,
    "DPM-Solver-3": dpm_solver_3,
    "DPM-Solver-fast": dpm_fast,
    "DPM-Solver-adaptive": dpm_adaptive,
    "DPM-Solver++2S-ancestral": dpmpp_2s_ancestral,
    "DPM-Solver++SDE": dpmpp_sde,
    "DPM-Solver++2M-SDE": dpmpp_2m_sde,
    "DPM-Solver++3M-SDE": dpmpp_3m_sde,
    "DPM-2-ancestral": dpm_2_ancestral,
    "Euler-ancestral": euler_ancestral,
    "LMS": lms,
    "Heun": heun,
    "Euler": euler,
    "Midpoint": midpoint,
    "RK4": rk4,
    "Euler-time": euler_in_time,
    "Heun-time": heun_in_time,
    "Dopri5": dopri5,
}
SAMPLERS |= {second: SAMPLERS[name] for second, name in SECOND_NAMES.items()}
# Values of options that are true of every deterministic sampler.
DETERMINISTIC = {"eta": 0, "temperature": 1}


def sampler_defaults(name: str) -> dict[str, Any]:
    """What a sampler acts on, beside `noise` and `start`, and the values that its options have if they are not given.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {list(SAMPLERS)}, got '{name}'{suggest(name, SAMPLERS)}")
    parameters = inspect.signature(SAMPLERS[name]).parameters.values()
    named = {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    return {option: default for option, default in named.items() if option not in ("noise", "start")}


def sampler_options(name: str) -> tuple[str, ...]:
    """The names of `sampler_defaults`."""
    return tuple(sampler_defaults(name))


def make_sampler(name: str, **options: Any) -> Sampler:
    """The sampler `name` with its options bound, as `(denoiser, schedule, x, times, *, noise=None, start=0) -> Steps`.

    An option that is None counts as not given. `noise` may always be passed; deterministic samplers draw nothing.

    Raises:
        ValueError: for an unknown name, or an option that the sampler does not act on (eta = 0 and temperature = 1 are
            true of every deterministic one, and accepted), or a word where it takes a number.
    """
    known = sampler_defaults(name)
    solver = SAMPLERS[name]
    draws = "noise" in inspect.signature(solver).parameters
    neutral = {} if "temperature" in known else DETERMINISTIC
    bound = {option: value for option, value in options.items() if value is not None}
    foreign = [option for option, value in bound.items() if option not in known and neutral.get(option) != value]
    if foreign:
        near = suggest(foreign[0], known)
        raise ValueError(f"sampler {name} has no {', '.join(foreign)}; its options: {', '.join(known) or 'none'}{near}")
    bound = {option: value for option, value in bound.items() if option in known}
    for option, value in bound.items():
        _check_kind(name, option, value, known[option])
    return BoundSampler(solver, bound, draws)


def _check_kind(name: str, option: str, value: Any, default: Any) -> None:
    """Raise a ValueError where an option is a word, a number or a truth value and its default is of another kind."""
    kinds = {bool: "True or False", int: "a whole number", float: "a number", str: "a word"}
    wanted = kinds.get(type(default))
    fits = isinstance(value, type(default)) or (isinstance(default, float) and isinstance(value, int))
    if wanted is not None and (not fits or (isinstance(value, bool) and not isinstance(default, bool))):
        raise ValueError(f"{option} of sampler {name} takes {wanted}, got {value!r}")
