"""What nats of a deterministic step are: information that gets through Gaussian noise of a stated deviation.

Members whose predictions differ and have no variance give away which of them made a prediction: the mutual information
of the two is then ln M, whatever the size of the differences. Seen through white noise of deviation s it is finite, and
PaiDE bounds it from above with KL and from below with Bhattacharyya (Kolchinsky & Tracey, arXiv 1706.02419), where

    KL = |mu_i - mu_j|^2 / (2 s^2)          Bhattacharyya = |mu_i - mu_j|^2 / (8 s^2)

So PaiDE of squared distances times f, which is what squared W2 gives, is the upper bound for s^2 = 1 / (2 f) and the
lower bound for s^2 = 1 / (8 f). How large that noise is beside the data depends on the model: `NoiseLevel` states it in
deviations of the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NoiseLevel:
    """White noise in a unit that pictures of any size, and pixels and latents, have in common.

    Two predictions that differ by `level` standard deviations of the data, root mean square over their elements, lie
    one deviation of the noise apart. In each of d elements the deviation is level * data * sqrt(d): a picture of four
    times the pixels is not seen better for having more of them.

    Attributes:
        level: in standard deviations of the data.
        data: standard deviation of an element of the data around its mean, in their units.
        size: d, the elements of what is compared.

    Raises:
        ValueError: if one of them is not above 0 and finite.
    """

    level: float
    data: float
    size: int

    def __post_init__(self) -> None:
        values = (self.level, self.data, self.size)
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise ValueError(
                "the noise needs a level and a standard deviation of the data above 0; got level "
                f"{self.level:g}, deviation {self.data:g}, {self.size} elements"
            )

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise in each element, in the units of what is compared."""
        return self.level * self.data * math.sqrt(self.size)

    @property
    def factor(self) -> float:
        """What a squared distance is multiplied by to be the KL divergence: 1 / (2 deviation^2)."""
        return 1 / (2 * self.deviation**2)

    def describe(self) -> dict[str, Any]:
        """Return what the numbers depend on, for records."""
        return {"noise": self.level, "data_sd": self.data}


def implied_deviations(factor: float) -> tuple[float, float]:
    """Return the noise deviations that PaiDE of `factor` times squared distances bounds from above, and from below.

    Raises:
        ValueError: if the factor is not above 0.
    """
    if not factor > 0:
        raise ValueError(f"squared distances are multiplied by a number above 0, got {factor:g}")
    return math.sqrt(1 / (2 * factor)), math.sqrt(1 / (8 * factor))
