"""What tables of results say in sentences, for the beginning of a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ldm.files import reading
from ldm.records import Row
from ldm.report.evaluation_sentences import (
    describe_errors,
    describe_metrics,
    describe_ood,
    describe_probes,
    describe_quality,
    describe_recognition,
    describe_trainings,
    describe_values,
)
from ldm.report.sampling_sentences import (
    describe_accepted,
    describe_choice,
    describe_norms,
    describe_promises,
    describe_removals,
    describe_restored,
    describe_scores,
    describe_states,
)
from ldm.report.tables import check_numbers, read_comments, read_csv
from ldm.report.wording import write_sentence

Describe = Callable[[Sequence[Row]], list[str]]
_NAMES = ("metric", "features", "class", "score", "removed by", "promised", "pictures", "map", "model")
# {file: the columns that it must have, and what makes sentences of its rows, None where the first
# comment is one}.
DESCRIBED: dict[str, tuple[tuple[str, ...], Describe | None]] = {
    "norms.csv": (("step", "training"), describe_norms),
    "states.csv": (("step", "floor"), describe_states),
    "choice.csv": ((), describe_choice),
    "scores.csv": (("image", "sum"), describe_scores),
    "table.csv": (("removed by", "kept"), describe_removals),
    "promise.csv": (("score", "promised", "accepted share", "accepted", "bad"), describe_promises),
    "accepted.csv": (("score", "accepted", "images"), describe_accepted),
    "results.csv": (("features", "test", "deviation", "seeds"), describe_probes),
    "errors.csv": (("features", "class"), describe_errors),
    "recognition.csv": (("log_snr", "recognised"), describe_recognition),
    "joined.csv": (("probe error", "uncertainty"), None),
    "metrics.csv": (("metric", "value", "low", "high", "n"), describe_metrics),
    "ood.csv": (("pictures", "score", "evaluations", "auroc", "low", "high"), describe_ood),
    "value.csv": (("class", "fall of loss", "low", "high"), describe_values),
    "intervals.csv": (("map", "mean length", "over unscaled", "coverage", "low", "high"), describe_restored),
    "quality.csv": (("model", "steps", "recognised"), describe_quality),
    "images.csv": (("rank",), None),
    "trainings.csv": (("metric", "mean", "low", "high", "trainings"), describe_trainings),
}


def describe_tables(tables: Iterable[Path], folder: Path) -> list[str]:
    """Return what tables say in sentences; of a table in a folder below, the first begins with that folder's name.

    Args:
        tables: .csv files, those of which nothing can be said among them.
        folder: the folder of the page.

    Raises:
        ValueError: if a table cannot be read.
    """
    found = []
    order = list(DESCRIBED)
    known = sorted(
        (path for path in tables if path.name in DESCRIBED), key=lambda path: (path.parent, order.index(path.name))
    )
    for path in known:
        needs, make = DESCRIBED[path.name]
        rows = read_csv(path)
        if not rows:
            raise ValueError(f"{path} holds no rows: make it again, or take it out of the folder")
        if any(name not in rows[0] for name in needs):
            continue
        check_numbers(path, rows, [name for name in needs if name not in _NAMES], nan=True)
        with reading(path, "a whole table of results", "make it again, or take it out of the folder"):
            sentences = make(rows) if make else [write_sentence(words) for words in read_comments(path)[:1]]
        parent = path.parent.relative_to(folder).as_posix()
        if sentences and parent != ".":
            sentences[0] = f"{parent}: {sentences[0]}"
        found += sentences
    return found
