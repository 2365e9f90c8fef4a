"""Metrics over trainings: what another training of the same recipe would give, beside what other samples would.

The interval of a metric of one model is over the draw of its samples. Models that are trained again differ by more: by
their start, the order of the data, the noises. Over R trainings of one recipe, with as many samples each,

    of the mean      mean -+ t_{R-1} sd / sqrt(R)
    of one more      mean -+ t_{R-1} sd sqrt(1 + 1 / R)

are Student's intervals of the metric's mean over trainings, and of the value of one further training. A metric that is
biased by the number of samples, FID for example, is so in all trainings alike: the bands are of the biased value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

from ldm.evaluation.metrics import OF_DRAWS, MetricRow
from ldm.stats import Interval, mean_interval


@dataclass(frozen=True)
class TrainingBand:
    """A metric over trainings.

    Attributes:
        metric: its name.
        values: of each training [R].
        mean: the mean over trainings, with Student's interval.
        another: the same mean, with the interval of one further training.
        sample_sd: standard deviation over draws of the samples, from the trainings' own intervals (root of the mean
            square); NaN where the metric has none, or the spread of parts in its place.
    """

    metric: str
    values: tuple[float, ...]
    mean: Interval
    another: Interval
    sample_sd: float

    @property
    def ratio(self) -> float:
        """Standard deviation over trainings over that of the draw of samples.

        Where trainings draw from noises of their own, their values hold both, so that a ratio near 1 says that they
        add nothing that could be seen. From the same noises, as `decu evaluate trainings` draws, they share a part of
        the samples' deviation: below 1 trainings differ by less than another draw of samples would.
        """
        return self.mean.sd / self.sample_sd if self.sample_sd else math.nan

    @property
    def trained_sd(self) -> float:
        """Standard deviation that trainings add to that of the samples: root of the difference of squares, 0 below."""
        own = 0.0 if math.isnan(self.sample_sd) else self.sample_sd
        return math.sqrt(max(0.0, self.mean.sd**2 - own**2))


def band_over_trainings(rows: Sequence[MetricRow], level: float = 0.95) -> TrainingBand:
    """Return the bands of one metric, from its row of each training.

    Raises:
        ValueError: for fewer than two trainings, several metrics, or other numbers of images.
    """
    if len(rows) < 2:
        raise ValueError(f"a band over trainings needs at least two of them, got {len(rows)}")
    for what in ("metric", "n", "n_reference"):
        found = {getattr(row, what) for row in rows}
        if len(found) > 1:
            raise ValueError(f"trainings compare only with the same {what}, got {', '.join(map(str, sorted(found)))}")
    values = [row.value for row in rows]
    mean = mean_interval(values, level)
    reach = float(t.ppf((1 + level) / 2, len(rows) - 1)) * mean.sd * math.sqrt(1 + 1 / len(rows))
    another = Interval(mean.estimate, mean.estimate - reach, mean.estimate + reach, len(rows), mean.sd)
    widths = np.array([math.nan if OF_DRAWS in row.interval else row.high - row.low for row in rows])
    z = 2 * float(norm.ppf(0.975))
    sample_sd = float(np.sqrt(np.mean((widths / z) ** 2)))
    return TrainingBand(rows[0].metric, tuple(values), mean, another, sample_sd)


def bands_over_trainings(each: Sequence[Sequence[MetricRow]], level: float = 0.95) -> list[TrainingBand]:
    """Return the bands of every metric that all trainings have, in the order of the first.

    Args:
        each: the rows of each training.
    """
    by_name = [{row.metric: row for row in rows} for rows in each]
    shared = [name for name in by_name[0] if all(name in rows for rows in by_name)] if by_name else []
    return [band_over_trainings([rows[name] for rows in by_name], level) for name in shared]
