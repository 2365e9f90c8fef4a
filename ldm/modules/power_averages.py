"""Averages of weights whose width is chosen after the training (Karras et al. 2024, section 3 and appendix C).

An average with exponent g weighs the weights at time t' <= t by (g + 1) t'^g / t^(g + 1). Its width is the standard
deviation of this profile over t; 0.05 and 0.1 are the published ones. Snapshots of a few such averages span, nearly,
the averages of all other widths: `combine_profiles` gives the combination that is nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# That of the plain mean of all weights: no profile t^g with g >= 0 is wider.
GREATEST_WIDTH = math.sqrt(1 / 12)


def width_of(exponent: float) -> float:
    """Return the width of the profile t^exponent: sqrt((g + 1) / ((g + 2)^2 (g + 3)))."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def exponent_of(width: float) -> float:
    """Return the exponent of the profile of a width: the largest root of g^3 + 7 g^2 + (16 - w^-2) g + 12 - w^-2.

    Raises:
        ValueError: for a width that is not above 0, or beyond that of the plain mean (0.289).
    """
    if not 0 < width <= GREATEST_WIDTH:
        raise ValueError(f"the width of an average lies above 0 and at most {GREATEST_WIDTH:.3f}, got {width}")
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay_at(time: float, exponent: float, step: float = 1.0) -> float:
    """Return the share (1 - step / time)^(g + 1) that an average keeps when the time becomes `time`."""
    return (1 - step / time) ** (exponent + 1)


@dataclass(frozen=True)
class Profile:
    """How an average weighs the past.

    Args:
        time: of its last weights.
        exponent: g.
    """

    time: float
    exponent: float

    def product(self, other: Profile) -> float:
        """Return the integral of the product of two profiles over time."""
        first, last = (self, other) if self.time <= other.time else (other, self)
        own = (first.exponent + 1) * (last.exponent + 1) / (first.exponent + last.exponent + 1)
        return own * (first.time / last.time) ** last.exponent / last.time


def combine_profiles(snapshots: Sequence[Profile], target: Profile) -> Tensor:
    """Return the weights [n] of snapshots, of sum 1, whose combination is nearest to a target in the mean square.

    Raises:
        ValueError: if there are no snapshots.
    """
    if not snapshots:
        raise ValueError("an average is combined of snapshots of others, and there are none")
    gram = torch.tensor([[one.product(other) for other in snapshots] for one in snapshots], dtype=torch.float64)
    aim = torch.tensor([one.product(target) for one in snapshots], dtype=torch.float64)
    found = torch.linalg.solve(gram, aim)
    return found / found.sum()


class PowerAverages:
    """Averages of named tensors under a few widths, stepped once for each optimiser step.

    Args:
        widths: of the averages.

    Attributes:
        time: number of steps so far.
        averages: the averages of each width, by name; empty before the first step.
    """

    def __init__(self, widths: Sequence[float]):
        self.exponents = {float(width): exponent_of(width) for width in widths}
        self.time = 0
        self.averages: dict[float, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor]) -> None:
        """Move the averages to the next step, after which the tensors are `values`."""
        self.time += 1
        for width, exponent in self.exponents.items():
            if self.time == 1:
                self.averages[width] = {name: value.detach().clone() for name, value in values.items()}
                continue
            own = self.averages[width]
            share = 1 - decay_at(self.time, exponent)
            torch._foreach_lerp_([own[name] for name in values], [value.detach() for value in values.values()], share)

    def state_dict(self) -> dict:
        """Return the averages and their time."""
        return {"time": self.time, "averages": {str(width): dict(own) for width, own in self.averages.items()}}

    def load_state_dict(self, state: Mapping) -> None:
        """Take what `state_dict` gave.

        Raises:
            ValueError: if it is of other widths.
        """
        found = {float(width): dict(own) for width, own in state["averages"].items()}
        if found and set(found) != set(self.exponents):
            raise ValueError(f"the averages have the widths {sorted(found)}, expected {sorted(self.exponents)}")
        self.time = int(state["time"])
        self.averages = found

    def to(self, device: torch.device | str) -> None:
        """Move the averages to a device."""
        self.averages = {
            width: {name: value.to(device) for name, value in own.items()} for width, own in self.averages.items()
        }
