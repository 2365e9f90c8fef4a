"""The benchmarks of variances along a flow in one table: the published method's figure, ours, what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ldm.experiments.variance_benchmarks import AGAIN, slope
from ldm.records import Row

LOW_DATA = {"path": "gamma^2 along", "re-noised": "gamma^2 of", "tangents": "tangents"}


def benchmark_overview(tables: Mapping[str, Sequence[Row]]) -> list[Row]:
    """One row a benchmark: the published method's figure, ours, and what is asked for."""
    return [row for name, rows in tables.items() if name in OVERVIEWS for row in OVERVIEWS[name](rows)]


def _line(name: str, published: str, ours: str, target: str) -> Row:
    return {"benchmark": name, "published": published, "ours": ours, "target": target}


def _pick(rows: Sequence[Row], column: str, name: str) -> Row:
    return next(row for row in rows if row[column].startswith(name))


def _fidelity(rows: Sequence[Row]) -> list[Row]:
    found = []
    for column, target in (("pixel", ">= .95"), ("image", ">= .9"), ("total", ".9 .. 1.1")):
        old = "/".join(f"{row[column]:.3g}" for row in rows if row["published"]) or "-"
        ours = f"{_pick(rows, 'method', 'tangents, every')[column]:.3f}, K = 32: "
        ours += f"{_pick(rows, 'method', 'tangents, K = 32')[column]:.3f}"
        found.append(_line(f"Y1 {column} (published: its time/frozen)", old, ours, target))
    return found


def _consistency(rows: Sequence[Row]) -> list[Row]:
    ours, old = (_pick(rows, "method", name)["over_truth"] for name in ("tangents", "BayesFlow"))
    return [
        _line("Y2 growth of the total with more steps, over the truth's", f"{old:.3f}", f"{ours:.3f}", ".85 .. 1.15")
    ]


def _calibration(rows: Sequence[Row]) -> list[Row]:
    ours, old, again = (_pick(rows, "posterior", name) for name in ("sandwich", "published", AGAIN))
    ceiling = max(again["overall"], 0) ** 0.5
    rank = f"{ours['overall']:.3f} (of a perfect posterior: about {ceiling:.3f}, with {ours['bootstraps']} bootstraps)"
    return [
        _line("Y3 variance over bootstraps'", f"{old['ratio']:.3g}", f"{ours['ratio']:.3g}", ".8 .. 1.25"),
        _line("Y3 rank correlation", f"{old['overall']:.3f}", rank, ">= .95"),
    ]


def _low_data(rows: Sequence[Row]) -> list[Row]:
    def words(name: str) -> str:
        row = _pick(rows, "score", name)
        return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] ({row['low_data']:.3f})"

    ours = ", ".join(f"{name} {words(start)}" for name, start in LOW_DATA.items())
    target = f">= +.25; neighbour {words('distance')}"
    return [_line("Y4 AUROC minus control (AUROC)", words("BayesFlow"), ours, target)]


def _alignment(rows: Sequence[Row]) -> list[Row]:
    # Every row has the same images: half of the mean's width is at most the mean of the halves.
    pixel, half, ratio = (float(np.mean([row[column] for row in rows])) for column in ("pixel", "pixel_half", "ratio"))
    return [
        _line("Y6 rank correlation with errors, mean over t", "-", f"{pixel:.3f} +- {half:.3f}", ">= .65"),
        _line("Y6 expected over actual error, mean over t", "-", f"{ratio:.3f}", ".85 .. 1.15"),
    ]


def _scaling(rows: Sequence[Row]) -> list[Row]:
    return [_line("Y8 slope of variance in images", "-", f"{slope(rows):.3f}", "-1.3 .. -0.7")]


def _cost(rows: Sequence[Row]) -> list[Row]:
    def words(name: str) -> str:
        row = _pick(rows, "method", name)
        return f"{row['evaluations']} evaluations, {row['times_plain']:.1f}x"

    ours = f"path {words('gamma^2')}; K = 32 {words('tangents, K = 32')}"
    return [_line("Y9 evaluations an image, seconds over plain sampling", words("BayesFlow"), ours, "path 1x")]


OVERVIEWS: dict[str, Callable[[Sequence[Row]], list[Row]]] = {
    "fidelity": _fidelity,
    "consistency": _consistency,
    "calibration": _calibration,
    "low_data_summary": _low_data,
    "alignment": _alignment,
    "scaling": _scaling,
    "cost": _cost,
}
