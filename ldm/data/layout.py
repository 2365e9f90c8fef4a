"""How a folder of pictures names its classes and splits, and the data set that reads it so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ldm.data.captions import read_captions
from ldm.data.folder import ONE_CLASS, ImageFolder, parse_class, refuse_other_levels
from ldm.data.layout_parts import Layout, draw_owners, make_drawn_layout, name_target, refuse_other_classes
from ldm.data.list_layout import make_caption_layout, make_list_layout
from ldm.data.lists import (
    find_lists,
    find_shared_folder,
    find_split_lists,
    name_parts,
    read_list_rows,
    read_picture_rows,
)
from ldm.data.pictures import Files
from ldm.wording import count_noun

TEST_FRACTION = 0.1


def find_picture_layout(
    root: str, classes_from: str | None = None, depth: int = 1, held_out: float = TEST_FRACTION
) -> Layout:
    """Find how a folder or a .zip names classes and splits.

    In this order: the list `classes_from`; a list of classes or captions beside the pictures or above them, or two
    such for training and validation; text files beside the pictures; folders train and val (or valid, validation, dev,
    test); class folders; a flat folder, which is one class. All of these may lie in one folder together, as in a .zip
    of a folder.

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
    if classes_from:
        return make_list_layout(root, classes_from, read_picture_rows(files, classes_from), found, held_out)
    useless: dict[str, str] = {}  # list: why
    lists = [name for name in find_lists(files, found) if _says_something(files, name, useless)]
    if lists:
        file = find_split_lists(lists) or lists[0]
        rows = read_picture_rows(files, file)
        make = make_list_layout if "label" in rows.columns else make_caption_layout
        return _skip(make(root, file, rows, found, held_out), useless)
    if _texts_beside(files, found):
        rows = read_captions(files)
        return _skip(make_caption_layout(root, None, rows, found, held_out), useless)
    layout = _foldered(root, found, depth, held_out)
    if useless and len(layout.class_names) == 1:
        raise ValueError(next(iter(useless.values())))
    return _skip(layout, useless)


def _says_something(files: Files, name: str, useless: dict[str, str]) -> bool:
    """Tell whether a list says classes or captions of pictures; where it does not, keep the reason."""
    try:
        rows = read_list_rows(files, name)
        if {"label", "caption"} & set(rows.columns):
            return True
        useless[name] = f"{name} names pictures, but has no column with classes: call it label, or caption for texts"
    except ValueError as error:
        useless[name] = str(error)
    return False


def _skip(layout: Layout, useless: dict[str, str]) -> Layout:
    """Return a layout that says of lists which it does not use that they are skipped."""
    skipped = dict.fromkeys(useless, "no list of pictures with classes or captions")
    return replace(layout, skipped={**layout.skipped, **skipped})


def _foldered(root: str, found: Sequence[str], depth: int, held_out: float) -> Layout:
    """Return the layout of pictures whose folders name classes and splits."""
    around = _find_folder_around(found, depth, root)
    level = len(PurePosixPath(around).parts)
    tops = Counter(_folder_at(path, level) for path in found)
    flat = tops.pop("", 0)
    parts = name_parts(tops)
    if parts is not None:
        inside = [path for path in found if _folder_at(path, level) in parts]
        classed = {_folder_at(path, level) for path in inside if _folder_at(path, level + 1)}
        if classed == {parts[0]}:
            return _without_part(root, found, parts[1], depth, held_out, level)
        if classed:
            _refuse_loose(root, [path for path in inside if not _folder_at(path, level + 1)])
        return _parted(root, found, parts, depth, around)
    if not tops:
        return _flat(root, found, held_out)
    if flat:
        _refuse_loose(root, [path for path in found if not _folder_at(path, level)])
    return _class_folders(root, found, depth, held_out, around)


def _without_part(root: str, found: Sequence[str], part: str, depth: int, held_out: float, level: int) -> Layout:
    """Return the layout of the pictures but for those of a split that names no classes."""
    left = {path: f"in {part}, which has no class folders" for path in found if _folder_at(path, level) == part}
    layout = _foldered(root, [path for path in found if path not in left], depth, held_out)
    return replace(layout, skipped={**layout.skipped, **left})


def _refuse_loose(root: str, loose: Sequence[str]) -> None:
    """Make sure that no pictures lie beside class folders.

    Raises:
        ValueError: naming one.
    """
    if loose:
        raise ValueError(
            f"{root} holds {count_noun(len(loose), 'picture')} beside class folders, {loose[0]} for example: move such "
            "into folders of their classes, or give a list with --classes_from"
        )


def _folder_at(path: str, level: int) -> str:
    """Return the folder of a path after so many levels; "" where the file itself lies there."""
    folders = PurePosixPath(path).parts[:-1]
    return folders[level] if len(folders) > level else ""


def _find_folder_around(found: Sequence[str], depth: int, root: str) -> str:
    """Return the folder that all pictures lie in folders of, as in a .zip of one folder; "" where there is none.

    Classes named by several levels are looked for in it in a .zip alone, whose one folder is its own.
    """
    shared = find_shared_folder(found)
    levels = min(len(PurePosixPath(path).parts) - 1 for path in found)
    if depth > 1 and (Path(root).is_dir() or levels < len(shared) + depth):
        return ""
    return "/".join(shared) if any(_folder_at(path, len(shared)) for path in found) else ""


def _texts_beside(files: Files, found: Sequence[str]) -> bool:
    """Tell whether most pictures have a text file of their name."""
    sample = found[:: max(1, len(found) // 20)]
    return sum(files.has(str(PurePosixPath(path).with_suffix(".txt"))) for path in sample) > len(sample) / 2


def _class_folders(root: str, found: Sequence[str], depth: int, held_out: float, around: str) -> Layout:
    level = len(PurePosixPath(around).parts)
    owners = [parse_class(path, level, depth) for path in found]
    refuse_other_levels(found, owners, level, depth)
    inside = {"folder": around} if around else {}
    shared = {"root": root, **inside, "depth": depth, "test_fraction": held_out}
    names = sorted(set(owners))
    kind = f"class folders in {around}" if around else "class folders"
    return make_drawn_layout(kind, ImageFolder, names, shared, draw_owners(found, owners, names, held_out, "folder"))


def _flat(root: str, found: Sequence[str], held_out: float) -> Layout:
    names, shared = [ONE_CLASS], {"root": root, "depth": 0, "test_fraction": held_out}
    owners = draw_owners(found, names * len(found), names, held_out, "folder")
    return make_drawn_layout("a flat folder", ImageFolder, names, shared, owners)


def _parted(root: str, found: Sequence[str], parts: tuple[str, str], depth: int, around: str) -> Layout:
    owners, skipped = {"train": {}, "validation": {}}, {}  # type: ignore[var-annotated]
    places = dict(zip(parts, owners, strict=True))
    level = len(PurePosixPath(around).parts)
    inside = [path for path in found if _folder_at(path, level) in parts]
    flat = not any(_folder_at(path, level + 1) for path in inside)
    depth = 0 if flat else depth
    for path in found:
        top = _folder_at(path, level)
        if top in places:
            owners[places[top]][path] = parse_class(path, level + 1, depth)
        else:
            skipped[path] = f"in {top or 'no folder'}, which is neither {parts[0]} nor {parts[1]}"
    names = sorted(set(owners["train"].values()))
    refuse_other_classes(owners, names, parts)
    shared = {"root": root, "depth": depth, "class_names": names}
    kind = f"folders {parts[0]} and {parts[1]} " + ("of one class" if flat else "with class folders")
    kind += f" in {around}" if around else ""
    own = [{"folder": f"{around}/{part}" if around else part} for part in parts]
    return Layout(kind, name_target(ImageFolder), names, shared, *own, owners, skipped)
