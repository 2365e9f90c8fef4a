"""The figure of a promise: the bad share among the accepted samples, by how many are accepted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.report.plots import Curve, curve_plot

# What the columns of promise.csv are.
PROMISE_COLUMNS = (
    "threshold: a sample is accepted whose score lies below, inf where all are; accepted, bad: of the judged ones; "
    "bound: upper end of the accepted ones' bad share, or of the nearest attempt's; bad without: bad share of all; "
    "needed: judged samples that a promise takes, at the bad share that was seen, empty where no number does"
)
# Scores drawn at most, and accepted shares at which their curves are drawn.
MOST_CURVES = 6
DRAWN = np.linspace(0.05, 1, 20)


def bad_shares(scores: NDArray, bad: NDArray) -> NDArray[np.float64]:
    """Return the bad share among the surest DRAWN shares of judged samples, by scores [N] and verdicts [N]."""
    ordered = bad[np.argsort(scores, kind="stable")]
    counts = np.maximum(1, np.round(DRAWN * len(bad)).astype(int))
    return ordered.cumsum()[counts - 1] / counts


def draw_promises(
    scores: Mapping[str, NDArray],
    positions: NDArray,
    bad: NDArray,
    table: list[dict[str, Any]],
    options: Any,
    path: Path,
) -> None:
    """Draw the risk of every score over the judged samples, with the promised risk, and what chance would keep.

    Args:
        scores: {name: values} of all samples; positions, bad: the judged ones and their verdicts [N].
        table: rows of the promise, whose accepted shares the note says.
        options: has `risk` and `confidence`.
    """
    curves = {
        name: Curve(DRAWN, bad_shares(values[positions], bad)) for name, values in list(scores.items())[:MOST_CURVES]
    }
    curves["random removal"] = Curve(DRAWN, np.full(len(DRAWN), bad.mean()))
    curves["promised at most"] = Curve(DRAWN, np.full(len(DRAWN), options.risk))
    kept = [f"{row['score']} {row['accepted share']:.0%}" for row in table if row["promised"] and row["of"] == "all"]
    note = f"promised with confidence {options.confidence:g}: {', '.join(kept)}" if kept else ""
    curve_plot(
        curves,
        path,
        xlabel="accepted share of the samples, the surest first",
        ylabel="bad share of the accepted",
        title="What a rejection buys, by the judge",
        note=note,
        legend="by score",
        overwrite=True,
    )
