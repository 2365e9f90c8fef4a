"""Tables of what was measured of each class: rows, curves, and what they say of the bins and of hidden classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.data.bins import class_size_order
from ldm.evaluation.detection import against_class_sizes
from ldm.pipelines import EnsemblePipeline
from ldm.report.plots import Curve
from ldm.stats import Interval, auroc_interval, mean_interval, ratio_interval, skewed_mean_interval
from ldm.uncertainty.information import saturation
from ldm.uncertainty.results import ClassInformation

MEANS = (
    "mean_pairwise_distance",
    "epistemic_variance",
    "aleatoric_variance",
    "ssim",
    "lpips",
    "mi_certain",
    "mi_uncertain",
    "distance_certain",
    "distance_uncertain",
    "distance_between",
)
_STEP_KINDS = ("one-step", "multi-step")
EXPLAINED = (
    "mi_*: one-step mutual information (nats) of the first branched step, given the shared state z_b; mean, s.d. and "
    "95 % interval over n noises, each averaged over the base members (Student's under Hall's transformation, cut at 0 "
    "since no mutual information lies below it); mi_base_sd: s.d. of the class's mean over base members",
    "multistep_*: the same of the last step, between chains that have branched before",
    "ssim: structural similarity between members' pictures, mean over pairs and noises (lower: more diverse); "
    "lpips: their learned perceptual distance (higher: more diverse)",
    "epistemic_variance: of the members' means, with M - 1, so that it does not depend on the number of members",
    "*_certain, *_uncertain: among the members that saw the class, that did not; a group of one gives 0 nats",
)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def class_row(result: ClassInformation, pipeline: EnsemblePipeline) -> dict[str, Any]:
    """Return the line of a class in the table."""
    classes = pipeline.classes
    label = result.label
    interval = result.interval
    by_base = result.mi_by_base.numpy().mean(1)
    measured = result.tensors()
    row = {
        "class": label,
        "name": classes.name(label),
        "bin": str(classes.sizes.get(label, "unknown")),
        "n": interval.n,
        "mi_mean": interval.estimate,
        "mi_sd": _finite(interval.sd),
        "mi_low": _finite(interval.low),
        "mi_high": _finite(interval.high),
        "mi_base_sd": float(by_base.std(ddof=1)) if len(by_base) > 1 else None,
        "saturation": saturation(result.mi, pipeline.members) if pipeline.members > 1 else 0.0,
    }
    row.update({name: _finite(float(np.mean(measured[name].numpy()))) for name in MEANS if name in measured})
    if result.curve is not None:
        last = mean_interval(result.curve[-1].tolist())
        row.update(multistep_mean=last.estimate, multistep_sd=_finite(last.sd))
    groups = classes.groups(label)
    if groups is not None:
        row.update(certain=" ".join(map(str, groups.certain)), uncertain=" ".join(map(str, groups.uncertain)))
    return row


def curve_rows(result: ClassInformation, pipeline: EnsemblePipeline) -> list[dict[str, Any]]:
    """Return the step curve of a class: one line a step after the branch."""
    assert result.curve is not None
    times = pipeline.times.tolist()
    rows = []
    for place, values in enumerate(result.curve.tolist()):
        step = pipeline.branch + place
        interval = skewed_mean_interval(values, least=0.0)
        rows.append(
            {
                "class": result.label,
                "bin": str(pipeline.classes.sizes.get(result.label, "unknown")),
                "step": step,
                "from_t": times[step],
                "to_t": times[step + 1],
                "kind": _STEP_KINDS[place > 0],
                "mi_mean": interval.estimate,
                "mi_sd": _finite(interval.sd),
                "mi_low": _finite(interval.low),
                "mi_high": _finite(interval.high),
            }
        )
    return rows


def ordered_bins(rows: Sequence[Mapping[str, Any]], column: str = "mi_mean") -> dict[str, list[Any]]:
    """{bin: values of its classes}, the fewest images first."""
    order = {row["bin"]: float(row["bin"]) if row["bin"].isdigit() else math.inf for row in rows}
    return {name: [row[column] for row in rows if row["bin"] == name] for name in sorted(order, key=order.__getitem__)}


def bin_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """One curve a bin over the time that a step leads to: the mean over its classes, and the least and largest."""
    times = sorted({row["to_t"] for row in rows}, reverse=True)
    curves = {}
    for name in ordered_bins(rows):
        own = [[row["mi_mean"] for row in rows if row["bin"] == name and row["to_t"] == time] for time in times]
        curves[name] = Curve(times, [np.mean(v) for v in own], [min(v) for v in own], [max(v) for v in own])
    return curves


def bin_means(rows: Sequence[Mapping[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """One line a bin: number of classes, and mean and s.d. over them of each quantity that was measured."""
    columns = [name for name in ("mi_mean", "multistep_mean", *MEANS) if name in rows[0]]
    lines = []
    for name in ordered_bins(rows):
        own = [row for row in rows if row["bin"] == name]
        line: dict[str, Any] = {**more, "bin": name, "classes": len(own)}
        for column in columns:
            values = [row[column] for row in own if row[column] is not None]
            line[column.removesuffix("_mean")] = float(np.mean(values)) if values else None
            line[f"{column.removesuffix('_mean')}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        lines.append(line)
    return lines


def _masked_summary(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Are the members that did not see a class less sure of it than those that did?

    By mean distances: they have one scale for groups of any size, while mutual information ends at ln of the size.
    """
    pairs = [(row["distance_certain"], row["distance_uncertain"]) for row in rows]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        return {}, ["groups: no class has two members or more on both sides; nothing to compare"]
    if np.ptp(pairs) == 0:
        return {}, [f"groups: the mean distance is {pairs[0][0]:.3g} in every one; nothing to compare"]
    certain, uncertain = np.maximum(np.asarray(pairs), 1e-300).T
    ratio = ratio_interval(uncertain, certain)
    scores, positives = np.asarray(pairs).ravel(), np.tile([False, True], len(pairs))
    area = auroc_interval(scores, positives)
    found = {"hidden_to_seen": ratio.as_dict(), "auroc_groups": area.as_dict(), "compared_classes": len(pairs)}
    words = [
        f"distance among members that did not see a class / among those that did = {_words(ratio)} (geometric mean)",
        f"AUROC(hidden against seen, distances in {len(pairs)} classes) = {_words(area)}",
    ]
    return found, words


def summarise_classes(
    rows: Sequence[Mapping[str, Any]], pipeline: EnsemblePipeline
) -> tuple[dict[str, Any], list[str]]:
    """What the table says, as numbers and as words: how MI follows the bins, with intervals over classes; and, for
    masked classes, whether the members that did not see a class disagree more than those that did."""
    found: dict[str, Any] = {
        "classes": len(rows),
        "saturation": float(np.mean([row["saturation"] for row in rows])),
        "bins": bin_means(rows),
    }
    silent = why_silent(pipeline)
    if silent is not None:
        return {**found, "silent": silent}, [silent]
    if pipeline.classes.masked:
        more, words = _masked_summary(rows)
        return {**found, **more}, words
    known = [row for row in rows if row["class"] in pipeline.classes.sizes]
    class_sizes = [class_size_order(pipeline.classes.sizes[row["class"]]) for row in known]
    if len(set(class_sizes)) < 2:
        return found, ["bins: none recorded, or one only; no correlation"]
    values = [row["mi_mean"] for row in known]
    if np.ptp(values) == 0:
        return found, [f"mutual information is {values[0]:.3g} nats in every class: it ranks nothing"]
    scores = against_class_sizes(values, class_sizes)
    few = ", ".join(f"{class_size:g}" for class_size in scores.few)
    largest = known[int(np.argmax(class_sizes))]["bin"]
    found["spearman"] = {**scores.spearman.as_dict(), "ceiling": -scores.ceiling}
    found["auroc"] = {**scores.auroc.as_dict(), "positives": scores.few, "negatives": largest}
    words = [
        f"Spearman(images per class, mean MI) = {_words(scores.spearman)} (ties cap it at -{scores.ceiling:.3f})",
        f"AUROC({few} images against {largest}) = {_words(scores.auroc)}",
    ]
    return found, words


def why_silent(pipeline: EnsemblePipeline) -> str | None:
    """Return why the members cannot disagree, whatever the class, in words; None where they can."""
    if pipeline.members < 2:
        return "one member cannot disagree: its mutual information is 0, and ranks nothing"
    rows = pipeline.ensemble.members.overrides.values()
    if all(bool((values == values[:1]).all()) for values in rows):
        return f"all {pipeline.members} members have the same weights and agree exactly: nothing to rank"
    return None


def _words(interval: Interval) -> str:
    if math.isnan(interval.estimate):
        return "not defined (equal values rank nothing)"
    if not interval.known:
        return f"{interval.estimate:.3f} (too few classes for an interval)"
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
