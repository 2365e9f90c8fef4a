"""Samples of the networks of `recipes` under every way of guidance, judged by a classifier of all digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.func import stack_module_state

from ldm.diffusion.affine import CosineSchedule
from ldm.diffusion.denoiser import Denoiser, Network, NetworkDenoiser, Target
from ldm.diffusion.guidance import GuidanceRule, RuledGuidance, SharedDenoiser
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.transition import ddim
from ldm.ensembles.members import MemberNetwork, Members
from ldm.experiments.judged_digits import Judge, to_square
from ldm.experiments.recipes import NULL_LABEL
from ldm.experiments.small_networks import SmallNetwork, read_digits, sampling_times
from ldm.uncertainty.quantities import Estimator, compute_quantities
from ldm.util import generator

Measured = dict[str, float]


@dataclass(frozen=True)
class GuidanceWay:
    """A way of guidance.

    Attributes:
        name: of the way.
        rule: its scale, and where it acts.
        weaker: whether it leads away from a weaker network, in place of the null class.
    """

    name: str
    rule: GuidanceRule
    weaker: bool = False


def list_ways() -> list[GuidanceWay]:
    """Return the ways that are compared."""
    scales = (1.5, 2.0, 3.0)
    ways = [GuidanceWay("plain", GuidanceRule(scale)) for scale in scales]
    ways += [GuidanceWay("interval 0.2 to 5", GuidanceRule(scale, 0.2, 5.0)) for scale in scales]
    ways += [GuidanceWay("autoguidance", GuidanceRule(scale), weaker=True) for scale in scales]
    return [*ways, GuidanceWay("rescale 0.7", GuidanceRule(3.0, rescale=0.7))]


@dataclass(frozen=True)
class SampleStudy:
    """Draws samples of all classes in turn, and measures them.

    Attributes:
        judge: see `Judge`.
        n: samples of a measurement.
        steps: of DDIM.
        real: the training images [N, D] and their classes [N].
    """

    judge: Judge
    n: int
    steps: int
    real: tuple[Tensor, Tensor] = field(default_factory=lambda: read_digits("train"))

    @property
    def labels(self) -> Tensor:
        """The class of each sample [n]."""
        return torch.arange(self.n) % NULL_LABEL

    @property
    def times(self) -> Tensor:
        """The times of sampling [steps + 1]."""
        return sampling_times(self.steps)

    def start(self, seed: int) -> Tensor:
        """Return the first noises [n, 1, S, S]."""
        shape = to_square(self.real[0][:1]).shape[1:]
        return ImageNoise(seed, tuple(range(self.n))).initial((self.n, *shape))

    def denoiser(
        self, network: Network, way: GuidanceWay | None = None, weaker: SmallNetwork | None = None
    ) -> Denoiser:
        """Return the denoiser of a network, or of members of one, under a way of guidance."""
        schedule, target = CosineSchedule(), Target("v")
        own = NetworkDenoiser(network, schedule, target, self.labels)
        if way is None:
            return own
        guide = None
        if way.weaker:
            assert weaker is not None, "autoguidance leads away from a network"
            guide = SharedDenoiser(weaker, schedule, target, self.labels)
        return RuledGuidance(own, guide, torch.full_like(self.labels, NULL_LABEL), way.rule)

    @torch.no_grad()
    def measure(
        self, seed: int, network: SmallNetwork, way: GuidanceWay | None = None, weaker: SmallNetwork | None = None
    ) -> Measured:
        """Measure the samples of a network: precision, recall, frechet and recognised, see `Classed`."""
        *_, last = ddim(self.denoiser(network, way, weaker), CosineSchedule(), self.start(seed), self.times)
        return asdict(self.judge.measure(last.x_next, self.labels))

    def measure_real(self, seed: int) -> Measured:
        """Measure as many real digits of the training split: what a perfect model scores."""
        images, labels = self.real
        drawn = torch.randperm(len(images), generator=generator("real digits", seed))[: self.n]
        return asdict(self.judge.measure(to_square(images[drawn]), labels[drawn]))

    @torch.no_grad()
    def information(
        self, networks: Sequence[SmallNetwork], way: GuidanceWay | None = None, weaker: SmallNetwork | None = None
    ) -> Tensor:
        """Return the mutual information between the members and a state half-way, mean of each class [10], in nats.

        The first network samples up to half of the steps, and each member takes the next one (DECU).
        """
        stacked = {name: value.detach() for name, value in stack_module_state(list(networks))[0].items()}
        members = MemberNetwork(networks[0], Members(stacked), 20_000)
        schedule, times, half = CosineSchedule(), self.times, self.steps // 2
        before = [*ddim(self.denoiser(networks[0], way, weaker), schedule, self.start(0), times[: half + 1])]
        step = next(iter(ddim(self.denoiser(members, way, weaker), schedule, before[-1].x_next, times[half:])))
        found = compute_quantities(step.distribution, Estimator()).mi
        return torch.stack([found[self.labels == label].mean() for label in range(NULL_LABEL)])
