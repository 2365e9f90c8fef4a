"""What the metrics can be trusted for: their bias against the number of images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ldm.evaluation.extraction import FeatureSet
from ldm.evaluation.fid import extrapolated
from ldm.evaluation.metrics import MetricRow, Options, Reference, measure
from ldm.util import generator


@dataclass(frozen=True)
class SizedRow:
    """A metric's value on the `repeat`-th random draw of `size` images."""

    metric: str
    size: int
    repeat: int
    value: float


def subset(count: int, size: int, seed: int, repeat: int) -> torch.Tensor:
    """Positions [size] of a random draw without replacement, ascending; a function of (seed, size, repeat)."""
    source = generator("sample sizes", seed, size, repeat)
    return torch.randperm(count, generator=source)[:size].sort().values


def sample_sizes(
    metrics: Sequence[str],
    reference: FeatureSet | Reference,
    samples: FeatureSet,
    sizes: Iterable[int],
    repeats: int = 5,
    options: Options | None = None,
) -> list[SizedRow]:
    """Metrics of random draws of each size against the whole reference; the size of the whole set is drawn once.

    Raises:
        ValueError: if a size is below 2 or above the number of samples.
    """
    options = options or Options()
    plain = replace(options, resamples=0, fid_resamples=0, kid_subsets=0, splits=1)
    reference = reference if isinstance(reference, Reference) else Reference(reference)
    sizes = sorted(set(sizes))
    if not sizes or sizes[0] < 2 or sizes[-1] > len(samples) or repeats < 1:
        raise ValueError(f"sizes must lie in 2..{len(samples)} and repeats be positive, got {sizes} and {repeats}")
    found = []
    for size in sizes:
        for repeat in range(repeats if size < len(samples) else 1):
            chosen = subset(len(samples), size, options.seed, repeat)
            rows: list[MetricRow] = measure(metrics, reference, samples.rows(chosen.numpy()), plain)
            found += [SizedRow(row.metric, size, repeat, row.value) for row in rows]
    return found


@dataclass(frozen=True)
class SizeSummary:
    """A metric at one size: mean over the repeats, its standard error, and the mean as % of the largest size's."""

    metric: str
    size: int
    repeats: int
    mean: float
    error: float
    percent: float


def summarise_sizes(rows: Sequence[SizedRow]) -> list[SizeSummary]:
    """One entry for each metric and size, in their order; percentages are NaN where the largest size gives 0."""
    summaries = []
    for metric in dict.fromkeys(row.metric for row in rows):
        values: dict[int, list[float]] = {}
        for row in rows:
            if row.metric == metric:
                values.setdefault(row.size, []).append(row.value)
        tensors = {size: torch.tensor(found, dtype=torch.float64) for size, found in sorted(values.items())}
        last = float(tensors[max(tensors)].mean())
        for size, found in tensors.items():
            mean, count = float(found.mean()), len(found)
            error = float(found.std() / count**0.5) if count > 1 else float("nan")
            summaries.append(SizeSummary(metric, size, count, mean, error, 100 * mean / last if last else float("nan")))
    return summaries


def without_bias(rows: Sequence[SizedRow], metric: str = "fid") -> float:
    """FID extrapolated to infinitely many images from its values at two or more sizes; see `fid.extrapolated`."""
    chosen = [row for row in rows if row.metric == metric]
    sizes = torch.tensor([row.size for row in chosen])
    return extrapolated(sizes, torch.tensor([row.value for row in chosen]))[0]
