"""Weights drawn again at every evaluation, followed by sampled states: the process behind BayesDiff's recursion.

    x_{k+1} = F(x_k; W_k1, W_k2, ..),    W_ki ~ N(W, S) anew for every evaluation i of every step k

Nothing is approximated but by the number of states, so that the covariances between pixels, curvature, and what an
evaluation does to the later ones of its step, or of later steps that remember it, are all in it. Against weights that
are held (`persistent`) such a process loses the scale, since errors of one evaluation average out against those of the
next; with first-order samplers it keeps the order of pixels and of images. Solvers that extrapolate amplify errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.samplers.registry import Sampler
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Noise
from ldm.ensembles.members import MemberNetwork, Members
from ldm.uncertainty.propagation.persistent import Build, VarianceStep, share_noise


@dataclass(frozen=True)
class RedrawnDenoiser:
    """A denoiser of states [P, B, C, H, W], or of [B, C, H, W] that all share, with new weights at every call.

    Args:
        build: network -> Denoiser, with whatever acts on predictions.
        draw: gives new weights, one for each state of an image; images share them.
        chunk: images in one pass of the backbone.
    """

    build: Build
    network: nn.Module
    draw: Callable[[], Members]
    chunk: int | None = None

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        return self.build(MemberNetwork(self.network, self.draw(), self.chunk))(x, u)


@torch.no_grad()
def redrawn_steps(
    sampler: Sampler,
    build: Build,
    network: nn.Module,
    draw: Callable[[], Members],
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    chunk: int | None = None,
    noise: Noise | None = None,
    **options: Any,
) -> Iterator[VarianceStep]:
    """Walk the plain sampler, and beside it states that see new weights at every evaluation.

    The variance over P states is unbiased, with relative standard error sqrt(2 / (P - 1)) a pixel.

    Args:
        draw: gives P members of the posterior, other ones at every call.
        x: the state [B, C, H, W] at times[0], common to all.
        chunk: images in one pass of the backbone.
        noise: the sampler's own, the same for all states of an image.
        options: the sampler's.

    Yields steps of the plain sampler with the variance [B, C, H, W] and the states [P, B, C, H, W] after each.
    """
    given = options if noise is None else {**options, "noise": share_noise(noise)}
    plain = sampler(build(network), schedule, x, times, **given)
    states = sampler(RedrawnDenoiser(build, network, draw, chunk), schedule, x, times, **given)
    for step, each in zip(plain, states, strict=True):
        yield VarianceStep(step, each.x_next.var(0), each.x_next)
