"""Denoisers: `denoiser(x, u) -> Prediction`, from what a network regresses, by one 2x2 solve.

    net(c_in x_u, t, c)  ~  a eps + b x_0          together with          x_u = alpha x_0 + sigma eps

A wrapper is Denoiser -> Denoiser and is applied exactly once. Leading axes broadcast: x may be [B, C, H, W] or, with
members, [M, B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ldm.diffusion.embedded import describe_condition
from ldm.diffusion.schedule import FlowSchedule, Schedule, VPSchedule

Network = Callable[[Tensor, Tensor, Any], Tensor]
# Nearer than this to clean data or to pure noise, in units of alpha + sigma, a state counts as there.
NEAR_END = 1e-8


@dataclass(frozen=True)
class Prediction:
    """What a denoiser knows of a state x = alpha x_0 + sigma eps: both parts [..., B, C, H, W].

    `var_fraction` in [0, 1] places the log-variance of an ancestral step between its two bounds (Nichol and Dhariwal
    2021, eq. 15); None where the network does not learn it.
    """

    x0: Tensor
    eps: Tensor
    var_fraction: Tensor | None = None


class Denoiser(Protocol):
    """What samplers ask: the data and noise in states x [..., B, C, H, W] at time u, one number or [B]."""

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction: ...


@dataclass(frozen=True)
class Target:
    """Coefficients of what is regressed, a eps + b x_0, and of the input scaling, as functions of (alpha, sigma)."""

    name: str
    sigma_data: float = 0.5

    def __post_init__(self):
        if self.name not in TARGETS:
            raise ValueError(f"parameterization must be one of {sorted(TARGETS)}, got '{self.name}'")

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, c_in), each of the shape of alpha."""
        return TARGETS[self.name](alpha, sigma, self.sigma_data)

    def of(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The regression target a eps + b x_0."""
        a, b, _ = self.coefficients(alpha, sigma)
        return a * eps + b * x0

    def solve(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, eps) from the network's output and the state it was given; ratios in the precision of alpha, sigma.

        Where the output and the state say the same (x_0 at sigma = 0, eps at alpha = 0), one part does not follow
        from them, and it takes the limit that its conditional mean has:

            sigma = 0    x_0 = x / alpha    eps = 0             of data with a density, E[eps | x] = -sigma grad log p
            alpha = 0    x_0 = 0            eps = x / sigma     of data with mean 0
        """
        a, b, _ = self.coefficients(alpha, sigma)
        determinant = alpha * a - sigma * b
        known = determinant.abs() > NEAR_END * (alpha + sigma) * (a.abs() + b.abs()).clamp(min=1)
        determinant = torch.where(known, determinant, 1.0)
        at_noise = alpha < sigma
        x0_of_x = torch.where(known, a / determinant, torch.where(at_noise, 0.0, 1 / alpha))
        x0_of_output = torch.where(known, sigma / determinant, 0.0)
        eps_of_x = torch.where(known, b / determinant, torch.where(at_noise, -1 / sigma, 0.0))
        eps_of_output = torch.where(known, alpha / determinant, 0.0)
        x0 = x0_of_x.to(x) * x - x0_of_output.to(x) * output
        eps = eps_of_output.to(x) * output - eps_of_x.to(x) * x
        return x0, eps


def _edm(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """Preconditioning of Karras et al. 2022, table 1, as one row of the table: F = (D - c_skip x) / c_out."""
    norm = (sigma**2 + sigma_data**2 * alpha**2).sqrt()
    return -sigma_data * alpha / norm, sigma / (sigma_data * norm), 1 / norm


TARGETS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]] = {
    "eps": lambda alpha, sigma, _: (torch.ones_like(alpha), torch.zeros_like(alpha), torch.ones_like(alpha)),
    # sigma times the score, -eps: what NCSN++ of Song et al. 2021b gives.
    "score": lambda alpha, sigma, _: (-torch.ones_like(alpha), torch.zeros_like(alpha), torch.ones_like(alpha)),
    "x0": lambda alpha, sigma, _: (torch.zeros_like(alpha), torch.ones_like(alpha), torch.ones_like(alpha)),
    "v": lambda alpha, sigma, _: (alpha, -sigma, torch.ones_like(alpha)),
    "velocity": lambda alpha, sigma, _: (torch.ones_like(alpha), -torch.ones_like(alpha), torch.ones_like(alpha)),
    "edm": _edm,
}


@dataclass(frozen=True)
class ScheduleVelocity(Target):
    """The velocity of a schedule, d x_u / d u = alpha' x_0 + sigma' eps (Lipman et al. 2023).

    On the straight schedule it is the target "velocity", eps - x_0. Where alpha' sigma = alpha sigma' (a polynomial
    schedule at pure noise), or a rate is infinite, it says nothing of the data, and `solve` gives its limits: for data
    whose mean is not 0 begin the times later, or regress x0 or v.
    """

    name: str = "velocity"
    schedule: Schedule = field(default_factory=FlowSchedule)

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope_alpha, slope_sigma = self.schedule.rates(self.schedule.time_at(sigma.double() / alpha.double()))
        return slope_sigma.to(alpha), slope_alpha.to(alpha), torch.ones_like(alpha)


def make_target(schedule: Schedule, name: str, sigma_data: float = 0.5) -> Target:
    """What a network regresses on a schedule: "velocity" is the schedule's own, all else a function of the levels.

    On a table of betas, which has no rates between its entries, "velocity" is eps - x_0.

    Raises:
        ValueError: for the noise where a table ends in pure noise, which says nothing of the data there.
    """
    if name in ("eps", "score") and isinstance(schedule, VPSchedule) and float(schedule.betas[-1]) == 1:
        raise ValueError(f"a table of betas that ends in 1, pure noise, takes the targets v and x0; got '{name}'")
    if name == "velocity" and not isinstance(schedule, (FlowSchedule, VPSchedule)):
        return ScheduleVelocity(name, sigma_data, schedule)
    return Target(name, sigma_data)


@dataclass(frozen=True)
class NetworkDenoiser:
    """A network `network(x, t, cond)` as a Denoiser: `cond` is a tensor with the batch axis first, or None;
    what else the network takes (a list or a mapping of tensors) is handed over as it is.

    With `learned_range` the network's output holds a second half along channels, the variance fraction in [-1, 1].
    The solve happens in float64 coefficients and the state's own dtype; `dtype` is what the network computes in, where
    that differs (EDM's reference keeps a float64 state around a float32 network).

    A network that says `shares_x` also takes r B conditions for the B images of x, condition j for image j mod B, and
    gives r B outputs: what does not depend on the condition then runs once for each image.
    """

    network: Network
    schedule: Schedule
    target: Target
    cond: Any = None
    learned_range: bool = False
    dtype: torch.dtype | None = None

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        alpha, sigma = self.schedule.per_image(u)
        scale = self.target.coefficients(alpha, sigma)[2].to(x)
        time = self.schedule.time_to_net(u).to(device=x.device, dtype=torch.float32).expand(x.shape[-4])
        output = self.network((scale * x).to(self.dtype or x.dtype), time, self.cond).to(x.dtype)
        fraction = None
        if self.learned_range:
            output, fraction = output.chunk(2, dim=-3)
            fraction = (fraction + 1) / 2
        repeats = (output.shape[-4] // x.shape[-4], x.shape[-4])
        x0, eps = self.target.solve(output.unflatten(-4, repeats), x.unsqueeze(-5), alpha, sigma)
        return Prediction(x0.flatten(-5, -4), eps.flatten(-5, -4), fraction)


def join_conditions(first: Any, second: Any) -> Any:
    """Return two embedded conditions as one of both batches, the first one's before the second's.

    Args:
        first, second: tensors [B, ...], lists of such, or mappings of these by equal keys (latent-diffusion's
            `{"c_crossattn": [c], "c_concat": [z]}`); None goes with None.

    Raises:
        ValueError: if the two are not of one form.
    """
    if first is None and second is None:
        return None
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return {name: join_conditions(first[name], second[name]) for name in first}
    lists = isinstance(first, (list, tuple)) and isinstance(second, (list, tuple))
    if lists and len(first) == len(second):
        return [join_conditions(one, other) for one, other in zip(first, second, strict=True)]
    raise ValueError(
        f"a condition and its null must be of one form to be guided, got {describe_condition(second)} "
        f"and {describe_condition(first)}"
    )


@dataclass(frozen=True)
class GuidedDenoiser:
    """Classifier-free guidance (Ho and Salimans 2022): eps = e_u + s (e_c - e_u), in one batch of [null; cond].

    What a network that `shares_x` computes before it reads the condition is computed once for both.

    Guidance is linear, so it acts on x_0 alike; `var_fraction` is the conditional half's. s = 1 is off.
    """

    denoiser: NetworkDenoiser
    null: Any
    scale: float

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        null, cond = self.predict_both(x, u)
        x0 = torch.lerp(null.x0, cond.x0, self.scale)
        return Prediction(x0, torch.lerp(null.eps, cond.eps, self.scale), cond.var_fraction)

    def predict_both(self, x: Tensor, u: Tensor | float) -> tuple[Prediction, Prediction]:
        """Return what is predicted under the null condition, and under the condition."""
        assert self.denoiser.cond is not None, "guided() makes sure of a condition"
        both = replace(self.denoiser, cond=join_conditions(self.null, self.denoiser.cond))
        if not getattr(self.denoiser.network, "shares_x", False):
            u = torch.as_tensor(u)
            x, u = torch.cat([x, x], dim=-4), torch.cat([u, u]) if u.ndim else u
        prediction = both(x, u)
        (x0_null, x0), (eps_null, eps) = prediction.x0.chunk(2, dim=-4), prediction.eps.chunk(2, dim=-4)
        fraction = None if prediction.var_fraction is None else prediction.var_fraction.chunk(2, dim=-4)[1]
        return Prediction(x0_null, eps_null), Prediction(x0, eps, fraction)


def guided(denoiser: NetworkDenoiser, null: Any, scale: float) -> Denoiser:
    """`denoiser` under classifier-free guidance; scale 1 returns it unchanged.

    Raises:
        ValueError: if guidance is asked for without a condition or a null condition.
    """
    if scale == 1:
        return denoiser
    if denoiser.cond is None or null is None:
        raise ValueError(f"guidance scale {scale} needs a conditional model and its null class; use scale 1")
    return GuidedDenoiser(denoiser, null, scale)


def make_denoiser(
    network: Network,
    schedule: Schedule,
    target: Target,
    cond: Tensor | None = None,
    *,
    null: Tensor | int | None = None,
    scale: float = 1.0,
    learned_range: bool = False,
) -> Denoiser:
    """Make the denoiser of a network for conditions [B, ...], under classifier-free guidance of a `scale`.

    Args:
        null: null conditions [B, ...], or the label of the null class where conditions are labels.
        learned_range: the network's output holds the variance fraction as a second half.

    Raises:
        ValueError: if guidance is asked for without a condition or a null condition.
    """
    plain = NetworkDenoiser(network, schedule, target, cond, learned_range=learned_range)
    if isinstance(null, int):
        null = None if cond is None else torch.full_like(cond, null)
    return guided(plain, null, scale)


@dataclass(frozen=True)
class MappedDenoiser:
    """Apply `function` to the predicted x_0 (clipping, quantisation) and, by default, re-derive eps from it.

    With `rederive=False` eps stays as predicted: CompVis' quantised x_0, which breaks x = alpha x_0 + sigma eps. So it
    does at sigma = 0, where eps does not follow from x_0.
    """

    denoiser: Denoiser
    schedule: Schedule
    function: Callable[[Tensor], Tensor]
    rederive: bool = True

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        prediction = self.denoiser(x, u)
        x0 = self.function(prediction.x0)
        eps = prediction.eps
        if self.rederive:
            alpha, sigma = self.schedule.coefficients(u, x)
            noisy = sigma > 0
            eps = torch.where(noisy, (x - alpha * x0) / torch.where(noisy, sigma, 1.0), eps)
        return Prediction(x0, eps, prediction.var_fraction)


# Whether x_0 is clamped to [-1, 1]; x0_only: steps of DDIM keep the eps that was predicted.
Clipping = bool | Literal["x0_only"]


def clipped(denoiser: Denoiser, schedule: Schedule, bound: float = 1.0, rederive: bool = True) -> Denoiser:
    """Clamp x_0 to [-bound, bound], as pixel models do (`clip_denoised`); see `MappedDenoiser` for `rederive`."""
    return MappedDenoiser(denoiser, schedule, lambda x0: x0.clamp(-bound, bound), rederive)
