"""What a folder's layout is: how its pictures name classes and splits, and the parameters that read them so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm.data.base import split_positions
from ldm.data.captions import CaptionedFolder
from ldm.data.folder import class_numbers


@dataclass(frozen=True)
class Layout:
    """How a data set names the classes and the splits of its pictures.

    Attributes:
        kind: "class folders", "folders train and val with class folders", "a list", "captions" or "a flat folder",
            and so on, for a reader.
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

    @property
    def captioned(self) -> bool:
        """Whether captions stand for classes."""
        return self.target == name_target(CaptionedFolder)


def name_target(data: type) -> str:
    """Return what a config calls a class of data sets."""
    return f"{data.__module__}.{data.__qualname__}"


def draw_owners(
    paths: Sequence[str], owners: Sequence[str], names: Sequence[str], fraction: float, seeded: str
) -> dict[str, dict[str, str]]:
    """Return {split: {picture: class}} as the data set itself would draw it.

    Args:
        paths: of the pictures [N].
        owners: the class of each [N].
        names: the classes in their order.
        fraction: share of each class for validation.
        seeded: the word that seeds the data set's draw.
    """
    labels = class_numbers(owners, names)
    chosen = {"train": "train", "validation": "test"}
    return {
        part: {paths[one]: owners[one] for one in split_positions(labels, split, fraction, seeded).tolist()}
        for part, split in chosen.items()
    }


def make_drawn_layout(
    kind: str, data: type, names: list[str], shared: dict[str, Any], owners: dict[str, dict[str, str]]
) -> Layout:
    """Return a layout whose splits the data set draws itself.

    Args:
        kind, names, shared, owners: as of `Layout`.
        data: the class of the data set.
    """
    return Layout(kind, name_target(data), names, shared, {"split": "train"}, {"split": "test"}, owners)


def refuse_other_classes(owners: dict[str, dict[str, str]], names: Sequence[str], parts: tuple[str, str]) -> None:
    """Make sure that the split for validation has no classes of its own.

    Raises:
        ValueError: naming them.
    """
    strange = sorted(set(owners["validation"].values()) - set(names))
    if strange:
        raise ValueError(f"{parts[1]} has classes that {parts[0]} has not: {', '.join(strange[:5])}")
