"""How a folder of pictures names its classes and splits, and the data set that reads it so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from ldm.data.base import split_positions
from ldm.data.captions import LISTS as CAPTION_LISTS
from ldm.data.captions import CaptionedFolder, read_captions
from ldm.data.folder import ONE_CLASS, ImageFolder, class_numbers, parse_class, refuse_other_levels
from ldm.data.lists import SUFFIXES, ListedImages, PictureRows, check_paths, name_parts, order_names, read_picture_rows
from ldm.data.pictures import Files

TEST_FRACTION = 0.1


@dataclass(frozen=True)
class Layout:
    """How a data set names the classes and the splits of its pictures.

    Attributes:
        kind: "class folders", "folders train and val with class folders", "a list", "captions" or "a flat folder".
        target: the class of the data set that reads it.
        class_names: the classes in the data set's order.
        shared: parameters of both splits.
        train: further parameters of the split to train on.
        validation: further parameters of the split for validation.
        owners: {"train" or "validation": class of each picture by its path}.
        skipped: {path: why} of pictures that belong to no split.
        read: files that are no pictures, but say what those are.
    """

    kind: str
    target: str
    class_names: list[str]
    shared: dict[str, Any]
    train: dict[str, Any]
    validation: dict[str, Any]
    owners: dict[str, dict[str, str]]
    skipped: dict[str, str] = field(default_factory=dict)
    read: frozenset[str] = frozenset()


def find_picture_layout(
    root: str, classes_from: str | None = None, depth: int = 1, held_out: float = TEST_FRACTION
) -> Layout:
    """Find how a folder or a .zip names classes and splits.

    In this order: the list `classes_from`; a list or captions at the root; folders train and val (or valid,
    validation, dev, test) that hold class folders; class folders; a flat folder, which is one class. Class folders, and
    train and val, may lie in one folder together, as in a .zip of a folder.

    Args:
        root: folder or .zip.
        classes_from: a CSV, TSV or JSONL file with a path and a class in each row.
        depth: how many levels of folders name a class.
        held_out: share of each class for validation, where the data have no splits of their own.

    Raises:
        ValueError: if there are no pictures, or some lie beside class folders without a class.
    """
    files = Files(root)
    found = files.images()
    lists = [classes_from] if classes_from else [name for name in files.others() if _at_root(name, SUFFIXES)]
    for name in lists:
        rows = read_picture_rows(files, name)
        if "label" in rows.columns or classes_from:
            return _listed(files, root, name, rows, found, held_out)
    if any(files.has(name) for name in CAPTION_LISTS) or _texts_beside(files, found):
        return _captioned(files, root, found, held_out)
    around = _find_folder_around(found) if depth == 1 else ""
    level = len(PurePosixPath(around).parts)
    tops = Counter(PurePosixPath(path).parts[level] if "/" in path else "" for path in found)
    flat = tops.pop("", 0)
    parts = name_parts(tops)
    if parts is not None:
        return _parted(root, found, parts, depth, around)
    if not tops:
        return _flat(root, found, held_out)
    if flat:
        loose = [path for path in found if "/" not in path]
        raise ValueError(
            f"{root} holds {len(loose)} pictures beside {len(tops)} class folders, {loose[0]} for example: move them "
            "into folders of their classes, or give a list with --classes_from"
        )
    return _class_folders(root, found, depth, held_out, around)


def _find_folder_around(found: Sequence[str]) -> str:
    """Return the folder that all pictures lie in folders of, as in a .zip of one folder; "" where there is none."""
    shared = []
    for parts in zip(*(PurePosixPath(path).parts[:-1] for path in found), strict=False):
        if len(set(parts)) > 1:
            return "/".join(shared)
        shared.append(parts[0])
    return ""


def _at_root(name: str, suffixes: Sequence[str]) -> bool:
    return "/" not in name and name.lower().endswith(tuple(suffixes))


def _texts_beside(files: Files, found: Sequence[str]) -> bool:
    """Tell whether most pictures have a text file of their name."""
    sample = found[:: max(1, len(found) // 20)]
    return sum(files.has(str(PurePosixPath(path).with_suffix(".txt"))) for path in sample) > len(sample) / 2


def _name_of(data: type) -> str:
    return f"{data.__module__}.{data.__qualname__}"


def _halves(
    paths: Sequence[str], owners: Sequence[str], names: Sequence[str], fraction: float, seeded: str
) -> dict[str, dict[str, str]]:
    """Return the splits that the data set itself would draw."""
    labels = class_numbers(owners, names)
    chosen = {"train": "train", "validation": "test"}
    return {
        part: {paths[one]: owners[one] for one in split_positions(labels, split, fraction, seeded).tolist()}
        for part, split in chosen.items()
    }


def _drawn(
    kind: str, data: type, names: list[str], shared: dict[str, Any], owners: dict[str, dict[str, str]]
) -> Layout:
    return Layout(kind, _name_of(data), names, shared, {"split": "train"}, {"split": "test"}, owners)


def _class_folders(root: str, found: Sequence[str], depth: int, held_out: float, around: str) -> Layout:
    level = len(PurePosixPath(around).parts)
    owners = [parse_class(path, level, depth) for path in found]
    refuse_other_levels(found, owners, level, depth)
    inside = {"folder": around} if around else {}
    shared = {"root": root, **inside, "depth": depth, "test_fraction": held_out}
    names = sorted(set(owners))
    kind = f"class folders in {around}" if around else "class folders"
    return _drawn(kind, ImageFolder, names, shared, _halves(found, owners, names, held_out, "folder"))


def _flat(root: str, found: Sequence[str], held_out: float) -> Layout:
    names, shared = [ONE_CLASS], {"root": root, "depth": 0, "test_fraction": held_out}
    owners = _halves(found, names * len(found), names, held_out, "folder")
    return _drawn("a flat folder", ImageFolder, names, shared, owners)


def _parted(root: str, found: Sequence[str], parts: tuple[str, str], depth: int, around: str) -> Layout:
    owners, skipped = {"train": {}, "validation": {}}, {}  # type: ignore[var-annotated]
    places = dict(zip(parts, owners, strict=True))
    level = len(PurePosixPath(around).parts)
    for path in found:
        top = PurePosixPath(path).parts[level]
        if top in places:
            owners[places[top]][path] = parse_class(path, level + 1, depth)
        else:
            skipped[path] = f"in {top}, which is neither {parts[0]} nor {parts[1]}"
    names = sorted(set(owners["train"].values()))
    strange = sorted(set(owners["validation"].values()) - set(names))
    if strange:
        raise ValueError(f"{parts[1]} has classes that {parts[0]} has not: {', '.join(strange[:5])}")
    shared = {"root": root, "depth": depth, "class_names": names}
    kind = f"folders {parts[0]} and {parts[1]} with class folders" + (f" in {around}" if around else "")
    own = [{"folder": f"{around}/{part}" if around else part} for part in parts]
    return Layout(kind, _name_of(ImageFolder), names, shared, *own, owners, skipped)


def _listed(files: Files, root: str, name: str, rows: PictureRows, found: Sequence[str], held_out: float) -> Layout:
    if "label" not in rows.columns:
        raise ValueError(f"{name} has no column with classes: call it label, for example")
    check_paths(files, name, rows.paths)
    listed = set(rows.paths)
    skipped = {path: f"not in {name}" for path in found if path not in listed}
    shared = {"root": root, "file": name}
    labels = rows.columns["label"]
    parts = name_parts(rows.columns.get("split", ()))
    if parts is None:
        names = order_names(labels)
        owners = _halves(rows.paths, labels, names, held_out, "list")
        shared["test_fraction"] = held_out
        layout = _drawn("a list with classes", ListedImages, names, shared, owners)
        return replace(layout, skipped=skipped, read=frozenset([name]))
    owners = {"train": {}, "validation": {}}
    places = dict(zip(parts, owners, strict=True))
    for path, label, split in zip(rows.paths, labels, rows.columns["split"], strict=True):
        if split in places:
            owners[places[split]][path] = label
        else:
            skipped[path] = f"of the split {split}, which is neither {parts[0]} nor {parts[1]}"
    names = order_names(list(owners["train"].values()))
    shared["class_names"] = names
    own = [{"split": part} for part in parts]
    kind, read = "a list with classes and splits", frozenset([name])
    return Layout(kind, _name_of(ListedImages), names, shared, *own, owners, skipped, read)


def _captioned(files: Files, root: str, found: Sequence[str], held_out: float) -> Layout:
    captions = read_captions(files)
    names = sorted(set(captions.values()))
    owners = _halves(list(captions), list(captions.values()), names, held_out, "captions")
    layout = _drawn("captions", CaptionedFolder, names, {"root": root, "test_fraction": held_out}, owners)
    texts = {*CAPTION_LISTS, *(str(PurePosixPath(path).with_suffix(".txt")) for path in captions)}
    skipped = {path: "without a caption" for path in found if path not in captions}
    return replace(layout, skipped=skipped, read=frozenset(texts))
