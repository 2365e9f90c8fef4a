"""Weights held for a whole trajectory: sampled members, and their first-order limit, tangents.

    sampled    K samplers from one x with weights W_k ~ N(W, S), variance over k
    tangents   z_k = d x / d W . (W_k - W), carried along the trajectory by derivatives in direction (z_k, W_k - W)

Samplers are linear in (x, x_0, eps), so a tangent is one more member of the state and no sampler knows of it. Weights
drawn again at every step (`redrawn`, `fresh`) lose the scale: their variance falls like 1 / steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.diffusion.denoiser import Denoiser, Network, Prediction
from ldm.diffusion.samplers import Step
from ldm.diffusion.samplers.registry import Sampler
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Noise
from ldm.ensembles.members import MemberNetwork, Members
from ldm.laplace import LastLayerLaplace

Build = Callable[[Network], Denoiser]


@dataclass(frozen=True)
class Propagated:
    """`image` [B, C, H, W] of the plain sampler, its variance `var` [B, C, H, W] over weights, and what gave it:
    `members` [K, B, C, H, W], sampled images or tangents."""

    image: Tensor
    var: Tensor
    members: Tensor


@dataclass(frozen=True)
class VarianceStep:
    """A step of the plain sampler and the variance [B, C, H, W] of `step.x_next`.

    `members` [K, B, C, H, W] gave it: sampled states, or where `tangent` derivatives; None where there are none.
    """

    step: Step
    var: Tensor
    members: Tensor | None = None
    tangent: bool = False


@dataclass(frozen=True)
class TangentDenoiser:
    """A denoiser of states [1 + K, B, C, H, W]: the state itself, then its tangents in K directions of the weights.

    The first member is what `build(network)` predicts, bit for bit. Derivatives pass through whatever `build` wraps
    (guidance, clipping); the learned variance fraction of an ancestral step is taken as constant.

    Args:
        build: network -> Denoiser, as `lambda network: model.denoiser(labels, scale, network)`.
        directions: changes of parameters {name: [K, ...]}, names as in the network's state dict.
        chunk: directions carried at once; all where None.
    """

    build: Build
    network: nn.Module
    directions: dict[str, Tensor]
    chunk: int | None = None

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        plain = self.build(self.network)(x[0], u)
        known = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        weights = {name: known[name].detach() for name in self.directions}

        def parts(state: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            prediction = self.build(lambda *args: functional_call(self.network, weights, args))(state, u)
            return prediction.x0, prediction.eps

        def push(tangent: Tensor, change: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return jvp(parts, (x[0], weights), (tangent, change))[1]

        with sdpa_kernel(SDPBackend.MATH):
            x0, eps = vmap(push, chunk_size=self.chunk)(x[1:], self.directions)
        return Prediction(torch.cat([plain.x0[None], x0]), torch.cat([plain.eps[None], eps]), plain.var_fraction)


def make_directions(network: nn.Module, members: Members) -> dict[str, Tensor]:
    """What members add to the network's own parameters {name: [K, ...]}."""
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    return {name: value - own[name].detach() for name, value in members.overrides.items()}


def all_directions(laplace: LastLayerLaplace) -> Members:
    """Members for tangents without sampling error: sqrt(C K) times every column of a root of the covariance.

    The mean of squared tangents is then diag(J S J^T) exactly, for K (+ 1) entries in each of C rows: affordable where
    the last layer is small.
    """
    shape = (laplace.layer.outputs, laplace.layer.width)
    count = shape[0] * shape[1]
    units = count**0.5 * torch.eye(count, dtype=torch.float64, device=laplace.mean.device).unflatten(1, shape)
    stacked = laplace.layer.overrides(laplace.mean + laplace.covariance().correlate(units))
    return Members({f"{laplace.name}.{key}": value for key, value in stacked.items()})


@torch.no_grad()
def sampled_steps(
    sampler: Sampler,
    build: Build,
    network: nn.Module,
    members: Members,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    chunk: int | None = None,
    noise: Noise | None = None,
    **options: Any,
) -> Iterator[VarianceStep]:
    """The steps of `sampled`, one at a time; it takes the same arguments."""
    given = options if noise is None else {**options, "noise": share_noise(noise)}
    plain = sampler(build(network), schedule, x, times, **given)
    members_walk = sampler(build(MemberNetwork(network, members, chunk)), schedule, x, times, **given)
    for step, each in zip(plain, members_walk, strict=True):
        yield VarianceStep(step, each.x_next.var(0), each.x_next)


@torch.no_grad()
def tangent_steps(
    sampler: Sampler,
    build: Build,
    network: nn.Module,
    members: Members,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    chunk: int | None = None,
    noise: Noise | None = None,
    **options: Any,
) -> Iterator[VarianceStep]:
    """The steps of `tangents`, one at a time; it takes the same arguments."""
    denoiser = TangentDenoiser(build, network, make_directions(network, members), chunk)
    given = options if noise is None else {**options, "noise": _for_the_first(noise)}
    start = torch.cat([x[None], x.new_zeros(len(members), *x.shape)])
    for step in sampler(denoiser, schedule, start, times, **given):
        own = {name: getattr(step, name)[0] for name in ("x", "x0", "eps", "x_next")}
        yield VarianceStep(replace(step, **own), step.x_next[1:].square().mean(0), step.x_next[1:], True)


def sampled(*args: Any, **options: Any) -> Propagated:
    """Every member samples from the same x with the same noise: the truth that other propagations approximate.

    Args, in order: sampler; `build(network) -> Denoiser`; network; members; schedule; the state x [B, C, H, W] at
    times[0];
    times. By name: `chunk` (images in one pass of the backbone), `noise`, and the sampler's own options.

    The variance is unbiased, with relative standard error sqrt(2 / (M - 1)) a pixel.
    """
    return _last(sampled_steps(*args, **options))


def tangents(*args: Any, **options: Any) -> Propagated:
    """The first-order limit of `sampled` for small changes of the weights: variance = mean of squared tangents.

    Arguments of `sampled`, but `chunk` counts directions. Their mean is known to be 0, so the relative standard error
    of draws is sqrt(2 / K) a pixel; `all_directions` has none. A `mean_shift` of the sampler is not differentiated.
    """
    return _last(tangent_steps(*args, **options))


def _last(steps: Iterator[VarianceStep]) -> Propagated:
    *_, last = steps
    assert last.members is not None  # both generators above give them
    return Propagated(last.step.x_next, last.var, last.members)


def share_noise(noise: Noise) -> Noise:
    """One draw an image for all members."""
    return lambda index, shape: noise(index, shape[-4:])


def _for_the_first(noise: Noise) -> Noise:
    """Noise for the state and none for its tangents, which do not depend on it directly."""

    def drawn(index: int, shape: Sequence[int]) -> Tensor:
        first = noise(index, shape[1:])
        return torch.cat([first[None], first.new_zeros(shape[0] - 1, *shape[1:])])

    return drawn
