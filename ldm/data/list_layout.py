"""Layouts that a list of pictures gives, or text files beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from ldm.data.captions import CaptionedFolder
from ldm.data.layout_parts import Layout, draw_owners, make_drawn_layout, name_target, refuse_other_classes
from ldm.data.lists import ListedImages, PictureRows, name_parts, order_names


def make_list_layout(
    root: str, file: str | list[str], rows: PictureRows, found: Sequence[str], held_out: float
) -> Layout:
    """Return the layout of a list of classes.

    Args:
        root: folder or .zip.
        file: the list, or several.
        rows: what it says.
        found: all pictures of the root.
        held_out: share of each class for validation, where the list has no splits.

    Raises:
        ValueError: if it has no classes, or its split for validation has others.
    """
    if "label" not in rows.columns:
        raise ValueError(f"{_say(file)} has no column with classes: call it label, for example")
    shared = {"root": root, "file": file}
    labels = rows.columns["label"]
    split = _split_rows(rows, labels)
    if split is None:
        names = order_names(labels)
        owners = draw_owners(rows.paths, labels, names, held_out, "list")
        layout = make_drawn_layout(
            "a list with classes", ListedImages, names, {**shared, "test_fraction": held_out}, owners
        )
        return _leave_out(layout, file, rows, found)
    parts, owners, skipped = split
    names = order_names(list(owners["train"].values()))
    refuse_other_classes(owners, names, parts)
    own = [{"split": part} for part in parts]
    kind, target, shared = "a list with classes and splits", name_target(ListedImages), {**shared, "class_names": names}
    return _leave_out(Layout(kind, target, names, shared, *own, owners, skipped), file, rows, found)


def make_caption_layout(
    root: str, file: str | list[str] | None, rows: PictureRows, found: Sequence[str], held_out: float
) -> Layout:
    """Return the layout of captions in a list, or in text files where `file` is None."""
    captions = rows.columns["caption"]
    names = sorted(set(captions))
    shared = {"root": root} if file is None else {"root": root, "file": file}
    split = _split_rows(rows, captions)
    if split is None:
        owners = draw_owners(rows.paths, captions, names, held_out, "captions")
        layout = make_drawn_layout("captions", CaptionedFolder, names, {**shared, "test_fraction": held_out}, owners)
    else:
        parts, owners, skipped = split
        own = [{"split": part} for part in parts]
        layout = Layout("captions and splits", name_target(CaptionedFolder), names, shared, *own, owners, skipped)
    return _leave_out(layout, file, rows, found)


def _split_rows(
    rows: PictureRows, values: Sequence[str]
) -> tuple[tuple[str, str], dict[str, dict[str, str]], dict[str, str]] | None:
    """Return what a list's splits are called, {split: {picture: value}}, and what is left out; None without splits."""
    splits = rows.columns.get("split", [])
    parts = name_parts(splits)
    if parts is None:
        return None
    owners: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    places = dict(zip(parts, owners, strict=True))
    skipped = {}
    for path, value, split in zip(rows.paths, values, splits, strict=True):
        if split in places:
            owners[places[split]][path] = value
        else:
            skipped[path] = f"of the split {split}, which is neither {parts[0]} nor {parts[1]}"
    return parts, owners, skipped


def _leave_out(layout: Layout, file: str | list[str] | None, rows: PictureRows, found: Sequence[str]) -> Layout:
    """Return a layout that says which files are lists or texts, and which pictures are in none of them."""
    if file is None:
        read = {str(PurePosixPath(path).with_suffix(".txt")) for path in rows.paths}
    else:
        read = {file} if isinstance(file, str) else set(file)
    listed = set(rows.paths)
    missing = {path: f"not in {_say(file)}" for path in found if path not in listed}
    return replace(layout, skipped={**missing, **layout.skipped}, read=frozenset(read))


def _say(file: str | list[str] | None) -> str:
    """Return the name of a list, or of several."""
    return " and ".join([file] if isinstance(file, str) else file or [])
