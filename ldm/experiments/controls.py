"""Controls of an ensemble's uncertainty: what simpler scores say of the same classes, and what it has to do with
quality, with the number of members, and with the class itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ldm.data.bins import class_size_order
from ldm.ensembles.storage import EMBEDDING_TABLE
from ldm.evaluation.detection import against_class_sizes
from ldm.evaluation.recognition import PixelClassifier, nearest_distances
from ldm.pipelines import EnsemblePipeline
from ldm.stats import Interval, mean_interval, spearman
from ldm.uncertainty.information import paide

POOLED = ("spearman", "spearman_low", "spearman_high", "spearman_worst", "auroc", "auroc_low", "auroc_high",
          "auroc_worst", "ratio")  # fmt: skip
SUBSETS = 40  # of each size at most, in the study of the number of members


def class_controls(
    pipeline: EnsemblePipeline,
    labels: Sequence[int],
    noises: int,
    classifier: PixelClassifier,
    references: Mapping[int, np.ndarray],
) -> list[dict[str, Any]]:
    """Of every class: baselines that need no mutual information, and the quality of its samples. One row a class.

        l2                 mean over pairs of members of |x_i - x_j|, final latents of one noise
        member_variance    variance over members of an element of the final latent, mean over elements
        seed_variance      variance over noises for member 0 alone, mean over elements: one model, many seeds
        embedding_spread   standard deviation over members of an entry of the class's row, in units of the row's own
                           standard deviation; None where the members do not differ in the table
        recognised         share of the samples of all members that the classifier takes for their class
        distance           mean RMS distance of a sample to the nearest real image of its class

    Args:
        noises: per class, the same for all members and classes.
        references: {class: real images [K, H, W, C] in [-1, 1]}, held out from training.
    """
    rows = []
    for label in labels:
        samples = pipeline.member_latents([label] * noises, range(noises))[:, :, 0]  # [M, n, c, h, w]
        flat = samples.flatten(2).double()
        pairs = [(flat[i] - flat[j]).norm(dim=1).mean() for i, j in combinations(range(len(flat)), 2)]
        images = pipeline.decode(samples).flatten(0, 1).permute(0, 2, 3, 1).numpy()
        rows.append(
            {
                "class": label,
                "l2": float(torch.stack(pairs).mean()),
                "member_variance": float(flat.var(0, correction=0).mean()),
                "seed_variance": float(flat[0].var(0, correction=0).mean()),
                "embedding_spread": embedding_spread(pipeline, label),
                "recognised": float(classifier.recognised(images, [label] * len(images)).mean()),
                "distance": float(nearest_distances(images, references[label]).mean()),
            }
        )
    return rows


def embedding_spread(pipeline: EnsemblePipeline, label: int) -> float | None:
    """See `class_controls`."""
    tables = pipeline.network.members.overrides.get(EMBEDDING_TABLE)
    if tables is None:
        return None
    rows = tables[:, label].double()
    own = pipeline.model.get_parameter(EMBEDDING_TABLE)[label].double().std(correction=0)
    return float(rows.std(0, correction=0).square().mean().sqrt() / own)


def members_study(distances: Mapping[int, Tensor], class_sizes: Mapping[int, float]) -> list[dict[str, Any]]:
    """How the estimate and its use depend on the number of members: one row for each M from 2 to all.

    For every M, averages over at most `SUBSETS` groups of that many members, evenly among all groups.

    Args:
        distances: {class: [M, M, n] between all members}; class_sizes: {class: number of training images}.

    Returns:
        Rows with M, mean MI (nats) and its share of ln M, Spearman with the class_sizes and AUROC, mean and standard
        deviation over the groups.
    """
    total, rows = len(next(iter(distances.values()))), []
    labels = sorted(distances)
    order = [class_sizes[label] for label in labels]
    for count in range(2, total + 1):
        groups = list(combinations(range(total), count))
        chosen = [groups[k] for k in np.unique(np.linspace(0, len(groups) - 1, min(SUBSETS, len(groups))).astype(int))]
        means = np.array([[float(paide(distances[label], group).mean()) for label in labels] for group in chosen])
        scores = [against_class_sizes(values, order) for values in means]
        rho, area = ([getattr(one, name).estimate for one in scores] for name in ("spearman", "auroc"))
        rows.append(
            {
                "members": count,
                "groups": len(chosen),
                "mi": float(means.mean()),
                "share_of_ln_m": float(means.mean() / math.log(count)),
                "spearman": float(np.mean(rho)),
                "spearman_sd": float(np.std(rho)),
                "auroc": float(np.mean(area)),
                "auroc_sd": float(np.std(area)),
            }
        )
    return rows


def same_class(rows: Iterable[Mapping[str, Any]], value: str = "mi_mean") -> list[dict[str, Any]]:
    """One class under different class_sizes, from runs that gave it to different bins: does its uncertainty fall?

    Args:
        rows: with `class`, `bin` (number of images, or "all") and `value`, from all runs.

    Returns:
        A row a class: the mean value at each class_size, Spearman of class_size and value over its runs (None for one
        run),
        whether the mean falls from the smallest to the largest class_size, and whether it does so at every step.
    """
    rows, table = list(rows), []
    class_sizes = sorted({row["bin"] for row in rows}, key=class_size_order)
    for label in sorted({row["class"] for row in rows}):
        own = [row for row in rows if row["class"] == label]
        means = {
            name: float(np.mean([row[value] for row in own if row["bin"] == name]))
            for name in class_sizes
            if any(row["bin"] == name for row in own)
        }
        ranks = [class_sizes.index(row["bin"]) for row in own]
        falls = list(means.values())
        table.append(
            {
                "class": label,
                **{f"at_{name}": means.get(name) for name in class_sizes},
                "spearman": spearman(ranks, [row[value] for row in own]) if len(own) > 1 else None,
                "falls": bool(falls[0] > falls[-1]),
                "falls_at_every_step": len(falls) > 1 and bool(np.all(np.diff(falls) < 0)),
            }
        )
    return table


def pooled_scores(
    runs: Sequence[Sequence[Mapping[str, Any]]], value: str = "mi_mean", sign: float = 1.0
) -> dict[str, Any]:
    """Spearman with class sizes, its ratio to the ceiling, and AUROC: means over runs, and intervals.

    Args:
        runs: rows with `bin` and `value` of each run; sign: -1 where a small value means uncertain.

    Returns:
        `POOLED` (`_worst` of the runs). Ends are None where runs are alike or there is one; all is None where a run has
        one value for all classes, which ranks nothing.
    """
    values = [np.array([sign * row[value] for row in rows]) for rows in runs]
    class_sizes = [np.array([class_size_order(row["bin"]) for row in rows]) for rows in runs]
    if any(np.ptp(one) == 0 for one in values):
        return {"runs": len(runs), **dict.fromkeys(POOLED)}
    scores = [against_class_sizes(*pair) for pair in zip(values, class_sizes, strict=True)]
    found: dict[str, Any] = {"runs": len(runs)}
    ceiling = float(np.mean([one.ceiling for one in scores]))
    for name, ends in (("spearman", (-ceiling, ceiling)), ("auroc", (0.0, 1.0))):
        each = [getattr(one, name).estimate for one in scores]
        interval = over_runs(each, *ends)
        low, high = (interval.low, interval.high) if interval.known else (None, None)
        found.update({name: interval.estimate, f"{name}_low": low, f"{name}_high": high})
        found[f"{name}_worst"] = max(each) if name == "spearman" else min(each)
    found["ratio"] = found["spearman"] / -ceiling
    return found


def over_runs(values: ArrayLike, least: float = -math.inf, most: float = math.inf) -> Interval:
    """Mean of a value that every run has, with Student's interval over runs.

    One run has no interval, nor have runs that are all equal: their spread is not known. `least` and `most` are what
    the mean can be; see `Interval.within`.
    """
    found = mean_interval(values)
    if not found.sd > 0:
        return Interval(found.estimate, n=found.n)
    return found.within(least, most)
