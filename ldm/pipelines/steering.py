"""What steers the samples of an ensemble: how far its members are apart, or a control of the same strength."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Network
from ldm.diffusion.noise import keyed_normal
from ldm.diffusion.steering import StateMeasure, SteeredDenoiser, spread_times
from ldm.pipelines.model import ModelPipeline
from ldm.uncertainty.control_maps import edge_strength

# Images whose members' disagreement says where steps are spent.
PILOT_IMAGES = 16


def members_apart(members: Denoiser) -> StateMeasure:
    """Return the variance of the members' predicted x_0 at a state, mean over its elements."""

    def measure(x: Tensor, u: Tensor | float) -> Tensor:
        return members(x, u).x0.var(0).flatten(1).mean(1)

    return measure


def edges_of(denoiser: Denoiser) -> StateMeasure:
    """Return the strength of edges of the predicted x_0: a control that knows nothing of weights."""

    def measure(x: Tensor, u: Tensor | float) -> Tensor:
        return edge_strength(denoiser(x, u).x0).flatten(1).mean(1)

    return measure


def fixed_direction(images: Sequence[int], seed: int) -> StateMeasure:
    """Return a linear measure whose gradient is one random direction an image: a control that knows nothing."""

    def measure(x: Tensor, u: Tensor | float) -> Tensor:
        drawn = keyed_normal([("steering", seed, image) for image in images], x.shape[1:]).to(x)
        return (drawn * x).flatten(1).sum(1)

    return measure


def steer(
    pipeline: ModelPipeline, denoiser: Denoiser, members: Callable[[], Denoiser], images: Sequence[int]
) -> Denoiser:
    """Return a denoiser of the base members that is steered as the pipeline's values say.

    Args:
        denoiser: of the base, wrapped.
        members: makes the denoiser of all members under the same conditions.
        images: numbers of the batch's images, which name a random direction.
    """
    given = pipeline.sampling.steering
    if given.strength is None:
        return denoiser
    measures: dict[str, Callable[[], StateMeasure]] = {
        "disagreement": lambda: members_apart(members()),
        "edges": lambda: edges_of(denoiser),
        "random": lambda: fixed_direction(images, pipeline.sampling.seed),
    }
    measure = measures[given.by or "disagreement"]()
    return SteeredDenoiser(denoiser, pipeline.model.schedule, measure, given.strength)


@torch.no_grad()
def adapt_times(pipeline: ModelPipeline, base: Network, members: Network, power: float) -> Tensor:
    """Return the times of a pipeline's sampler, closer where its members are far apart; see `spread_times`.

    Their disagreement is the mean variance of what they predict x_0 to be, over the ways of PILOT_IMAGES images of
    classes in turn that the base draws.

    Args:
        pipeline: without steering of its own.
        base, members: the network that draws, and all members at once.
        power: of the disagreement.
    """
    images = range(PILOT_IMAGES)
    classes = pipeline.cycle_classes(images)
    labels = None if classes is None else pipeline.labels(classes)
    noise = pipeline.noise(images)
    drawn = pipeline.denoiser(labels, base)
    measure = members_apart(pipeline.denoiser(labels, members))
    density = [
        measure(step.x, step.u).mean()
        for step in pipeline.sampler_for(labels)(
            drawn, pipeline.model.schedule, pipeline.initial(noise), pipeline.times, noise=noise
        )
    ]
    found = torch.stack(density)
    return spread_times(pipeline.times, found.clamp(min=float(found.max()) * 1e-6), power)
