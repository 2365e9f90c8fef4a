"""How many noises rank classes: means of few of them, drawn many times from values of all, against a reference."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.stats import mean_interval, rank_correlation
from ldm.util import generator

Values = NDArray[np.float64]


def draw_equal(values: Values, n: int, source: torch.Generator) -> Values:
    """Return means [classes] of n noises, drawn without return, the same noises for every class."""
    return values[:, torch.randperm(values.shape[1], generator=source)[:n].numpy()].mean(1)


def draw_adaptive(values: Values, n: int, source: torch.Generator) -> Values:
    """Return means [classes] of n noises a class on average, of which classes near a neighbour in rank get more.

    Every class begins with half of them (at least two). Each further one goes to the two neighbours in rank whose means
    are the fewest standard errors apart, to the one of the two whose mean is less certain.
    """
    classes, most = values.shape
    order = torch.randperm(most, generator=source).numpy()
    used = np.full(classes, max(2, n // 2))
    for _ in range(n * classes - int(used.sum())):
        means = np.array([values[k, order[:u]].mean() for k, u in enumerate(used)])
        errors = np.array([values[k, order[:u]].var(ddof=1) / u for k, u in enumerate(used)])
        errors[used >= most] = 0
        ranked = means.argsort()
        gaps = np.diff(means[ranked]) / np.sqrt(errors[ranked[1:]] + errors[ranked[:-1]] + 1e-300)
        pair = ranked[gaps.argmin() : gaps.argmin() + 2]
        used[pair[errors[pair].argmax()]] += 1
    return np.array([values[k, order[:u]].mean() for k, u in enumerate(used.clip(max=most))])


DRAWS = {"equal": draw_equal, "adaptive": draw_adaptive}


def compare_draws(
    values: Values, reference: Values, n: int, how: str, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Return the mean rank correlation with the reference of n noises a class, and its 2.5 and 97.5 percentiles.

    Args:
        values: [classes, noises]; reference: the same of another way, whose means rank the classes.
        how: one of `DRAWS`.
    """
    source = generator("answer", seed, how, n)
    means = np.stack([DRAWS[how](values, n, source) for _ in range(resamples)])
    found = rank_correlation(means, np.broadcast_to(reference.mean(1), means.shape))
    return float(found.mean()), float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


def count_noises_of_interval(values: Values, share: float) -> float:
    """Return noises a class, the mean over classes, until Student's 95 % interval is `share` of the mean wide."""
    return float(np.mean([_noises_of_interval(row, share) for row in values]))


def _noises_of_interval(row: Values, share: float) -> float:
    found = mean_interval(row)
    return max(2.0, found.n * (found.width / (share * found.estimate)) ** 2)
