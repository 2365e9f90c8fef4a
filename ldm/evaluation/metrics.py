"""Every metric by name, over sets of features: one row a number, with its interval and what it was computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from ldm.evaluation.cmmd import (
    CMMD_SCALE,
    CMMD_SIGMA,
    GramSums,
    Kernel,
    cmmd,
    cubic_kernel,
    gaussian_kernel,
    gram_within,
    kid_subsets,
    mmd2,
)
from ldm.evaluation.extraction import FeatureSet
from ldm.evaluation.fid import fid
from ldm.evaluation.inception_score import inception_score, measure_inception_scores, probabilities
from ldm.evaluation.precision_recall import (
    DENSITY_K,
    PRECISION_K,
    density_coverage,
    precision_recall,
    squared_radii,
)
from ldm.evaluation.statistics import FeatureStatistics
from ldm.stats import Interval

# What `interval` says where low and high are no 95 % interval, but published spreads over parts or draws.
OF_DRAWS = "+- their s.d."


@dataclass(frozen=True)
class MetricRow:
    """A number: its 95 % interval (NaN without one), what the interval covers, and the numbers of images behind it."""

    metric: str
    value: float
    low: float
    high: float
    interval: str
    n: int
    n_reference: int | None


@dataclass(frozen=True)
class Options:
    """What the metrics depend on besides the features; published values are the defaults."""

    resamples: int = 200
    fid_resamples: int = 20
    seed: int = 0
    sigma: float = CMMD_SIGMA
    scale: float = CMMD_SCALE
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    splits: int = 10
    precision_k: int = PRECISION_K
    density_k: int = DENSITY_K
    device: str | torch.device = "cpu"


class Reference:
    """The set to compare with; what all samples need of it is computed once."""

    def __init__(self, features: FeatureSet):
        self.features = features
        self._statistics: dict[str, FeatureStatistics] = {}
        self._sums: dict[str, GramSums] = {}
        self._radii: dict[int, torch.Tensor] = {}

    def statistics(self, kind: str, device: str | torch.device) -> FeatureStatistics:
        """Mean and covariance of "pooled" or "spatial"."""
        if kind not in self._statistics:
            self._statistics[kind] = self.features.statistics(kind, device)
        return self._statistics[kind]

    def sums(self, name: str, kernel: Kernel, device: str | torch.device) -> GramSums:
        """Kernel sums within the reference; `name` identifies the kernel."""
        if name not in self._sums:
            self._sums[name] = gram_within(kernel, self.features.pooled, device=device)
        return self._sums[name]

    def radii(self, k: int, device: str | torch.device) -> torch.Tensor:
        """Squared distances to the k-th nearest neighbours within the reference."""
        if k not in self._radii:
            self._radii[k] = squared_radii(self.features.pooled, k, device)
        return self._radii[k]


def warn_of_few_images(names: Iterable[str], reference: FeatureSet, samples: FeatureSet) -> list[str]:
    """Return a sentence for each side that has too few images for FID or sFID: fewer than its features have numbers.

    The covariance of fewer images has no full rank, and the distance is then mostly one of numbers of images.
    """
    kinds = {"fid": "pooled", "sfid": "spatial"}
    found = []
    for name, kind in ((name, kinds[name]) for name in names if name in kinds):
        for side, own in (("samples", samples), ("reference", reference)):
            features = getattr(own, kind)
            if features is not None and len(features) < features.shape[1]:
                found.append(
                    f"{name} of {len(features)} images of the {side} in {features.shape[1]} features: fewer images "
                    "than features make it far too large; compare it only with one of as many images, or take kid or "
                    "cmmd"
                )
    return found


Named = dict[str, tuple[Interval, str]]
HALVES = "draw of the samples, by random halves, 95 %"
IMAGE_TERMS = "draw of the samples, by the spread of their terms, 95 %"
GROUPED = "draw of the samples, without groups of them in turn, 95 %"
EXACT = "draw of the samples, 95 %"


def _fid(kind: str, name: str, reference: Reference, samples: FeatureSet, options: Options) -> Named:
    statistics = reference.statistics(kind, options.device)
    found = fid(statistics, getattr(samples, kind), options.fid_resamples, options.seed, options.device)
    return {name: (found, HALVES)}


def _is(reference: Reference, samples: FeatureSet, options: Options) -> Named:
    predictions = probabilities(samples.logits)
    whole = measure_inception_scores(predictions, options.resamples, options.seed)
    found = {"is": (whole.published, f"{IMAGE_TERMS}, of scores of as many images")}
    if options.resamples:
        found["is_corrected"] = (whole.corrected, f"{IMAGE_TERMS}, without the bias of 1 / N")
    if 1 < options.splits <= len(predictions):
        parts = inception_score(predictions, options.splits, options.seed)
        name = f"is_{options.splits}_splits"
        found[name] = (_mean_and_spread(parts), f"mean of {options.splits} parts {OF_DRAWS}")
    return found


def _mean_and_spread(values: torch.Tensor) -> Interval:
    mean, spread = float(values.mean()), float(values.std()) if len(values) > 1 else float("nan")
    return Interval(mean, mean - spread, mean + spread)


def _kid(reference: Reference, samples: FeatureSet, options: Options) -> Named:
    sums = reference.sums("cubic", cubic_kernel, options.device)
    shared = {"resamples": options.resamples, "seed": options.seed, "device": options.device}
    whole = mmd2(cubic_kernel, reference.features.pooled, samples.pooled, reference_sums=sums, **shared)
    found = {"kid": (whole, HALVES)}
    size = min(options.kid_subset_size, len(samples), len(reference.features))
    if options.kid_subsets > 0 and size >= 2:
        values = kid_subsets(reference.features.pooled, samples.pooled, options.kid_subsets, size, options.seed)
        found["kid_subsets"] = (
            _mean_and_spread(values),
            f"mean of {options.kid_subsets} draws of {size} {OF_DRAWS}",
        )
    return found


def _cmmd(biased: bool, reference: Reference, samples: FeatureSet, options: Options) -> Named:
    sums = reference.sums(f"gaussian {options.sigma}", partial(gaussian_kernel, sigma=options.sigma), options.device)
    estimate = cmmd(
        reference.features.pooled,
        samples.pooled,
        options.sigma,
        options.scale,
        biased,
        resamples=options.resamples,
        seed=options.seed,
        device=options.device,
        reference_sums=sums,
    )
    return {"cmmd_biased" if biased else "cmmd": (estimate, HALVES)}


def _balls(function: Callable, k_name: str, reference: Reference, samples: FeatureSet, options: Options) -> Named:
    k = getattr(options, k_name)
    radii = reference.radii(k, options.device)
    shared = (options.resamples, options.seed, options.device, radii)
    found = function(reference.features.pooled, samples.pooled, k, *shared)
    first, second = found._fields
    return {
        first: (found[0], EXACT),
        second: (found[1], HALVES if second == "recall" else GROUPED),
    }


@dataclass(frozen=True)
class Metric:
    """How a metric is computed and what it needs: of the samples a kind of features, of the reference more or less."""

    compute: Callable[[Reference, FeatureSet, Options], Named]
    kind: str = "pooled"
    reference: str = "features"  # "features", "statistics" or "nothing"
    neighbours: str = ""  # the option that says how many neighbours every image needs beside itself


METRICS = {
    "fid": Metric(partial(_fid, "pooled", "fid"), reference="statistics"),
    "sfid": Metric(partial(_fid, "spatial", "sfid"), kind="spatial", reference="statistics"),
    "is": Metric(_is, kind="logits", reference="nothing"),
    "kid": Metric(_kid),
    "cmmd": Metric(partial(_cmmd, False)),
    "cmmd_biased": Metric(partial(_cmmd, True)),
    "precision_recall": Metric(partial(_balls, precision_recall, "precision_k"), neighbours="precision_k"),
    "density_coverage": Metric(partial(_balls, density_coverage, "density_k"), neighbours="density_k"),
}


def obstacle(name: str, reference: FeatureSet, samples: FeatureSet, options: Options | None = None) -> str | None:
    """Why a metric cannot be computed from these sets, or None if it can.

    Raises:
        ValueError: for an unknown metric.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric '{name}': expected {', '.join(METRICS)}")
    metric = METRICS[name]
    if getattr(samples, metric.kind) is None:
        return f"the extractor gives no {metric.kind} features"
    least = max(2, 1 + getattr(options or Options(), metric.neighbours)) if metric.neighbours else 2
    if len(samples) < least:
        return f"it needs at least {least} images, got {len(samples)}"
    if metric.reference == "statistics" and not reference.has_statistics(metric.kind):
        return f"the reference has no statistics of {metric.kind} features"
    if metric.reference == "features" and len(reference) == 0:
        return "the reference holds statistics only, no features: give its images"
    if metric.reference == "features" and len(reference) < least:
        return f"it needs a reference of at least {least} images, got {len(reference)}"
    return None


def measure(
    names: Iterable[str],
    reference: FeatureSet | Reference,
    samples: FeatureSet,
    options: Options | None = None,
) -> list[MetricRow]:
    """Compute metrics; some give two rows.

    Args:
        names: keys of `METRICS`.
        reference, samples: features of the same extractor.

    Raises:
        ValueError: if one of them cannot be computed from these sets.
    """
    options = options or Options()
    reference = reference if isinstance(reference, Reference) else Reference(reference)
    rows = []
    for name in names:
        if (reason := obstacle(name, reference.features, samples, options)) is not None:
            raise ValueError(f"{name} cannot be computed: {reason}")
        used = None if METRICS[name].reference == "nothing" else len(reference.features) or None
        for label, (estimate, interval) in METRICS[name].compute(reference, samples, options).items():
            covers = interval if estimate.low == estimate.low else ""
            rows.append(MetricRow(label, estimate.estimate, estimate.low, estimate.high, covers, len(samples), used))
    return rows
