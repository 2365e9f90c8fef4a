"""The files of a report over classes: tables, summary, and plots, each with what it depends on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.pipelines import EnsemblePipeline, InformationPlan
from ldm.pipelines.noise_levels import count_elements
from ldm.report.class_tables import (
    EXPLAINED,
    bin_curves,
    bin_means,
    class_row,
    curve_rows,
    ordered_bins,
    summarise_classes,
    why_silent,
)
from ldm.report.natural import rank_natural
from ldm.report.plots import Curve, curve_plot, distribution_plot, per_bin_plot
from ldm.report.tables import markdown_table, write_csv
from ldm.uncertainty.results import ClassInformation
from ldm.util import atomic_write

IMAGES = "training images per class"


def _comments(settings: Mapping[str, Any], units: str) -> list[str]:
    return [f"{key}: {value}" for key, value in settings.items()] + [f"distances: {units}", *EXPLAINED]


def write_class_report(
    out: Path,
    results: Sequence[ClassInformation],
    pipeline: EnsemblePipeline,
    settings: Mapping[str, Any],
    plan: InformationPlan,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write uncertainty.csv, uncertainty.png, distributions.png, summary.json, summary.md, and curve.{csv,png} where
    there are step curves; files of an earlier call with the same results are replaced.

    Args:
        results: what was measured of each class.
        settings: what the numbers depend on, for the tables' comments.
        plan: what was measured, which says what the nats are.

    Returns:
        The rows of the table and the summary in words.
    """
    rows = [class_row(result, pipeline) for result in results]
    found, words = summarise_classes(rows, pipeline)
    ranked = pipeline.classes.natural and why_silent(pipeline) is None
    if ranked:
        rows, outstanding = rank_natural(rows)
        found |= outstanding.facts
        words += outstanding.words
    noted = [*words, plan.estimator.through(count_elements(pipeline, plan.compared == "image"))]
    found["meaning"] = plan.meaning(pipeline)
    words = [*words, found["meaning"]]
    comments = _comments(settings, plan.estimator.units)
    write_csv(out / "uncertainty.csv", rows, [*comments, *words], overwrite=True)
    with atomic_write(out / "summary.json", overwrite=True) as partial:
        partial.write_text(json.dumps({"settings": dict(settings), **found}, indent=1, default=str) + "\n")
    with atomic_write(out / "summary.md", overwrite=True) as partial:
        partial.write_text("\n\n".join([*words, markdown_table(found["bins"])]) + "\n")
    title = f"{_where(pipeline)}; distance {settings['distance']}, {settings['distance_scale']}"
    if ranked:
        outstanding.draw(out, rows, title)
    else:
        _bin_plots(out, rows, pipeline, title, "\n".join(noted))
    if all(result.curve is not None for result in results):
        lines = [line for result in results for line in curve_rows(result, pipeline)]
        write_csv(out / "curve.csv", lines, comments, overwrite=True)
        curve_plot(
            bin_curves(lines),
            out / "curve.png",
            "t of the state $z_t$ that the step leads to",
            "mutual information (nats)",
            title=title,
            note=f"first point: one-step, given the shared $z_{{{pipeline.times[pipeline.branch]:g}}}$; "
            "later points: multi-step\nlines: mean over classes; bands: least to largest class",
            ceiling=_limit(pipeline.members),
            invert_x=True,
            log=True,
            legend=IMAGES if not pipeline.classes.masked else None,
            overwrite=True,
        )
    return rows, words


def _where(pipeline: EnsemblePipeline) -> str:
    name = pipeline.ensemble.spec["name"]
    return f"{name}: {pipeline.members} members, step {pipeline.branch} of {len(pipeline.times) - 1}"


def _limit(members: int) -> tuple[str, float] | None:
    return (f"ln {members}", math.log(members)) if members > 1 else None


def _bin_plots(out: Path, rows: Sequence[Mapping[str, Any]], pipeline: EnsemblePipeline, title: str, note: str) -> None:
    """One point a class, by bin; for masked classes, by what the members knew of the class."""
    values, names = ordered_bins(rows), ordered_bins(rows, "name")
    xlabel = IMAGES
    quantity = "one-step mutual information (nats)"
    if pipeline.classes.masked:
        columns = {"both saw it": "distance_certain", "one did": "distance_between", "neither": "distance_uncertain"}
        known = {name: [row for row in rows if row[column] is not None] for name, column in columns.items()}
        known = {name: own for name, own in known.items() if own}
        values = {name: [row[columns[name]] for row in own] for name, own in known.items()}
        names = {name: [row["name"] for row in own] for name, own in known.items()}
        quantity, xlabel = "mean distance between members", "pairs of members by who saw the class"
    limit = None if pipeline.classes.masked else _limit(pipeline.members)
    if values:
        per_bin_plot(values, out / "uncertainty.png", quantity, xlabel, title, note, limit, names, overwrite=True)
        distribution_plot(values, out / "distributions.png", quantity, xlabel, title, note, overwrite=True)


def write_branch_report(
    out: Path,
    tables: Mapping[int, Sequence[Mapping[str, Any]]],
    times: Mapping[int, float],
    comments: Sequence[str],
    title: str = "",
) -> list[Path]:
    """Join the tables of several branch points: by_branch.csv, a line a (branch, bin), and a plot of MI and of SSIM.

    Args:
        tables: {branch step: rows of `write_class_report`}.
        times: {branch step: its time}.
        comments: what the numbers depend on; title: of the plots.

    Returns:
        The files.
    """
    lines = [line for step, rows in tables.items() for line in bin_means(rows, branch_step=step, t=times[step])]
    files = [out / "by_branch.csv"]
    write_csv(files[0], lines, [*comments, *EXPLAINED], overwrite=True)
    quantities = {
        "mi": "one-step mutual information (nats)",
        "ssim": "structural similarity between members",
        "lpips": "perceptual distance (LPIPS) between members",
    }
    for column, label in quantities.items():
        if column not in lines[0]:
            continue
        curves = {}
        for name in dict.fromkeys(line["bin"] for line in lines):
            own = [line for line in lines if line["bin"] == name]
            curves[name] = Curve([line["t"] for line in own], [line[column] for line in own])
        files.append(out / f"by_branch_{column}.png")
        logarithmic = {"log": True} if column == "mi" else {}
        curve_plot(
            curves,
            files[-1],
            "t at which the members branch",
            label,
            title=title,
            invert_x=True,
            legend=IMAGES,
            overwrite=True,
            **logarithmic,
        )
    return files
