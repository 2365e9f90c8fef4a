"""What the sampling of an ensemble is timed with: the published loop, ours, and the ways in which the network runs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ldm.diffusion.samplers import ddim, run
from ldm.diffusion.transition import Step
from ldm.ensembles.members import MemberNetwork, Members, SingleMember
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.speed import PRECISIONS, supported, with_speed
from ldm.settings import Precision, Speed
from ldm.uncertainty.quantities import Estimator, compute_quantities

VARIANT_WORDS = ("channels_last", "compile")


def read_precision(variant: str) -> Precision:
    """Return the precision among the words of a variant."""
    return next((word for word in get_args(Precision) if word in variant.split("+")), "float32")


def find_precision(variant: str, device: torch.device) -> Precision:
    """Return the precision in which a variant runs: float32 where the device lacks the one that was asked for."""
    precision = read_precision(variant)
    return precision if supported(precision, device) is not None else "float32"


def make_variant(model: LatentDiffusion, name: str, device: torch.device) -> LatentDiffusion:
    """Copy a model so that it runs as the words of a variant say.

    Raises:
        ValueError: for an unknown word.
    """
    words = name.split("+")
    unknown = set(words) - {*PRECISIONS, *VARIANT_WORDS}
    if unknown:
        raise ValueError(f"--variants: unknown {sorted(unknown)}; join {[*PRECISIONS, *VARIANT_WORDS]} by +")
    speed = Speed(1, read_precision(name), "channels_last" in words, "compile" in words)
    return with_speed(copy.deepcopy(model), speed, device)[0]


def measure_first_step(step: Step) -> Tensor:
    """Return the mutual information of a step, in nats; the distance is averaged over dimensions."""
    return compute_quantities(step.distribution, Estimator(scale="mean")).mi


@dataclass(frozen=True)
class MemberSides:
    """The published loop and ours, on the same noise; each gives final latents [M, n, c, h, w]."""

    members: Members
    labels: Tensor
    scale: float
    x: Tensor
    steps: int

    def loop(self, model: LatentDiffusion) -> Tensor:
        """Sample each member by itself."""
        times = model.sampling_times(self.steps)
        alone = [SingleMember(model.network, self.members, member) for member in range(len(self.members))]
        denoisers = [model.denoiser(self.labels, self.scale, one) for one in alone]
        return torch.stack([run(ddim(denoiser, model.schedule, self.x, times)) for denoiser in denoisers])

    def together(self, model: LatentDiffusion) -> tuple[Tensor, Step]:
        """Sample all members at once; the first step comes, too."""
        denoiser = model.denoiser(self.labels, self.scale, MemberNetwork(model.network, self.members))
        steps = list(ddim(denoiser, model.schedule, self.x, model.sampling_times(self.steps)))
        return steps[-1].x_next, steps[0]
