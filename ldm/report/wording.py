"""Numbers, intervals and names as the sentences of a page say them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ldm.records import Row
from ldm.stats import Interval

# Names are listed up to this many.
MOST_NAMED = 6


def number(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:.4g}"


def is_known(value: Any) -> bool:
    """Tell whether a value of a table is a number."""
    return isinstance(value, int | float) and not math.isnan(value)


def write_ends(low: Any, high: Any, digits: str = ".4g") -> str:
    """Return an interval in brackets after a space, nothing where an end is not known."""
    return f" [{low:{digits}}, {high:{digits}}]" if is_known(low) and is_known(high) else ""


def write_interval(found: Interval) -> str:
    """Return an estimate with its interval."""
    return f"{found.estimate:.4g}{write_ends(found.low, found.high)}"


def write_sentence(words: str) -> str:
    """Return a note as a sentence."""
    return f"{words[:1].upper()}{words[1:]}."


def list_names(names: Sequence[str]) -> str:
    """Return names in a row, of more than MOST_NAMED the first."""
    if len(names) > MOST_NAMED:
        return f"{', '.join(names[:MOST_NAMED])} and {len(names) - MOST_NAMED} more"
    return ", ".join(names)


def name_class(row: Row) -> str:
    """Return the name of a row's class, or its number as one."""
    name = row.get("name")
    return say_class(row["class"] if name is None else name)


def say_class(name: Any) -> str:
    """Return a name of a class as a sentence says it: "class 7" where it is a number."""
    return f"class {name}" if str(name).isdigit() else str(name)
