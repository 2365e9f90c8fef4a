"""Sets of images without their uncertain ones, by each score, beside random removals of the same sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm.evaluation.filtering import Counts, Positions, at_random, certain, comparison, count_kept
from ldm.records import Row


@dataclass(frozen=True)
class Removals:
    """What stays of a set by each score, and what stays by chance.

    Attributes:
        kept: positions that stay by the name of each score, and under `none` all of them.
        counts: how many stay of each group, by the same names.
        chance: random removals by the counts that they leave. Scores that leave equally many share them.
    """

    kept: Mapping[str, Positions]
    counts: Mapping[str, Counts]
    chance: Mapping[Counts, Sequence[Positions]]

    @property
    def sets(self) -> dict[str, Positions]:
        """Every set that is measured, by its name: the scores', then random_0, random_1 and so on.

        Random removals of several sizes are random_0_0, random_0_1 and so on.
        """
        found = dict(self.kept)
        for size, drawn in self.chance.items():
            found |= {self._name(size, number): positions for number, positions in enumerate(drawn)}
        return found

    def table(self, values: Mapping[str, Mapping[str, float]]) -> list[Row]:
        """Return a row for each way of removal; `values` holds {metric: value} of every one of `sets`."""
        chance = {
            size: [values[self._name(size, number)] for number in range(len(drawn))]
            for size, drawn in self.chance.items()
        }
        own = {name: values[name] for name in self.kept}
        return comparison(self.kept, self.counts, own, chance)

    def _name(self, size: Counts, number: int) -> str:
        sizes = list(self.chance)
        stem = "random" if len(sizes) == 1 else f"random_{sizes.index(size)}"
        return f"{stem}_{number}"


def make_removals(
    scores: Mapping[str, NDArray],
    groups: Sequence[Positions],
    *,
    rule: str = "share",
    share: float = 0.8,
    repeats: int = 5,
    seed: int = 0,
) -> Removals:
    """Remove the uncertain images by each score, and as many at random.

    Args:
        scores: values [N] of each score.
        groups: positions among which the uncertain images are sought, together all N.
        rule, share: see `ldm.evaluation.filtering.certain`.
        repeats: random removals of each size; seed: of these.
    """
    total = sum(len(group) for group in groups)
    kept = {"none": np.arange(total)}
    kept |= {name: certain(values, groups, rule, share) for name, values in scores.items()}
    counts = {name: count_kept(positions, groups) for name, positions in kept.items()}
    sizes = [size for size in dict.fromkeys(counts.values()) if sum(size) < total]
    chance = {size: [at_random(size, groups, seed, number) for number in range(repeats)] for size in sizes}
    return Removals(kept, counts, chance)


def class_groups(classes: Sequence[int]) -> list[Positions]:
    """Return the positions [N_k] of each class's images, class by class, of classes [N]."""
    values = np.asarray(classes)
    return [np.flatnonzero(values == label) for label in np.unique(values)]
