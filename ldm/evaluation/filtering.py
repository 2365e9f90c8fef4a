"""Is a set better without its uncertain images? What each score leaves, held against random removals of equal size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.stats import holm
from ldm.util import generator

RULES = ("share", "sigma")
# Metrics that are better when greater.
GREATER = ("is", "precision", "recall", "density", "coverage")
Positions = NDArray[np.int64]
Counts = tuple[int, ...]


def certain(values: NDArray, groups: Sequence[Positions], rule: str = "share", share: float = 0.8) -> Positions:
    """Positions that stay by their score, ascending, chosen within each group.

    Args:
        rule: share, the least `share` of each group; sigma, what does not exceed the group's mean + standard deviation
            (BayesDiff, as published).

    Raises:
        ValueError: for another rule, or if nothing stays.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got '{rule}'")
    kept = []
    for group in groups:
        own = values[group]
        if rule == "sigma":
            kept.append(group[own <= own.mean() + own.std()])
        else:
            kept.append(group[np.argsort(own, kind="stable")[: round(share * len(group))]])
    found = np.sort(np.concatenate(kept))
    if not len(found):
        raise ValueError(f"nothing stays of {len(values)} images by the rule {rule}: keep a larger share")
    return found


def count_kept(kept: Positions, groups: Sequence[Positions]) -> Counts:
    """How many of each group stayed."""
    return tuple(int(np.isin(group, kept, assume_unique=True).sum()) for group in groups)


def at_random(counts: Counts, groups: Sequence[Positions], seed: int, number: int) -> Positions:
    """As many positions of each group, drawn without replacement; ascending.

    One order of all images belongs to (seed, number), so removals of other sizes with the same number are nested.
    """
    total = sum(len(group) for group in groups)
    order = torch.randperm(total, generator=generator("removal", seed, number)).numpy()
    chosen = [group[np.argsort(order[group])[:count]] for group, count in zip(groups, counts, strict=True)]
    return np.sort(np.concatenate(chosen))


def standing(value: float, drawn: Sequence[float], metric: str) -> float | None:
    """Distance of a metric from its values after random removal in their standard deviations; above 0 is better.

    None where the random removals do not differ, as when nothing is removed, or where there is one only.
    """
    if len(drawn) < 2:
        return None
    spread = statistics.stdev(drawn)
    if not spread > 1e-9 * max(map(abs, drawn)):
        return None
    sign = 1 if metric.split("_")[0] in GREATER else -1
    return sign * (value - statistics.mean(drawn)) / spread


def permutation_p(value: float, drawn: Sequence[float], metric: str) -> float | None:
    """Exact p value that a removal is no better than a random one: (1 + random removals as good) / (1 + removals).

    None where the random removals do not differ. (Phipson & Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9, 39.)
    """
    if standing(value, drawn, metric) is None:
        return None
    sign = 1 if metric.split("_")[0] in GREATER else -1
    as_good = sum(sign * other >= sign * value for other in drawn)
    return (1 + as_good) / (1 + len(drawn))


def adjust_for_many(rows: Sequence[dict[str, str | int | float | None]]) -> None:
    """Replace the p values of a table by Holm's, which allow for all of its scores and metrics."""
    places = [(row, name) for row in rows for name in row if name.startswith("p_") and row[name] is not None]
    if not places:
        return
    for (row, name), value in zip(places, holm([row[name] for row, name in places]), strict=True):
        row[name] = float(value)


def comparison(
    kept: Mapping[str, Positions],
    counts: Mapping[str, Counts],
    values: Mapping[str, Mapping[str, float]],
    drawn: Mapping[Counts, Sequence[Mapping[str, float]]],
) -> list[dict[str, str | int | float | None]]:
    """The table: a row for each way of removal, then mean and standard deviation of the random removals of each size.

    Beside each value stand z (see `standing`) and p (see `permutation_p`; adjusted for all scores and metrics by Holm).

    Args:
        kept: {name: positions that stay}; counts: how many of each group; values: {name: {metric: value}}.
        drawn: {counts: values of the random removals that leave as many of each group}; where it lacks the counts of a
            name (nothing is removed) z is empty.
    """
    rows: list[dict[str, str | int | float | None]] = []
    for name, positions in kept.items():
        own = values[name]
        z = {
            f"z_{metric}": standing(value, [each[metric] for each in drawn.get(counts[name], ())], metric)
            for metric, value in own.items()
        }
        p = {
            f"p_{metric}": permutation_p(value, [each[metric] for each in drawn.get(counts[name], ())], metric)
            for metric, value in own.items()
        }
        rows.append({"removed by": name, "kept": len(positions), **own, **z, **p})
    adjust_for_many(rows)
    for size, sets in drawn.items():
        like = [name for name in kept if counts[name] == size]
        title = "random" if len(drawn) == 1 else f"random like {', '.join(like)}"
        for word, statistic in (("", statistics.mean), (", s.d.", statistics.stdev)):
            row = {metric: statistic(each[metric] for each in sets) for metric in sets[0]}
            empty = {f"{kind}_{metric}": None for kind in "zp" for metric in row}
            rows.append({"removed by": title + word, "kept": sum(size), **row, **empty})
    return rows
