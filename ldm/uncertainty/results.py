"""What was measured of the classes of an ensemble, as values: one class, all classes, and maps of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ldm.stats import Interval, look_level, skewed_mean_interval

# Latents lie on [M, n, c, h, w]: their noises are on this axis, those of everything else on the last.
_LATENTS_AXIS = 1
# What the members' spread is divided by: 0.1.0, whose files do not say, divided by M.
DIVISOR = "M - 1"
# What is kept in files of its own, not in a class's JSON.
_LARGE = ("latents", "distances")


@dataclass(frozen=True)
class ClassInformation:
    """What was measured of one class over its n noises; every tensor is on the CPU.

    Quantities are means over the K base members, one value a noise. What was not asked for is None.

    Attributes:
        label: the class.
        mi: [n], mutual information in nats.
        mi_by_base: [K, n], what `mi` averages.
        mean_pairwise_distance: [n], in the units of the distance.
        epistemic_variance, aleatoric_variance: [n], of the members' means, with M - 1, and mean of their variances,
            latent units squared.
        mi_certain, mi_uncertain, distance_certain, distance_uncertain, distance_between: [n], of masked classes, among
            the members that saw the class, among those that did not, and between the two.
        curve: [S, n], mutual information of every step from the branch on.
        ssim, lpips: [n], similarity of the members' pictures.
        latents: [M, n, c, h, w], samples from the first base member; distances: [M, M, n] of the branched step.
        looks: how often a rule looked whether the noises were enough; 0 where their number was fixed.
    """

    label: int
    mi: Tensor
    mi_by_base: Tensor
    mean_pairwise_distance: Tensor
    epistemic_variance: Tensor
    aleatoric_variance: Tensor
    mi_certain: Tensor | None = None
    mi_uncertain: Tensor | None = None
    distance_certain: Tensor | None = None
    distance_uncertain: Tensor | None = None
    distance_between: Tensor | None = None
    curve: Tensor | None = None
    ssim: Tensor | None = None
    lpips: Tensor | None = None
    latents: Tensor | None = None
    distances: Tensor | None = None
    looks: int = 0

    @property
    def interval(self) -> Interval:
        """Mean of `mi` with its 95 % interval over the noises, nats, at least 0: see `skewed_mean_interval`.

        Where noises were added until the interval was narrow enough, it is that of the last look, see `look_level`.
        """
        return skewed_mean_interval(self.mi.tolist(), self._level, 0.0)

    @property
    def width(self) -> float:
        """Width in nats of the interval before it is cut at 0: by the cut alone no rule stops earlier."""
        return skewed_mean_interval(self.mi.tolist(), self._level).width

    @property
    def _level(self) -> float:
        return look_level(self.looks) if self.looks else 0.95

    def tensors(self) -> dict[str, Tensor]:
        """Return what was measured, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def join(self, more: ClassInformation) -> ClassInformation:
        """Return the same class over the noises of both.

        Raises:
            ValueError: if the two are of different classes.
        """
        if more.label != self.label:
            raise ValueError(f"noises of one class are joined, got the classes {self.label} and {more.label}")
        axes = {name: _LATENTS_AXIS if name == "latents" else -1 for name in self.tensors()}
        joined: dict[str, Any] = {
            name: torch.cat([getattr(self, name), getattr(more, name)], axis) for name, axis in axes.items()
        }
        return replace(self, **joined)

    def without_samples(self) -> ClassInformation:
        """Return the numbers alone, without latents and distances."""
        return replace(self, latents=None, distances=None)

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as lists, without latents and distances."""
        small = {name: value.tolist() for name, value in self.tensors().items() if name not in _LARGE}
        return {**small, "looks": self.looks, "divisor": DIVISOR}

    @classmethod
    def from_json(cls, label: int, content: Mapping[str, Any], members: int) -> ClassInformation:
        """Read what `to_json` gave; the epistemic variance of a file of 0.1.0 is multiplied by M / (M - 1)."""
        words = ("looks", "divisor")
        values = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in content.items() if name not in words
        }
        if content.get("divisor") != DIVISOR and members > 1:
            values["epistemic_variance"] *= members / (members - 1)
        return cls(label, **values, looks=int(content.get("looks", 0)))


@dataclass(frozen=True)
class Information:
    """Mutual information of several classes, and all else that was measured of each.

    Attributes:
        results: one value a class, in the order asked for.
        names: the names of these classes.
    """

    results: tuple[ClassInformation, ...]
    names: tuple[str, ...]

    @property
    def mi(self) -> Tensor:
        """Mutual information [classes, n] in nats, float64.

        Raises:
            ValueError: if the classes were measured with different numbers of noises.
        """
        counts = sorted({len(result.mi) for result in self.results})
        if len(counts) > 1:
            raise ValueError(f"the classes have different numbers of noises, {counts}: read `results` one by one")
        return torch.stack([result.mi for result in self.results])

    @property
    def mean(self) -> Tensor:
        """Mean over the noises [classes] in nats, float64."""
        return torch.tensor([result.interval.estimate for result in self.results], dtype=torch.float64)

    @property
    def interval(self) -> tuple[Interval, ...]:
        """The 95 % interval of each class's mean, nats: see `ClassInformation.interval`."""
        return tuple(result.interval for result in self.results)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a class: class, name, n, and the mean of `mi` with its interval in nats."""
        rows = []
        for name, result in zip(self.names, self.results, strict=True):
            interval = result.interval
            rows.append(
                {
                    "class": result.label,
                    "name": name,
                    "n": interval.n,
                    "mi_mean": interval.estimate,
                    "mi_low": interval.low,
                    "mi_high": interval.high,
                }
            )
        return rows


@dataclass(frozen=True)
class PixelInformation:
    """Maps of mutual information of several classes over n noises, means over the base members, on the CPU.

    Attributes:
        classes: [L] labels.
        images: [L, n, C, H, W] of the first base member, in [-1, 1].
        maps: {space: [L, n, h, w]} in nats; the spaces are `image` (decoded images) and `latent` (final latents).
    """

    classes: tuple[int, ...]
    images: Tensor
    maps: Mapping[str, Tensor]

    @classmethod
    def stack(cls, classes: Sequence[int], parts: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> PixelInformation:
        """Join images [n, C, H, W] and maps [n, h, w] of each class."""
        images = torch.stack([shown for shown, _ in parts])
        spaces = list(parts[0][1])
        maps = {space: torch.stack([own[space] for _, own in parts]) for space in spaces}
        return cls(tuple(classes), images, maps)
