"""Whether two quantities of the classes rank them alike: a probe's errors, and an ensemble's uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldm.stats import Interval, spearman_interval


@dataclass(frozen=True)
class ClassAgreement:
    """A row a class with both quantities, and Spearman's rank correlation with its 95 % interval over classes.

    Attributes:
        untested: classes without test images, of which no row is.
    """

    rows: list[dict[str, Any]]
    correlation: Interval
    untested: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Return the correlation in words."""
        found = self.correlation
        ends = f"[{found.low:.2f}, {found.high:.2f}]" if found.known else "(too few classes for an interval)"
        left = f"; without test images: {', '.join(self.untested)}" if self.untested else ""
        return f"Spearman {found.estimate:.2f} {ends} over {len(self.rows)} classes{left}"


def join_by_class(
    errors: Sequence[dict[str, Any]], uncertain: Sequence[dict[str, Any]], features: str, measure: str
) -> ClassAgreement:
    """Join a probe's errors with an ensemble's uncertainty by class.

    Args:
        errors: rows of errors.csv of `decu features probe`.
        uncertain: rows of uncertainty.csv of `decu uncertainty classes`.
        features: which features' errors: trained, untrained or pixels.
        measure: a column of `uncertain`.

    Raises:
        ValueError: if fewer than three classes are in both, or there is no such column.
    """
    own = {row["class"]: row["error"] for row in errors if row["features"] == features}
    by_class = {row["class"]: row for row in uncertain}
    both = sorted(own.keys() & by_class.keys())
    shared = [label for label in both if not math.isnan(own[label])]
    if len(shared) < 3:
        raise ValueError(f"only {len(shared)} classes are in both tables ({features}): nothing to compare")
    if measure not in by_class[shared[0]]:
        raise ValueError(f"--measure is a column of uncertainty.csv: {', '.join(by_class[shared[0]])}")
    rows = [
        {
            "class": label,
            "name": str(by_class[label]["name"]),
            "training images": str(by_class[label]["bin"]),
            "uncertainty": by_class[label][measure],
            "probe error": own[label],
        }
        for label in shared
    ]
    x, y = (np.asarray([row[key] for row in rows], dtype=float) for key in ("uncertainty", "probe error"))
    untested = [str(by_class[label]["name"]) for label in both if label not in shared]
    return ClassAgreement(rows, spearman_interval(x, y), untested)
