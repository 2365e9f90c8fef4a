"""Does leaving out the uncertain images make a set better? Every metric of what is kept, beside equal random removal.

Examples:
  python scripts/filter_by_uncertainty.py --samples results/samples --ref results/digits-train --keep 0.8 \\
      --out results/filtered
  python scripts/filter_by_uncertainty.py --samples results/samples --ref results/digits-train --rule sigma \\
      --scores sum patch_max segmentation_threshold --out results/as_published

--samples is a folder of sample_laplace.py (samples.npz and scores.csv), --ref one that `evaluate.py ref` wrote, whose
features are used. Of every score the most certain share --keep stays (or with --rule sigma, as published, what lies
below mean + standard deviation); `random` removes as many at random, --random times. Writes table.csv: for each score
and metric the value and z, its distance from the random removals in their standard deviations; and kept/SCORE.txt,
positions for `evaluate.py calc --keep`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ldm.cli import HelpFormatter, pick_device, run_script, write_record
from ldm.data.sources import open_images
from ldm.evaluation.extraction import extract, open_features
from ldm.evaluation.extractors import make_extractor
from ldm.evaluation.metrics import METRICS, Options, Reference, measure, obstacle
from ldm.report.tables import markdown_table, read_csv, write_csv
from ldm.util import atomic_write, generator

# Columns of scores.csv that are no scores.
NAMES = ("image", "class")
# Metrics that are better when greater.
GREATER = ("is", "precision", "recall", "density", "coverage")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--samples", required=True, help="folder that sample_laplace.py wrote")
    add("--ref", required=True, help="folder that evaluate.py ref wrote")
    add("--out", required=True, help="folder of the output")
    add("--keep", type=float, default=0.8, help="share of the images to keep")
    add("--rule", default="share", choices=("share", "sigma"), help="share, or sigma: below mean + s.d. (published)")
    add("--per_class", action="store_true", help="within each class, so that no class goes for being uncertain")
    add("--scores", nargs="+", help="columns of scores.csv (default: all)")
    add("--random", type=int, default=5, help="random removals")
    add(
        "--metrics",
        nargs="+",
        default=["fid", "kid", "precision_recall"],
        choices=tuple(METRICS),
        help="what to measure",
    )
    add("--batch_size", type=int, default=100, help="images in one pass of the extractor")
    add("--device", default="auto", help="auto, cpu or cuda[:N]")
    add("--seed", type=int, default=0, help="seed of the random removals")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def kept_by(values: NDArray, groups: Sequence[NDArray], options: argparse.Namespace) -> NDArray[np.int64]:
    """Positions that stay, ascending, chosen within each group."""
    kept = []
    for group in groups:
        own = values[group]
        if options.rule == "sigma":
            kept.append(group[own < own.mean() + own.std()])
        else:
            kept.append(group[np.argsort(own, kind="stable")[: round(options.keep * len(group))]])
    return np.sort(np.concatenate(kept))


def features_of(options: argparse.Namespace, reference):
    """Features of the samples, by the reference's own extractor."""
    made = reference.settings["features"]
    extractor = make_extractor(made["extractor"], made.get("weights"), made.get("params"), made.get("channels", 3))
    source = open_images(Path(options.samples) / "samples.npz")
    device = pick_device(options.device)
    return extract(
        source, extractor.to(device), Path(options.out) / "features", batch_size=options.batch_size, device=device
    )


def removals(
    scores: dict[str, NDArray], groups: Sequence[NDArray], options: argparse.Namespace
) -> dict[str, NDArray[np.int64]]:
    """{name: positions that stay}: all, by each score, and at random of the same size (the same in each group)."""
    total = len(next(iter(scores.values())))
    chosen = {"none": np.arange(total)} | {name: kept_by(values, groups, options) for name, values in scores.items()}
    size = round(statistics.median(len(kept) for kept in list(chosen.values())[1:]))
    for number in range(options.random):
        order = torch.randperm(total, generator=generator("removal", options.seed, number)).double().numpy()
        if options.rule == "share":
            chosen[f"random {number}"] = kept_by(order, groups, options)
        else:
            chosen[f"random {number}"] = np.sort(np.argsort(order)[:size])
    return chosen


def table_of(values: dict[str, dict[str, float]], kept: dict[str, NDArray]) -> list[dict]:
    """A row a score and one for the mean of the random removals; `z_METRIC` above 0 is better than random."""
    names = list(next(iter(values.values())))
    drawn = [values[name] for name in values if name.startswith("random ")]
    centre = {name: statistics.mean(each[name] for each in drawn) for name in names}
    spread = {
        name: statistics.stdev(each[name] for each in drawn) if len(drawn) > 1 else float("nan") for name in names
    }
    rows = []
    for name in [*(name for name in values if not name.startswith("random ")), "random"]:
        own = centre if name == "random" else values[name]
        row = {"removed by": name, "kept": len(kept["random 0" if name == "random" else name]), **own}
        for metric in names:
            sign = 1 if metric.split("_")[0] in GREATER else -1
            difference = sign * (own[metric] - centre[metric])
            row[f"z_{metric}"] = difference / spread[metric] if difference and spread[metric] else 0.0
        rows.append(row)
    return [*rows, {**rows[-1], "removed by": "random, s.d.", **spread, **{f"z_{name}": 1.0 for name in names}}]


def main(argv: list[str] | None = None) -> list[dict]:
    options = get_parser().parse_args(argv)
    if not 0 < options.keep < 1 or options.random < 2:
        raise ValueError(
            f"--keep lies between 0 and 1 and --random is at least 2, got {options.keep}, {options.random}"
        )
    if (Path(options.out) / "table.csv").exists() and not options.overwrite:
        raise FileExistsError(f"{options.out} holds a table; choose another folder, or --overwrite")
    out, rows = Path(options.out), read_csv(Path(options.samples) / "scores.csv")
    known = [name for name in rows[0] if name not in NAMES]
    wanted = options.scores or known
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise ValueError(f"scores.csv has no {', '.join(unknown)}; it has {', '.join(known)}")
    scores = {name: np.array([float(row[name]) for row in rows]) for name in wanted}
    found = open_features(options.ref)
    samples = features_of(options, found)
    for name in options.metrics:
        if (reason := obstacle(name, found, samples)) is not None:
            raise ValueError(f"{name} cannot be computed: {reason}")
    groups = [np.arange(len(rows))]
    if options.per_class:
        classes = np.array([row.get("class", 0) for row in rows])
        groups = [np.flatnonzero(classes == label) for label in np.unique(classes)]
    reference, kept = Reference(found), removals(scores, groups, options)
    plain = Options(resamples=0, fid_resamples=0, kid_subsets=0, splits=0)
    values = {}
    for name, positions in tqdm(kept.items(), unit="set"):
        measured = measure(options.metrics, reference, samples.rows(positions), plain)
        values[name] = {row.metric: float(row.value) for row in measured}
        with atomic_write(out / "kept" / f"{name.replace(' ', '_')}.txt", overwrite=True) as partial:
            partial.write_text("\n".join(map(str, positions.tolist())) + "\n")
    table = table_of(values, kept)
    rule = f"{options.keep if options.rule == 'share' else 'below mean + s.d.'}{' of each class' * options.per_class}"
    note = f"kept {rule} of {len(rows)}; z > 0: better than random"
    print(markdown_table(table, 4), note, sep="\n")
    write_csv(out / "table.csv", table, [note], overwrite=True)
    write_record(out / "record.json", options, overwrite=True)
    return table


if __name__ == "__main__":
    run_script(main)
