"""Pages of results that exist: what a folder holds, as a page that says what was found, how, and how to read it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.files import read_json
from ldm.report.benchmark_page import benchmark_sections
from ldm.report.class_pages import class_sections, summarise_table
from ldm.report.findings import describe_tables
from ldm.report.mistakes import MISTAKES_FOLDER, TABLE
from ldm.report.page import PAGE, Code, PageTable, Picture, ResultPage, Section, Text
from ldm.report.reading import how_to_read
from ldm.report.sampling_sentences import describe_posterior
from ldm.report.tables import REMEDY, read_comments, read_csv

# Longer tables are cut, with a word.
MOST_ROWS = 1000
# Of more pictures in one folder the first are shown, with a word.
MOST_PICTURES = 40
# The first comment of a table stands below it where it has no more characters; all of them can be unfolded.
LONGEST_NOTE = 400
# Titles of folders whose names are short.
KNOWN = {
    "samples": "Samples of the members",
    "pixel_unc": "Where in the picture it does not know",
    "mistakes": "What samples are near to",
}
# Pictures whose names are short, by what they show.
CAPTIONS = {
    "maps": "Samples, and below each the variance of its pixels (brighter: more)",
    "ranked": "The samples of least and of greatest variance",
    "steps": "The variance of the state step by step, from noise to picture",
    "norms": "Length of the predicted noise, in training and in sampling",
    "ratios": "Length of the predicted noise in sampling over that in training; 1 would be no exposure bias",
    "delta": "delta_t after each step, above the floor that a perfect sampler has",
    "distance": "Squared distance of an element of x_t in sampling from the true one",
    "choice": "What was tried",
    "trained": "Accuracy of probes by layer and noise level; the frame marks the place that was chosen",
    "untrained": "The same of a network with fresh weights",
    "restored": "Restored pictures: the length of each pixel's interval, and where the truth lies outside (red)",
    "attribution": "Samples, the training pictures that they lean on most, and where in the picture",
    "value": "What more pictures of each class would bring, beside how many it has and its loss now",
    "trainings": "Each training with its interval over samples, and the bands over trainings",
    "ood": "AUROC of each score, of the folder's pictures against known ones",
    "promise": "The share of bad samples among those that are kept, and what is promised of it",
    "recognition": "The share of test pictures that is recognised, by noise",
    "sample_sizes": "Metrics by the number of images",
    "distortions": "Metrics by the strength of a distortion",
    "sweep": "Scores by the settings of the fit",
    "two_kinds": "What the weights leave open, and what the data leave open",
    "grid": "Samples",
    "curve": "What removing the most uncertain pictures does",
    "contrastive": "Features of noisier and noisier pictures",
    "members": "Samples of each member",
}
# A commit by all of its name, of which the first twelve letters are shown.
_FULL_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28}\b")
# Folders below results whose files belong to a run that goes on, or to single classes.
_APART = ("classes_", "kept", "checkpoints", "parts")


def write_page(folder: str | Path) -> Path:
    """Write {folder}/page.html of the results in a folder; return its path.

    Raises:
        ValueError: if the folder holds no results.
    """
    return make_page(folder).write(Path(folder) / PAGE)


def make_page(folder: str | Path) -> ResultPage:
    """Return the page of the results in a folder: those of an ensemble, of a posterior, or of any command.

    Raises:
        ValueError: if the folder holds no results.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one that a command wrote its results to")
    records = find_records(folder)
    tables = sorted(_own_files(folder, "*.csv"))
    pictures = sorted(_own_files(folder, "*.png"))
    if not tables and not pictures and not _describe_posteriors(records):
        raise ValueError(f"{folder} holds no results: no table (.csv), no picture (.png) and no posterior")
    reports = [path for path in tables if path.name == "uncertainty.csv"]
    summary, sections, used = benchmark_sections(folder)
    tables = [path for path in tables if path not in used]
    for path in reports:
        summary += summarise_table(path, folder)
        found, own = class_sections(path, folder, len(reports) == 1)
        sections += found
        used |= own
    summary += [*_describe_posteriors(records), *describe_tables(tables, folder)]
    sections += _picture_sections(folder, [path for path in pictures if path not in used])
    shown = [*reports, *([folder / MISTAKES_FOLDER / TABLE] if reports else [])]
    sections += _table_sections(folder, [path for path in tables if path not in shown])
    sections += [how_to_read(_command_names(records)), _made_by(records)]
    return ResultPage(f"{folder.resolve().name}: where does the model not know?" if reports else folder.resolve().name,
                summary, sections)  # fmt: skip


def find_records(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return {path: content} of the records in a folder and below, the oldest first."""
    found = {}
    for path in _own_files(folder, "*.json"):
        content = read_json(path, "a result of a command", REMEDY)
        if isinstance(content, dict) and "command" in content and "revision" in content:
            found[path] = content
    return dict(sorted(found.items(), key=lambda item: str(item[1].get("time", ""))))


def _describe_posteriors(records: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """Return what the records of fits of posteriors say in sentences."""
    return [sentence for record in records.values() for sentence in describe_posterior(record.get("found"))]


def _own_files(folder: Path, pattern: str) -> Iterable[Path]:
    """Yield the files of a folder and below that are results, not parts of ones."""
    for path in folder.rglob(pattern):
        if not any(part.startswith(_APART) for part in path.relative_to(folder).parts[:-1]):
            yield path


def _picture_sections(folder: Path, pictures: Sequence[Path]) -> list[Section]:
    """Return a section for each folder of pictures."""
    groups: dict[Path, list[Path]] = {}
    for path in pictures:
        groups.setdefault(path.parent, []).append(path)
    sections = []
    for parent, own in groups.items():
        blocks: list[Any] = [Picture(path, _caption(path)) for path in own[:MOST_PICTURES]]
        if len(own) > MOST_PICTURES:
            blocks.insert(0, Text(f"The first {MOST_PICTURES} of {len(own)} pictures; the folder holds all."))
        sections.append(Section(_title(folder, parent, "Pictures"), blocks))
    return sections


def _table_sections(folder: Path, tables: Sequence[Path]) -> list[Section]:
    return [Section(_title(folder, path, "Table"), _table(path)) for path in tables]


def _title(folder: Path, path: Path, kind: str) -> str:
    name = path.relative_to(folder).as_posix()
    if name in KNOWN:
        return KNOWN[name]
    return kind if name == "." else f"{kind}: {name}"


def _caption(path: Path) -> str:
    return CAPTIONS.get(path.stem, path.stem.replace("_", " "))


def _table(path: Path) -> list[Any]:
    rows, comments = read_csv(path), read_comments(path)
    if not rows:
        return [Text("The table is empty.")]
    blocks: list[Any] = [PageTable(list(rows[0]), rows[:MOST_ROWS], f"{path.name}, {len(rows)} rows")]
    if len(rows) > MOST_ROWS:
        blocks.append(Text(f"The first {MOST_ROWS} of {len(rows)} rows are shown; the file holds all."))
    if comments and len(comments[0]) <= LONGEST_NOTE:
        blocks.append(Text(comments[0]))
    if comments:
        blocks.append(Code("What the columns are, and what the numbers depend on", "\n".join(comments)))
    return blocks


def _command_names(records: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    return [" ".join(map(str, content["command"])) for content in records.values()]


def _made_by(records: Mapping[Path, Mapping[str, Any]]) -> Section:
    """Return what made the results: commands, versions, settings."""
    if not records:
        return Section("How this was made", [Text("No record lies beside these results.")])
    rows = [
        {
            "time (UTC)": str(content.get("time", ""))[:19].replace("T", " "),
            "made": f"{path.parent.name}/{path.name}",
            "command": shlex.join(_own_words(content["command"])),
            "revision": _FULL_HASH.sub(r"\1", str(content.get("revision", ""))[:48]),
            "versions": ", ".join(f"{name} {value}" for name, value in content.get("versions", {}).items()),
        }
        for path, content in records.items()
    ]
    settings = [
        Code(f"Options and settings of {path.name} in {path.parent.name}", json.dumps(_facts(content), indent=1))
        for path, content in records.items()
    ]
    return Section("How this was made", [PageTable(list(rows[0]), rows, "Commands in the order of time"), *settings])


def _own_words(command: Sequence[Any]) -> list[str]:
    """Return the words of a command as one gives them; `python -m ldm` leaves the name of a file in place of decu."""
    first, *words = map(str, command)
    return ["decu" if first == "__main__.py" else first, *words]


def _facts(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in ("command", "revision", "versions", "time")}
