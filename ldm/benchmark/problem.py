"""The problem: models, conditions, noises and data, the same for every method that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.benchmark.images import KNOWN_CLASSES, BenchmarkImages
from ldm.benchmark.settings import BenchmarkSettings, World
from ldm.benchmark.trained import REGRESSED, TrainedWorld
from ldm.diffusion.affine import CosineSchedule
from ldm.diffusion.denoiser import Denoiser, Network, NetworkDenoiser, Target
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import Step
from ldm.diffusion.transition import ddim
from ldm.ensembles.members import Members
from ldm.experiments.small_networks import SmallNetwork, sampling_times
from ldm.uncertainty.propagation import PredictiveDenoiser, sampled

# Images in one pass of members.
_CHUNK = 20_000
# The time that real images are noised again to, where alpha = sigma.
RENOISED_TIME = 0.5


@dataclass(frozen=True)
class Problem:
    """What a method is given: networks of one world, and the conditions and noises of the pictures.

    Every method sees the same pictures: those of `labels` [B] by the plain sampler from the noises `x` [B, C, H, W].

    Attributes:
        trained: the networks.
        steps: of the sampler.
        noises: of every class.
    """

    trained: TrainedWorld
    steps: int
    noises: int

    @classmethod
    def make(cls, settings: BenchmarkSettings, world: World, folder: Path, images: BenchmarkImages) -> Problem:
        """Return the problem of a world, whose networks lie in {folder}/{world's name}."""
        return cls(TrainedWorld.make(settings, world, folder, images), settings.sampler_steps, settings.noises)

    def with_size(self, steps: int | None = None, noises: int | None = None) -> Problem:
        """Return the same problem with another number of steps, or of noises of every class."""
        return replace(self, steps=steps or self.steps, noises=noises or self.noises)

    @property
    def settings(self) -> BenchmarkSettings:
        """Sizes."""
        return self.trained.settings

    @property
    def world(self) -> World:
        """Which data."""
        return self.trained.world

    @property
    def base(self) -> SmallNetwork:
        """The network that is asked what it does not know."""
        return self.trained.base

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """Training images [N, D] and classes [N]."""
        return self.trained.data

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture."""
        return self.trained.source.shape

    @property
    def labels(self) -> Tensor:
        """The class of every picture [B]."""
        return torch.arange(10).repeat_interleave(self.noises)

    @property
    def is_few(self) -> Tensor:
        """Whether the class of a picture is one of those that have few images at this seed [B]."""
        return torch.isin(self.labels, torch.tensor(self.world.few_classes(self.settings)))

    @property
    def is_out(self) -> Tensor:
        """Whether the class of a picture is the one that is left out at this seed [B]."""
        return self.labels == self.world.left_out_class

    @property
    def checked(self) -> Tensor:
        """Positions of the pictures whose scores are compared over numbers of steps: of `check_noises` of a class."""
        number = torch.arange(len(self.labels)) % self.noises
        return (number < self.settings.check_noises).nonzero().flatten()

    @property
    def noise(self) -> ImageNoise:
        """The pictures' noise: that of one class and number is the same in both worlds, and whatever their count."""
        numbers = [label * 10_000 + number for label in range(10) for number in range(self.noises)]
        return ImageNoise(self.world.seed, tuple(numbers))

    @property
    def schedule(self) -> CosineSchedule:
        """alpha = cos(pi u / 2), sigma = sin(pi u / 2)."""
        return CosineSchedule()

    @property
    def times(self) -> Tensor:
        """Times of the sampler [steps + 1]: evenly from the latest trained time to the earliest, then clean."""
        return sampling_times(self.steps)

    @property
    def x(self) -> Tensor:
        """States at the first time [B, C, H, W]."""
        return self.noise.initial((len(self.labels), *self.shape))

    def build(self, labels: Tensor | None = None) -> Callable[[Network], Denoiser]:
        """Return what makes a denoiser of a network, for the pictures' classes or others [B]."""
        cond = self.labels if labels is None else labels
        return lambda network: NetworkDenoiser(network, self.schedule, Target(REGRESSED), cond)

    def walk(self, denoiser: Denoiser) -> Iterator[Step]:
        """Yield the plain sampler's steps by any denoiser."""
        return ddim(denoiser, self.schedule, self.x, self.times)

    @property
    def pictures(self) -> Tensor:
        """The pictures of the base network [B, C, H, W]."""
        with torch.no_grad():
            *_, last = self.walk(self.build()(self.base))
        return last.x_next

    def sample(self, members: Members, network: nn.Module | None = None) -> Tensor:
        """Return the pictures of members [M, B, C, H, W], each with its weights held, from the same noises."""
        where = (self.schedule, self.x, self.times)
        chunk = max(1, _CHUNK // len(self.labels)) * len(self.labels)
        return sampled(ddim, self.build(), network or self.base, members, *where, chunk=chunk).members

    def predictive(self, curvature: str = "full") -> PredictiveDenoiser:
        """Return the denoiser of the pictures that knows the variance of its output."""
        return PredictiveDenoiser(self.trained.laplace(curvature), self.schedule, Target(REGRESSED), self.labels)

    def noised_pictures(self, shares: Sequence[float]) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Yield (u, state [B, C, H, W], noise) of the base's pictures, noised again.

        Args:
            shares: of noise, sigma / (alpha + sigma).
        """
        pictures = self.pictures
        for number, share in enumerate(shares):
            u = float(self.schedule.time_at(share / (1 - share)))
            eps = self.noise(number, pictures.shape)
            yield u, self.schedule.noised(pictures, eps, u), eps

    def of_reals(self) -> RealProblem:
        """Return the same question about real images, noised again, instead of the base's pictures."""
        sets = self.trained.source.real_sets(self.settings, self.world.seed)
        images = torch.cat([*sets.values()])
        names = tuple(name for name, own in sets.items() for _ in own)
        train, labels = self.data
        conditions = labels[torch.cdist(images, train).argmin(1)]
        steps = max(2, self.steps // 2)
        return RealProblem(self.trained, steps, self.noises, self.trained.source.square(images), conditions, names)


@dataclass(frozen=True)
class RealProblem(Problem):
    """Real images in place of the base's pictures, which methods cannot tell from a problem of pictures.

    A trajectory begins at the image, noised to `RENOISED_TIME`; what looks at pictures looks at the images themselves.
    The class that the network is asked for is that of the nearest training image.

    Attributes:
        images: [R, C, H, W].
        conditions: [R].
        sets: of every image, the name of its set.
    """

    images: Tensor
    conditions: Tensor
    sets: tuple[str, ...]

    @property
    def labels(self) -> Tensor:
        """The class that is asked for [R]."""
        return self.conditions

    @property
    def is_known(self) -> Tensor:
        """Whether an image is of a class that was trained [R]."""
        return torch.tensor([name == KNOWN_CLASSES for name in self.sets])

    @property
    def noise(self) -> ImageNoise:
        """One stream an image, apart from those of pictures."""
        return ImageNoise(self.world.seed, tuple(1_000_000 + number for number in range(len(self.sets))))

    @property
    def times(self) -> Tensor:
        """Times [steps + 1] from `RENOISED_TIME` on."""
        return sampling_times(self.steps, RENOISED_TIME)

    @property
    def x(self) -> Tensor:
        """The images, noised."""
        eps = self.noise.initial(tuple(self.images.shape))
        return self.schedule.noised(self.images, eps, RENOISED_TIME)

    @property
    def pictures(self) -> Tensor:
        """The images themselves."""
        return self.images
