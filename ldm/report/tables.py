"""Result tables: CSV with a commented header that round-trips exactly, and Markdown."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import dropwhile, takewhile
from numbers import Real

from ldm.files import reading
from ldm.util import atomic_write

# What mends a table that cannot be read.
REMEDY = "make it again by the command that wrote it, or fetch it again"
Value = str | int | float | bool | None
WORDS: dict[str, Value] = {"": None, "True": True, "False": False, "nan": float("nan"), "inf": float("inf")}
INTEGER = re.compile(r"-?(0|[1-9]\d*)")
DECIMAL = re.compile(r"-?(inf|(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?)")


def write_csv(
    path: str | os.PathLike, rows: Iterable[Mapping[str, Value]], comments: Sequence[str] = (), overwrite: bool = False
) -> None:
    """Write rows of one set of columns atomically, below `# ` comment lines; `read_csv` returns them bit for bit.

    Args:
        path: the file.
        rows: at least one; the first gives the order of the columns.
        comments: what the numbers are: units, config, seed, revision.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        ValueError: if there is no row, columns differ, or a value is no text, number, bool or None (e.g. a tensor).
    """
    rows = list(rows)
    columns = _columns(rows)
    with atomic_write(path, overwrite) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        for line in (line for comment in comments for line in comment.splitlines()):
            file.write(f"# {line}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([row[column] for column in columns] for row in rows)


def read_csv(
    path: str | os.PathLike, needs: Sequence[str] | None = None, remedy: str = REMEDY
) -> list[dict[str, Value]]:
    """Read a table of `write_csv`: numbers, booleans and empty fields (None) come back as such, `007` stays text.

    Args:
        path: the file.
        needs: columns that it must have, above at least one row; None where it may be empty.
        remedy: what to do where it is damaged, as an order.

    Raises:
        ValueError: if it is no table, its rows are of different lengths, or it lacks a row or a column of `needs`.
    """
    with reading(path, "a table (CSV)", remedy), open(path, newline="", encoding="utf-8") as file:
        lines = dropwhile(lambda line: line.startswith("#"), file)
        header, *rows = list(csv.reader(lines, strict=True)) or [[]]
        rows = [row for row in rows if row]
        ragged = next((number for number, row in enumerate(rows, 1) if len(row) != len(header)), None)
        if ragged is not None:
            raise ValueError(f"row {ragged} has {len(rows[ragged - 1])} fields under {len(header)} columns")
        if len(set(header)) < len(header):
            raise ValueError("two of its columns have one name")
        missing = [name for name in needs or () if name not in header]
        if missing:
            raise ValueError(f"it has no column {', '.join(missing)}, but {', '.join(header) or 'nothing'}")
        if needs is not None and not rows:
            raise ValueError("it has no row")
        return [{name: _parse(text) for name, text in zip(header, row, strict=True)} for row in rows]


def check_numbers(
    path: str | os.PathLike,
    rows: Iterable[Mapping[str, Value]],
    columns: Iterable[str],
    remedy: str = REMEDY,
    nan: bool = False,
) -> None:
    """Make sure that columns of a table that was read hold a number in every row.

    Args:
        path: the file, for messages; rows: of the table; columns: their names; remedy: see `read_csv`.
        nan: whether NaN is one.

    Raises:
        ValueError: naming the file, the row and the column.
    """
    columns = list(columns)
    for number, row in enumerate(rows, 1):
        for column in columns:
            value = row[column]
            huge = isinstance(value, int) and abs(value) > 2**63
            if isinstance(value, bool) or not isinstance(value, Real) or huge or (math.isnan(value) and not nan):
                words = "nothing" if value is None else repr(value)
                raise ValueError(f"{path}, row {number}: {column} should be a number, and is {words}: {remedy}")


def read_comments(path: str | os.PathLike) -> list[str]:
    """The comment lines above a table, without their `# `."""
    with reading(path, "a table (CSV)", REMEDY), open(path, encoding="utf-8") as file:
        return [line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), file)]


def read_or_make(path: str | os.PathLike, make: Callable[[], Iterable[Mapping[str, Value]]]) -> list[dict[str, Value]]:
    """Return the rows of a table, which is made and written if it is not there."""
    if not os.path.exists(path):
        write_csv(path, make())
    return read_csv(path)


def markdown_table(rows: Iterable[Mapping[str, Value]], digits: int = 4) -> str:
    """The rows as a Markdown table: numbers to `digits` significant digits, right-aligned; None and NaN as empty cells.

    Raises:
        ValueError: as `write_csv`.
    """
    rows = list(rows)
    columns = _columns(rows)
    numeric = [all(row[column] is None or isinstance(row[column], Real) for row in rows) for column in columns]
    lines = [[_escape(column) for column in columns], ["---:" if right else "---" for right in numeric]]
    shown = [[None if row[column] != row[column] else row[column] for column in columns] for row in rows]
    lines += [[_escape(_format(value, digits)) for value in row] for row in shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _columns(rows: Sequence[Mapping[str, Value]]) -> list[str]:
    """Check the rows and return their columns."""
    if not rows:
        raise ValueError("a table needs at least one row; nothing was measured")
    columns = list(rows[0])
    for number, row in enumerate(rows):
        if set(row) != set(columns):
            raise ValueError(f"row {number} has columns {sorted(row)}, the first row has {sorted(columns)}")
        for column, value in row.items():
            if value is not None and not isinstance(value, (str, Real)):
                raise ValueError(
                    f"row {number}, column '{column}' is a {type(value).__name__}; expected text, a number, a bool or "
                    "None (of a tensor use .item())"
                )
    return columns


def _parse(text: str) -> Value:
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if DECIMAL.fullmatch(text) else text


def _format(value: Value, digits: int) -> str:
    if value is None:
        return ""
    is_float = isinstance(value, Real) and not isinstance(value, int)
    return f"{float(value):.{digits}g}" if is_float else str(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
