"""A report of classes with the numbers of images that they have: rows by rank, classes that stand out, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.evaluation.outliers import RATE, Outstanding, find_outstanding
from ldm.report.ranking import RankedClass, images_plot, ranked_plot

QUANTITY = "mutual information (nats)"


@dataclass(frozen=True)
class NaturalReport:
    """What natural numbers of images say: which classes are more uncertain than theirs explains.

    Attributes:
        outstanding: None where there are too few classes to say.
        places: of the rows that the test was made for, in the table by rank.
        names: of the classes that stand out, most first.
    """

    outstanding: Outstanding | None
    places: list[int]
    names: list[str]

    @property
    def facts(self) -> dict[str, Any]:
        """The same for summary.json."""
        return {} if self.outstanding is None else {"standing_out": {"rate": RATE, "classes": self.names}}

    @property
    def words(self) -> list[str]:
        """The same as sentences."""
        if self.outstanding is None:
            return ["standing out: too few classes, or numbers of images, to say which"]
        found = ", ".join(self.names) or "none"
        return [f"more uncertain than their number of images explains (false discovery rate {RATE:g}): {found}"]

    def draw(self, out: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
        """Write uncertainty.png, the ranking by name, and by_images.png, the scores against the numbers of images.

        Where every class has the same number, or none is known, there is no by_images.png.
        """
        classes = [rank_row(row) for row in rows]
        ranked_plot(classes, out / "uncertainty.png", QUANTITY, title, overwrite=True)
        if len({one.images for one in classes if one.images}) < 2:
            return
        tested = [classes[place] for place in self.places]
        if self.outstanding is None:
            images_plot(classes, out / "by_images.png", QUANTITY, title, overwrite=True)
            return
        expected = self.outstanding.expected.tolist()
        images_plot(tested, out / "by_images.png", QUANTITY, title, self.outstanding.chosen, expected, overwrite=True)


def rank_row(row: Mapping[str, Any]) -> RankedClass:
    """Return a row of the table of classes as a class of a ranking."""
    images = None if row["images"] is None else int(row["images"])
    return RankedClass(str(row["name"]), images, row["mi_mean"], row["mi_low"], row["mi_high"])


def rank_natural(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], NaturalReport]:
    """Return rows by rank, the most uncertain first, with their number of images, and which classes stand out.

    Args:
        rows: of `class_row`; `bin` is the number of images.
    """
    ordered = sorted(rows, key=lambda row: -row["mi_mean"])
    counted = [{**row, "images": int(row["bin"]) if str(row["bin"]).isdigit() else None} for row in ordered]
    places = [place for place, row in enumerate(counted) if row["images"]]
    scores, images = ([counted[place][name] for place in places] for name in ("mi_mean", "images"))
    found = find_outstanding(scores, images) if places else None
    p = dict(zip(places, found.p.tolist(), strict=True)) if found is not None else {}
    table = [{**row, "residual_p": p.get(place)} for place, row in enumerate(counted)]
    names = [str(counted[places[one]]["name"]) for one in found.chosen] if found is not None else []
    return table, NaturalReport(found, places, names)
