"""A plan of subsets as words: of each bin its classes and its images, of masked classes what each member sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.own import build_dataset
from ldm.data.subsets import (
    BINNED,
    DATASET_NAMES,
    Subsets,
    class_size_order,
    read_member_subset,
    read_subsets,
    subsets_file,
)

SHOWN_CLASSES = 10  # classes named in a row, at most


def describe_plan(
    folder: str | Path, subsets: Subsets, lists: Mapping[int | None, Tensor], labels: Tensor
) -> list[str]:
    """Return the lines of a plan: where it is, a table of its bins, and the classes that are hidden from members.

    Args:
        folder: where the plan is kept.
        lists: {member: positions of its images}, None standing for the subset without bootstrap.
        labels: the class of every image of the data set [N].
    """
    facts = ", ".join(f"{name} {value}" for name, value in subsets.record.items() if name != "dataset")
    lines = [f"{subsets_file(folder, subsets.dataset_name)}: {subsets.members} members, {facts}"]
    table = _bin_rows(subsets, lists, labels)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    if subsets.dataset_name != BINNED:
        for member, classes in subsets.sees.items():
            hidden = [label for label in range(len(subsets.class_names)) if label not in set(classes)]
            named = _name_some(hidden, subsets.class_names) or "none"
            lines.append(f"  member {member} sees {len(classes)} classes; hidden: {named}")
    return lines


def describe_folder(folder: str | Path) -> list[str]:
    """Return the lines of the plans that a folder holds, counted from its files.

    Raises:
        ValueError: if it holds none, or one that does not name its data set.
    """
    names = [name for name in DATASET_NAMES if subsets_file(folder, name).exists()]
    if not names:
        expected = " or ".join(subsets_file("", name).name for name in DATASET_NAMES)
        raise ValueError(f"{folder} holds no {expected}")
    lines = []
    for name in names:
        subsets = read_subsets(folder, name)
        if "dataset" not in subsets.record:
            raise ValueError(f"{subsets_file(folder, name)} does not name its data set, so its lists cannot be counted")
        dataset: Any = build_dataset(subsets.record["dataset"])
        members = [None, *range(subsets.members)]
        positions = {one: read_member_subset(folder, name, one, dataset)[1] for one in members}
        lines += describe_plan(folder, subsets, positions, dataset.labels)
    return lines


def _name_some(classes: Sequence[int], names: Sequence[str]) -> str:
    """Return the names of the first few classes."""
    more = f" and {len(classes) - SHOWN_CLASSES} more" if len(classes) > SHOWN_CLASSES else ""
    return ", ".join(str(names[label]) for label in classes[:SHOWN_CLASSES]) + more


def _bin_rows(subsets: Subsets, lists: Mapping[int | None, Tensor], labels: Tensor) -> list[list[str]]:
    """Return, of each bin, its classes, images without bootstrap, images per member, and distinct ones."""
    members = [one for one in lists if one is not None]
    table = [["bin", "classes", "images", "per member", "distinct per member", "which"]]
    for size in sorted(set(subsets.bins.values()), key=class_size_order):
        classes = [label for label, value in subsets.bins.items() if value == size]
        in_bin = torch.zeros(len(subsets.class_names), dtype=torch.bool)
        in_bin[classes] = True
        inside = {one: positions[in_bin[labels[positions]]] for one, positions in lists.items()}
        sizes = " ".join(str(len(inside[one])) for one in members)
        distinct = " ".join(str(len(inside[one].unique())) for one in members)
        which = _name_some(classes, subsets.class_names)
        table.append([str(size), str(len(classes)), str(len(inside[None])), sizes, distinct, which])
    return table
