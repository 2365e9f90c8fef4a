"""What a benchmark of uncertainties is run with: plain values, read of a config's section `benchmark`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# The data sets of every seed: classes with few images, the control, in which every class has all of them, and one
# class left out.
FEW_IMAGES, EVERY_IMAGE, CLASS_LEFT_OUT = "few", "all", "out"
WORLD_NAMES = (FEW_IMAGES, EVERY_IMAGE, CLASS_LEFT_OUT)


@dataclass(frozen=True)
class BenchmarkSettings:
    """Sizes of a benchmark. `steps`, `batch` and `rate` are those of a training from scratch.

    Attributes:
        seeds: so many triples of data sets, each with its own classes of few images, its own class that is left out
            and its own trainings.
        few_classes: classes that have few images, others at every seed.
        few_images: that each of them has.
        retrainings: from scratch on bootstrapped images, in the data set with few: the oracle; at least 60 are asked
            for before a figure is quoted.
        control_retrainings: the same in the control.
        left_out_retrainings: the same without one class, another at every seed.
        refits: of the last layer alone, on bootstrapped images.
        noises: of every class; each gives one picture.
        sampler_steps: of DDIM; `other_steps`, two or more, are those whose ranks are compared with it.
        check_noises: noises of every class in the comparison of numbers of steps.
        reals: real images of every set in the detection of the left-out class and of other data.
        members: of the ensembles.
        draws: weights that are drawn of a posterior, and masks of dropout.
        particles: states of the recursions, an even number.
        head_steps: of the trainings of heads.
        width: of the networks.
        dropout: share of units that MC dropout drops.
        fit_draws: noises of every image in a posterior's fit.
        refit_draws: the same in refits, which are as wide as if every image had been visited so often.
    """

    seeds: int = 3
    few_classes: int = 3
    few_images: int = 10
    retrainings: int = 60
    control_retrainings: int = 10
    left_out_retrainings: int = 20
    refits: int = 240
    noises: int = 12
    sampler_steps: int = 20
    other_steps: tuple[int, ...] = (5, 10)
    check_noises: int = 4
    reals: int = 36
    members: int = 5
    draws: int = 32
    particles: int = 32
    steps: int = 1000
    batch: int = 64
    rate: float = 3e-3
    head_steps: int = 500
    width: int = 64
    dropout: float = 0.1
    fit_draws: int = 4
    refit_draws: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "other_steps", tuple(self.other_steps))
        least = {"seeds": 1, "retrainings": 4, "control_retrainings": 4, "refits": 2, "members": 2, "draws": 2}
        least |= {"noises": 2, "check_noises": 1, "sampler_steps": 2, "steps": 1, "head_steps": 1, "few_images": 1}
        least |= {"left_out_retrainings": 4, "reals": 2, "width": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"benchmark.{name} must be {value} or more, got {getattr(self, name)}")
        if not 1 <= self.few_classes <= 9:
            raise ValueError(f"benchmark.few_classes is 1 to 9, so that a class has all images; got {self.few_classes}")
        if self.particles < 2 or self.particles % 2 or not 0 < self.dropout < 1:
            raise ValueError(
                "benchmark.particles is an even number and benchmark.dropout lies between 0 and 1, got "
                f"{self.particles}, {self.dropout:g}"
            )
        if self.check_noises > self.noises:
            raise ValueError(f"benchmark.check_noises is at most noises, got {self.check_noises} of {self.noises}")
        numbers = [*self.other_steps, self.sampler_steps]
        if len(numbers) < 3 or min(numbers) < 2 or len(set(numbers)) < len(numbers):
            raise ValueError(
                "benchmark.other_steps are two or more numbers from 2 on, each another than sampler_steps; got "
                f"{list(self.other_steps)} beside {self.sampler_steps}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the values by name, for a record."""
        return {**asdict(self), "other_steps": list(self.other_steps)}


@dataclass(frozen=True)
class World:
    """Data that networks are trained on: which of the two data sets, and the seed."""

    data: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.data}_{self.seed}"

    @property
    def left_out_class(self) -> int:
        """The class that networks of `CLASS_LEFT_OUT` do not see at this seed, whatever this world sees."""
        return self.seed % 10

    def images_of(self, label: int, every: int, settings: BenchmarkSettings) -> int:
        """Return how many of `every` training images of a class the world has."""
        if self.data == CLASS_LEFT_OUT and label == self.left_out_class:
            return 0
        if self.data == FEW_IMAGES and label in self.few_classes(settings):
            return min(every, settings.few_images)
        return every

    def retrainings(self, settings: BenchmarkSettings) -> int:
        """Return how many networks are trained from scratch for the oracle."""
        counts = {
            FEW_IMAGES: settings.retrainings,
            EVERY_IMAGE: settings.control_retrainings,
            CLASS_LEFT_OUT: settings.left_out_retrainings,
        }
        return counts[self.data]

    def few_classes(self, settings: BenchmarkSettings) -> tuple[int, ...]:
        """The classes that have few images at this seed, in the control those that would have."""
        first = self.seed * settings.few_classes
        return tuple(sorted((first + number) % 10 for number in range(settings.few_classes)))


def read_settings(section: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> BenchmarkSettings:
    """Return the settings of a config's section `benchmark`; `changes` stand above it.

    Raises:
        ValueError: for a name that is no setting.
    """
    known = set(BenchmarkSettings.__dataclass_fields__)
    given = {**section, **(changes or {})}
    wrong = sorted(set(given) - known)
    if wrong:
        raise ValueError(f"benchmark has no setting '{wrong[0]}'; it has {', '.join(sorted(known))}")
    return BenchmarkSettings(**given)
