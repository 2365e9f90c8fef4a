"""The report of an ensemble's controls: tables, pictures, and what they say in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.experiments.controls import over_runs, pooled_scores, same_class
from ldm.records import Row
from ldm.report.plots import Curve, curve_plot
from ldm.report.tables import markdown_table, write_csv
from ldm.stats import spearman
from ldm.util import atomic_write

Tables = Mapping[str, Mapping[int, Mapping[float, Sequence[Row]]]]
# Scores of a class beside mutual information, and the sign that makes each large where the model knows little.
BASELINES = {"l2": 1, "member_variance": 1, "seed_variance": 1, "embedding_spread": 1, "recognised": -1, "distance": 1}
QUALITY = {"recognised": 1, "distance": -1}


def variant_table(tables: Tables) -> list[dict[str, Any]]:
    """Spearman with its share of the ceiling, and AUROC, of every variant at every branch point, over the rotations."""
    rows = []
    for variant, runs in tables.items():
        for at in next(iter(runs.values())):
            scores = pooled_scores([run[at] for run in runs.values()])
            mean = float(np.mean([row["mi_mean"] for run in runs.values() for row in run[at]]))
            rows.append({"variant": variant, "branch_at": at, **scores, "mean_mi": mean})
    return rows


def baseline_table(runs: Mapping[int, Mapping[float, Sequence[Row]]], controls: Sequence[Row]) -> list[dict[str, Any]]:
    """How mutual information and simpler scores find the classes with few images, and follow the quality of samples.

    Correlations with quality (share recognised; minus the distance to real images) are over the classes of each run,
    averaged over runs, with their interval: an uncertainty that tells of quality is below 0.
    """
    first = next(iter(next(iter(runs.values()))))
    scores = {
        f"mi_at_{at:g}": ("mi_mean", 1, {r: run[at] for r, run in runs.items()}) for at in next(iter(runs.values()))
    }
    own = {rotation: [row for row in controls if row["rotation"] == rotation] for rotation in runs}
    bins = {rotation: {row["class"]: row["bin"] for row in run[first]} for rotation, run in runs.items()}
    for name, sign in BASELINES.items():
        if all(row[name] is not None for row in controls):
            with_bins = {r: [{**row, "bin": bins[r][row["class"]]} for row in rows] for r, rows in own.items()}
            scores[name] = (name, sign, with_bins)
    table = []
    for name, (column, sign, by_run) in scores.items():
        pooled = pooled_scores(list(by_run.values()), column, sign)
        row = {"score": name, **{key: pooled[key] for key in ("spearman", "ratio", "auroc", "auroc_low", "auroc_high")}}
        for quality, better in QUALITY.items():
            if name == quality:
                row.update({f"rho_{quality}": None, f"rho_{quality}_low": None, f"rho_{quality}_high": None})
                continue
            each = []
            for rotation, rows in by_run.items():
                values = {one["class"]: sign * one[column] for one in rows}
                good = {one["class"]: better * one[quality] for one in own[rotation]}
                each.append(spearman([values[label] for label in good], list(good.values())))
            each = [value for value in each if value == value]  # a run without differences in quality has none
            found = over_runs(each, -1.0, 1.0) if each else None
            names = (f"rho_{quality}", f"rho_{quality}_low", f"rho_{quality}_high")
            ends = (found.low, found.high) if found and found.known else (None, None)
            row.update(zip(names, (found.estimate if found else None, *ends), strict=True))
        table.append(row)
    return table


def _same_class_tables(tables: Tables) -> dict[float, list[dict[str, Any]]]:
    runs = tables.get("default") or next(iter(tables.values()))
    return {at: same_class([row for run in runs.values() for row in run[at]]) for at in next(iter(runs.values()))}


def _same_class_plot(rows: Sequence[Row], path: Path, at: float) -> None:
    class_sizes = [key.removeprefix("at_") for key in rows[0] if key.startswith("at_")]
    curves = {
        f"class {row['class']}": Curve(
            [place for place, name in enumerate(class_sizes) if row[f"at_{name}"] is not None],
            [row[f"at_{name}"] for name in class_sizes if row[f"at_{name}"] is not None],
        )
        for row in rows
    }
    curve_plot(
        curves,
        path,
        "training images of the class",
        "mutual information (nats)",
        title=f"the same class with different numbers of images, branch at {at:g}",
        xnames=dict(enumerate(class_sizes)),
        log=True,
        overwrite=True,
    )


def write_control_report(out: Path, tables: Tables, studies: Mapping[str, Sequence[Row]]) -> Path:
    """Write report.md, variants.csv, same_class_*.csv and .png, baselines.csv, members.png; return the report.

    Args:
        tables: {variant: {rotation: {branch point: rows of get_unc_synsets.py}}}.
        studies: `controls` (rows of `class_controls` with their rotation), `members` (`members_study`), `cost`.
    """
    variants = variant_table(tables)
    write_csv(out / "variants.csv", variants, overwrite=True)
    parts = [
        "# Heads and initialisations",
        "Mean over rotations; 95 % intervals over rotations.",
        markdown_table(variants),
    ]
    for at, rows in _same_class_tables(tables).items():
        write_csv(out / f"same_class_{at:g}.csv", rows, overwrite=True)
        _same_class_plot(rows, out / f"same_class_{at:g}.png", at)
        falls, every = (sum(row[key] for row in rows) for key in ("falls", "falls_at_every_step"))
        words = f"{falls} of {len(rows)} classes know less with fewest images than with most; {every} at every step."
        parts += [f"# The same class at different class_sizes, branch at {at:g}", words, markdown_table(rows)]
    if studies.get("controls") and "default" in tables:
        rows = baseline_table(tables["default"], studies["controls"])
        write_csv(out / "baselines.csv", rows, overwrite=True)
        parts += ["# Beside simpler scores, and the quality of samples", markdown_table(rows)]
    if studies.get("members"):
        rows = studies["members"]
        counts = [row["members"] for row in rows]
        curves = {}
        for name, column, sign in (("Spearman, sign turned", "spearman", -1), ("AUROC", "auroc", 1)):
            middle = np.array([sign * row[column] for row in rows])
            spread = np.array([row[f"{column}_sd"] for row in rows])
            curves[name] = Curve(counts, middle, middle - spread, np.minimum(middle + spread, 1.0))
        curve_plot(curves, out / "members.png", "members M", "score (band: s.d. over groups)", overwrite=True)
        parts += ["# The number of members", markdown_table(rows)]
    if studies.get("cost"):
        parts += ["# Cost", markdown_table(studies["cost"])]
    with atomic_write(out / "report.md", overwrite=True) as partial:
        partial.write_text("\n\n".join(parts) + "\n")
    return out / "report.md"
