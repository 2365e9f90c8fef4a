"""Lists of pictures as people keep them: CSV and JSONL files with a path and a class or a caption in each row."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ldm.data.base import split_positions
from ldm.data.folder import FileImages
from ldm.data.picture_paths import find_pictures
from ldm.data.pictures import Files, hidden

# Names of the columns of a CSV file, or of the keys of a JSONL file; the first that there is counts.
PATH_COLUMNS = (
    "file_name", "file", "path", "image", "filename", "filepath", "image_path", "relpath",
    "img", "img_path", "image_name", "image_file", "image_id", "id",
)  # fmt: skip
TEXT_COLUMNS = ("caption", "text", "prompt")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "class_label")
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
SUFFIXES = (".csv", ".tsv", ".jsonl")
# What the split to train on is called, and those that are held out, the first that there is for validation.
TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("val", "valid", "validation", "dev", "test", "testing")


@dataclass(frozen=True)
class PictureRows:
    """A list of pictures by what its rows say.

    Attributes:
        paths: of the pictures, as they are written [N].
        columns: {"label", "caption" or "split": the values [N]} of the columns that were found.
    """

    paths: list[str]
    columns: dict[str, list[str]]


def read_rows(name: str, content: bytes) -> PictureRows:
    """Read a list of pictures; the name of the file, which ends in .csv, .tsv or .jsonl, says how.

    Raises:
        ValueError: if the file is not of its kind, names no path, or a row lacks a value.
    """
    try:
        rows = _parse(name, content.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{name} is no list of pictures in UTF-8 ({' '.join(SUFFIXES)}): {error}") from error
    keys = list(rows[0]) if rows else []
    wanted = {"path": PATH_COLUMNS, "label": LABEL_COLUMNS, "caption": TEXT_COLUMNS, "split": SPLIT_COLUMNS}
    named = {kind: _find_column(keys, names) for kind, names in wanted.items()}
    if named["path"] is None:
        known = ", ".join(PATH_COLUMNS)
        raise ValueError(f"{name} needs a column with the pictures' paths, called {known}; it has {keys}")
    found = {kind: [_value(name, row, key) for row in rows] for kind, key in named.items() if key is not None}
    return PictureRows(found.pop("path"), found)


def _parse(name: str, text: str) -> list[Mapping[str, Any]]:
    if name.lower().endswith(".jsonl"):
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        wrong = next((row for row in rows if not isinstance(row, dict)), None)
        if wrong is not None:
            raise ValueError(f"{name} must hold an object of keys in each line, and one line holds {wrong!r}")
        return rows
    return list(csv.DictReader(io.StringIO(text), delimiter=_find_delimiter(name, text)))


def _find_delimiter(name: str, text: str) -> str:
    """Return what stands between the columns: a tab in a .tsv, else what is most frequent in the first line."""
    if name.lower().endswith(".tsv"):
        return "\t"
    header = text.partition("\n")[0]
    return max(",;\t", key=header.count)


def _find_column(keys: Sequence[Any], names: Sequence[str]) -> Any:
    known = {str(key).strip().lower(): key for key in keys}
    return next((known[name] for name in names if name in known), None)


def _value(name: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None or not str(value).strip():
        raise ValueError(f"{name} has a row without '{key}': {dict(row)}")
    return str(value).strip()


def order_names(names: Sequence[str]) -> list[str]:
    """Return the different names in their order: numbers by value, else by their letters."""
    different = set(names)
    return sorted(different, key=int) if all(name.isdigit() for name in different) else sorted(different)


def name_parts(names: Iterable[str]) -> tuple[str, str] | None:
    """Return what a data set calls its splits for training and for validation; None where it has no such splits."""
    present = {name.lower(): name for name in names}
    train = next((present[name] for name in TRAIN_NAMES if name in present), None)
    held_out = next((present[name] for name in HELD_OUT_NAMES if name in present), None)
    return None if train is None or held_out is None else (train, held_out)


class ListedImages(FileImages):
    """Pictures whose classes stand in a list: a CSV, TSV or JSONL file with a path and a class in each row.

    Args:
        root: folder or .zip of the pictures.
        file: the list, in the root or elsewhere; or several, whose rows follow one another (`read_picture_rows`).
        split: "all", or a split by the word of the list's column `split`; where it has none, "train" or "test", the
            splits of a fixed stratified draw.
        test_fraction: share of each class that is "test", where the list has no column `split`.
        class_names: the classes in their order, where some may lack images; those of the list where not given.
        files: further arguments of `FileImages`: image_size, channels, crop, flip, broken, in_memory, transform, seed.

    Raises:
        ValueError: if the list has no classes, or names a picture that is not there.
    """

    def __init__(
        self,
        root: str,
        file: str | Sequence[str],
        split: str = "all",
        test_fraction: float = 0.1,
        class_names: Sequence[str] | None = None,
        **files: Any,
    ):
        source = Files(root)
        rows = read_picture_rows(source, file)
        if "label" not in rows.columns:
            raise ValueError(f"{file} has no column with classes, called {', '.join(LABEL_COLUMNS)}")
        own = rows.columns["label"]
        names = list(class_names) if class_names is not None else order_names(own)
        unknown = sorted(set(own) - set(names))
        if unknown:
            raise ValueError(f"{file} names classes that class_names does not have: {', '.join(unknown[:5])}")
        numbers = {name: number for number, name in enumerate(names)}
        labels = torch.tensor([numbers[one] for one in own])
        kept = choose_part(rows, labels, split, test_fraction)
        super().__init__(source, [rows.paths[place] for place in kept], labels[kept], names, **files)


def find_lists(source: Files, found: Sequence[str]) -> list[str]:
    """Return the lists of a folder or a .zip: beside its pictures, above them, or in the folder of a split.

    Args:
        source: the files.
        found: paths of its pictures.

    Returns:
        Paths, those that are least deep first.
    """
    shared = find_shared_folder(found)
    above = {"/".join(shared[:level]) for level in range(len(shared) + 1)}
    lists = []
    for name in source.others():
        place = PurePosixPath(name)
        folder = place.parent if split_word(place.parent.name) else place
        if place.suffix.lower() in SUFFIXES and not hidden(name) and _folder_of(folder, place, above):
            lists.append(name)
    return sorted(lists, key=lambda name: (name.count("/"), name))


def _folder_of(folder: PurePosixPath, place: PurePosixPath, above: set[str]) -> bool:
    """Tell whether a list lies in one of the folders `above`, or in the folder of a split in one of them."""
    return any(("" if str(one.parent) == "." else str(one.parent)) in above for one in (folder, place))


def find_shared_folder(found: Sequence[str]) -> list[str]:
    """Return the parts of the deepest folder that all pictures lie in, at any depth; none where it is the root."""
    shared = []
    for parts in zip(*(PurePosixPath(path).parts[:-1] for path in found), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


def split_word(name: str) -> bool:
    """Tell whether a name is that of a split."""
    return name.lower() in (*TRAIN_NAMES, *HELD_OUT_NAMES)


def find_split_lists(lists: Sequence[str]) -> list[str]:
    """Return the lists for training and for validation, as train.csv and val.csv or train/metadata.jsonl and val/...

    None where there are no two such.
    """
    words = {_split_of(name): name for name in reversed(lists)}
    parts = name_parts(word for word in words if word)
    return [] if parts is None else [words[part] for part in parts]


def _split_of(name: str) -> str:
    """Return the split that a list is of by its own name or its folder's; "" for none."""
    place = PurePosixPath(name)
    return next((word for word in (place.stem, place.parent.name) if split_word(word)), "")


def read_picture_rows(source: Files, file: str | Sequence[str]) -> PictureRows:
    """Read a list that lies beside the pictures, or elsewhere, with the paths of its pictures below the root.

    Of several lists the rows follow one another; one without a column `split` is of the split that its name or its
    folder's says, as train.csv and val.csv are.

    Raises:
        ValueError: if it is not there, cannot be read as one, or names a picture that is not there or twice.
    """
    if not isinstance(file, str):
        return _join([_read_one(source, one) for one in file], file)
    return _read_one(source, file)


def _read_one(source: Files, file: str) -> PictureRows:
    rows = read_list_rows(source, file)
    return PictureRows(find_pictures(source, file, rows.paths), rows.columns)


def read_list_rows(source: Files, file: str) -> PictureRows:
    """Read a list that lies beside the pictures, or elsewhere; its paths are as they are written.

    Raises:
        ValueError: if it is not there, or cannot be read as one.
    """
    if source.has(file):
        return read_rows(file, source.read(file))
    if not Path(file).is_file():
        raise ValueError(f"there is no list {file}, neither in {source.roots[0]} nor as a path of its own")
    return read_rows(file, Path(file).read_bytes())


def _join(lists: Sequence[PictureRows], files: Sequence[str]) -> PictureRows:
    """Return the rows of several lists as those of one."""
    paths: list[str] = []
    columns: dict[str, list[str]] = {}
    for rows, file in zip(lists, files, strict=True):
        word = _split_of(file)
        own = {"split": [word] * len(rows.paths), **rows.columns} if word else rows.columns
        if columns and set(own) != set(columns):
            raise ValueError(f"{file} has other columns than {files[0]}: {sorted(own)} and {sorted(columns)}")
        paths += rows.paths
        columns = {name: [*columns.get(name, ()), *values] for name, values in own.items()}
    path, times = Counter(paths).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{', '.join(files)} name the picture {path} {times} times")
    return PictureRows(paths, columns)


def choose_part(
    rows: PictureRows, labels: torch.Tensor, split: str, test_fraction: float, seeded: str = "list"
) -> list[int]:
    """Return the places of a split: of the list's own split where it has one, else of a fixed stratified one.

    Raises:
        ValueError: if the list's own split does not have it.
    """
    if split == "all" or "split" not in rows.columns:
        return split_positions(labels, split, test_fraction, seeded).tolist()
    kept = [place for place, part in enumerate(rows.columns["split"]) if part == split]
    if not kept:
        raise ValueError(
            f"the list's splits are {', '.join(sorted(set(rows.columns['split'])))}; none of them is {split}"
        )
    return kept
