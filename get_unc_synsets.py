"""Epistemic uncertainty per class: mutual information between a sample and the ensemble's weights at the branch.

Examples:
  python get_unc_synsets.py --path logs/bootstrapped_digits_5
  python get_unc_synsets.py --path logs/bootstrapped_digits_5 --unc_branch 0 --n 16 --ddim_steps 50
  torchrun --nproc_per_node 4 get_unc_synsets.py --path ENSEMBLE        (classes are shared out; results are merged)

Writes {path}/samps_uncs_branch{u}/: uncertainty.csv (a row a class), uncertainty.png (per bin), and one file a class
under classes_*/, so that a run that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ldm.arguments import add_ensemble_arguments
from ldm.cli import HelpFormatter, run_script, write_record
from ldm.data.subsets import budget_order
from ldm.evaluation.detection import auroc, spearman, spearman_ceiling
from ldm.jobs import WorkList, shard_from_environment
from ldm.opened import OpenEnsemble, open_ensemble
from ldm.report.plots import per_bin_plot
from ldm.report.tables import write_csv
from ldm.uncertainty.measures import DISTANCES, mean_pairwise_distance, paide, saturation


def scale_of(text: str) -> str | float:
    """`sum`, `mean`, or a number."""
    return text if text in ("sum", "mean") else float(text)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_ensemble_arguments(parser)
    parser.add_argument("--n", type=int, help="noises a class (config, else 10)")
    parser.add_argument("--classes", type=int, nargs="+", help="classes (default: all)")
    parser.add_argument("--quickrun", action="store_true", help="eight classes, spread over all")
    parser.add_argument(
        "--distance",
        choices=sorted(DISTANCES),
        default="wasserstein",
        help="distance between members; the others need --ddim_eta > 0",
    )
    parser.add_argument(
        "--distance_scale", type=scale_of, default="sum", help="sum over dimensions (as published), mean, or a factor"
    )
    parser.add_argument("--classes_at_once", type=int, default=10, help="classes in one batch")
    parser.add_argument("--out", help="folder of the output (default: PATH/samps_uncs_branch{u})")
    return parser


def measure(opened: OpenEnsemble, labels: list[int], n: int, distance: str, scale: str | float) -> list[dict[str, Any]]:
    """One record a class: the quantities of every noise, in nats and squared latent units."""
    images = list(range(n)) * len(labels)
    branched = opened.walk([label for label in labels for _ in range(n)], images, only_first=True)
    distances = DISTANCES[distance](branched.first.distribution, scale=scale)
    information = paide(distances).reshape(len(labels), n).tolist()
    pairwise = mean_pairwise_distance(distances).reshape(len(labels), n).tolist()
    return [{"mi": mi, "mean_pairwise_distance": pair} for mi, pair in zip(information, pairwise, strict=True)]


def row_of(label: int, result: dict[str, Any], opened: OpenEnsemble) -> dict[str, Any]:
    """A line of the table: mean, spread and 95 % interval over the noises."""
    mi = np.asarray(result["mi"])
    sd = float(mi.std(ddof=1)) if len(mi) > 1 else float("nan")
    return {
        "class": label,
        "name": opened.class_names[label],
        "bin": str(opened.bins.get(label, "unknown")),
        "n": len(mi),
        "mi_mean": float(mi.mean()),
        "mi_sd": sd if len(mi) > 1 else None,
        "mi_ci95": 1.96 * sd / math.sqrt(len(mi)) if len(mi) > 1 else None,
        "mean_pairwise_distance": float(np.mean(result["mean_pairwise_distance"])),
        "saturation": saturation(torch.from_numpy(mi), opened.members) if opened.members > 1 else 0.0,
    }


def summary(rows: list[dict[str, Any]], opened: OpenEnsemble) -> list[str]:
    """What the table says of the bins, in words: Spearman with its ceiling, AUROC of small bins against full ones."""
    known = [row for row in rows if row["class"] in opened.bins]
    budgets = [budget_order(opened.bins[row["class"]]) for row in known]
    if len(set(budgets)) < 2:
        return ["bins: none recorded, or one only; no correlation"]
    ranks = np.unique(budgets, return_inverse=True)[1]
    means = [row["mi_mean"] for row in known]
    lines = [
        f"Spearman(images per class, mean MI) = {spearman(ranks, means):.3f} "
        f"(ties cap it at -{spearman_ceiling(ranks):.3f})"
    ]
    few = np.asarray([budget <= 10 for budget in budgets])
    full = np.asarray(budgets) == max(budgets)
    if few.any() and (full & ~few).any():
        chosen = few | full
        value = auroc(np.asarray(means)[chosen], few[chosen])
        lines.append(f"AUROC(1 to 10 images against {known[int(np.argmax(budgets))]['bin']}) = {value:.3f}")
    return lines


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    opened = open_ensemble(options)
    count, n = opened.model.null_class, options.n or opened.setting("n", 10)
    classes = options.classes or (
        sorted({round(k * (count - 1) / 7) for k in range(8)}) if options.quickrun else list(range(count))
    )
    out = Path(options.out or Path(options.path) / f"samps_uncs_branch{opened.branch}")
    settings = {**opened.describe(), "n": n, "distance": options.distance, "distance_scale": options.distance_scale}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:10]
    work = WorkList(out / f"classes_{digest}", settings, shard_from_environment())
    pending = [int(key) for key in work.pending([str(label) for label in classes])]
    with tqdm(total=len(classes), initial=len(classes) - len(pending), desc="classes", unit="class") as progress:
        for first in range(0, len(pending), options.classes_at_once):
            labels = pending[first : first + options.classes_at_once]
            for label, result in zip(
                labels, measure(opened, labels, n, options.distance, options.distance_scale), strict=True
            ):
                work.save(str(label), result)
            progress.update(len(labels))
    if not work.complete([str(label) for label in classes]):
        print(
            f"{out}: this process is done; the table is written by the one that finishes last (or by running once more)"
        )
        return out

    rows = [row_of(label, work.load(str(label)), opened) for label in classes]
    words = summary(rows, opened)
    comments = (
        [f"{key}: {value}" for key, value in settings.items()]
        + ["MI in nats, distances in squared latent units"]
        + words
    )
    write_csv(out / "uncertainty.csv", rows, comments, overwrite=True)
    bins: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: budget_order(opened.bins.get(row["class"], "all"))):
        bins.setdefault(row["bin"], []).append(row["mi_mean"])
    title = f"{opened.ensemble.spec['name']}: {opened.members} members, "
    title += f"branch at step {opened.branch} of {len(opened.grid) - 1}"
    limit = (f"ln {opened.members}", math.log(opened.members)) if opened.members > 1 else None
    per_bin_plot(
        bins,
        out / "uncertainty.png",
        "mutual information (nats)",
        title=title,
        note="\n".join(words),
        ceiling=limit,
        overwrite=True,
    )
    write_record(out / "record.json", options, overwrite=True, settings=settings)
    print("\n".join([*words, str(out / "uncertainty.csv"), str(out / "uncertainty.png")]))
    return out


if __name__ == "__main__":
    run_script(main)
