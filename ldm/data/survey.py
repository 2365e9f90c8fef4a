"""What lies in a folder of pictures, before training: layout, classes, counts, sizes, and what is skipped and why."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ldm.data.decoding import open_picture
from ldm.data.layout_parts import Layout
from ldm.data.lists import split_word
from ldm.data.pictures import UNREADABLE, Files, decode, hidden
from ldm.wording import count_noun

# Modes of Pillow without colour.
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")


@dataclass(frozen=True)
class Copies:
    """How many pictures are the same file as an earlier one.

    Attributes:
        inside: as one of their class and split.
        across_splits: as one of their class in the other split.
        across_classes: as one of another class.
    """

    inside: int = 0
    across_splits: int = 0
    across_classes: int = 0

    def describe(self) -> list[str]:
        """Return what to say of them."""
        kinds = {
            "of the same class": self.inside,
            "for training, so that validation knows it": self.across_splits,
            "of another class, so that no model can tell them apart": self.across_classes,
        }
        return [
            f"{count_noun(number, 'picture is', 'pictures are')} the same file as one {kind}"
            for kind, number in kinds.items()
            if number
        ]


@dataclass(frozen=True)
class Survey:
    """What was found of a data set.

    Attributes:
        root: folder or .zip.
        layout: how it names classes and splits.
        sizes: (width, height) of each picture that can be read.
        grey: how many pictures are without colour.
        transparent: how many have transparency.
        skipped: {path: why} of files that are no pictures, or cannot be read.
        broken: how many pictures cannot be read.
        copies: how many pictures are the same file as another one.
    """

    root: str
    layout: Layout
    sizes: list[tuple[int, int]]
    grey: int
    transparent: int
    skipped: dict[str, str]
    broken: int = 0
    copies: Copies = Copies()

    @property
    def class_names(self) -> list[str]:
        """The classes in their order."""
        return self.layout.class_names

    @property
    def channels(self) -> int:
        """1 where every picture is grey, 3 otherwise."""
        return 1 if self.grey == len(self.sizes) else 3

    def counts(self, part: str) -> dict[str, int]:
        """Return {class: pictures} of "train" or "validation", in the order of the classes."""
        found = Counter(owner for path, owner in self.layout.owners[part].items() if path not in self.skipped)
        return {name: found.get(name, 0) for name in self.class_names}

    def total(self, part: str) -> int:
        """Return the number of pictures of a split."""
        return sum(self.counts(part).values())

    def describe(self) -> list[str]:
        """Return what was found in lines: layout, a row a class, sizes, and what was skipped and why."""
        train, held = self.counts("train"), self.counts("validation")
        widest = max(len(name) for name in self.class_names)
        lines = [
            f"{self.root}: {self.layout.kind}, {count_noun(len(self.class_names), 'class', 'classes')}, "
            f"{self.total('train')} pictures to train on and {self.total('validation')} for validation",
            f"  {'class':{widest}}  train  validation",
        ]
        ordered = sorted(self.class_names, key=lambda name: -train[name])
        shown = ordered if len(ordered) <= 40 else [*ordered[:20], *ordered[-20:]]
        lines += [f"  {name:{widest}}  {train[name]:5d}  {held[name]:10d}" for name in shown]
        if len(shown) < len(ordered):
            lines.append(f"  ({len(ordered) - len(shown)} classes between the 20th and the 20th last are not shown)")
        return [*lines, *self._describe_pictures(), *self._describe_skipped()]

    def _describe_pictures(self) -> list[str]:
        sides = np.array(self.sizes)
        shortest = sides.min(1)
        low, middle, high = np.percentile(shortest, [0, 50, 100]).astype(int)
        square = int((sides[:, 0] == sides[:, 1]).sum())
        colour = "grey" if self.channels == 1 else "colour"
        lines = [
            f"  shortest sides {low} to {high} pixels, median {middle}; {square} of {len(sides)} are square; {colour}",
        ]
        if self.channels == 3 and self.grey:
            lines.append(f"  {count_noun(self.grey, 'picture is', 'pictures are')} grey, and read as colour")
        if self.transparent:
            lines.append(f"  {count_noun(self.transparent, 'picture has', 'pictures have')} transparency")
        return lines

    def _describe_skipped(self) -> list[str]:
        if not self.skipped:
            return ["  nothing was skipped"]
        lines = [f"  skipped {count_noun(len(self.skipped), 'file', 'files')}:"]
        for reason, count in Counter(self.skipped.values()).most_common():
            example = next(path for path, why in self.skipped.items() if why == reason)
            lines.append(f"    {count} x {reason}, {example} for example")
        return lines

    def warnings(self, size: int) -> list[str]:
        """Return what somebody who trains pictures of this size should know: small pictures, classes without any."""
        train, held = self.counts("train"), self.counts("validation")
        found = self._suggest_depth()
        small = sum(min(sides) < size for sides in self.sizes)
        if small:
            found.append(f"{small} of {len(self.sizes)} pictures are smaller than {size} pixels and are enlarged")
        rare = [name for name in self.class_names if train[name] < 10]
        if rare:
            has = count_noun(len(rare), "class has", "classes have")
            found.append(f"{has} fewer than 10 pictures to train on: {', '.join(rare[:8])}")
        found += self.copies.describe()
        absent = [name for name in self.class_names if not held[name]]
        if len(absent) == len(self.class_names):
            found.append("there is no picture for validation, so that no loss is measured on pictures not trained on")
        elif absent:
            found.append(
                f"{count_noun(len(absent), 'class has', 'classes have')} no picture for validation: "
                f"{', '.join(absent[:8])}"
            )
        return found

    def _suggest_depth(self) -> list[str]:
        """Return what to say where every picture lies in one more level of folders than those that name classes."""
        layout = self.layout
        depth = layout.shared.get("depth", 0)
        if not depth:
            return []
        above = depth + len(PurePosixPath({**layout.shared, **layout.train}.get("folder", "")).parts)
        below = {PurePosixPath(path).parts[above:-1] for owned in layout.owners.values() for path in owned}
        deeper = {
            "/".join(PurePosixPath(path).parts[above - depth : above + 1])
            for owned in layout.owners.values()
            for path in owned
        }
        if () in below or len(deeper) <= len(self.class_names):
            return []
        inner = {PurePosixPath(one).name for one in deeper}
        if all(split_word(name) for name in inner):
            return [
                f"folders {', '.join(sorted(inner))} inside class folders are not read as splits: put {min(inner)} "
                "above the classes, or give a list with a column split by --classes_from"
            ]
        return [
            f"every picture lies in a folder inside its class's, {min(deeper)} for example: where these are the "
            f"classes, {len(deeper)} in all, add --depth {depth + 1}"
        ]


def survey_pictures(root: str, layout: Layout, progress: Any = None) -> Survey:
    """Open every picture of a data set, and say what was found.

    Args:
        root: folder or .zip.
        layout: how it names classes and splits (`find_picture_layout`).
        progress: a wrapper of the list of paths that shows how far it is, tqdm for example.

    Raises:
        ValueError: if no picture can be read.
    """
    files = Files(root)
    files.images()
    paths = [path for part in layout.owners.values() for path in part]
    skipped = {name: _say_why(name) for name in files.others()}
    skipped |= layout.skipped
    skipped = {name: why for name, why in skipped.items() if name not in layout.read}
    sizes, grey, transparent, broken = [], 0, 0, 0
    content_of: dict[str, bytes] = {}
    for path in _shown(paths, progress):
        try:
            content = files.read(path)
            decode(content, 3)
            content_of[path] = hashlib.sha256(content).digest()
            with open_picture(io.BytesIO(content)) as image:
                sizes.append(image.size)
                grey += image.mode in GREY_MODES
                transparent += "A" in image.mode or "transparency" in image.info
        except UNREADABLE as error:
            skipped[path] = f"cannot be read ({type(error).__name__})"
            broken += 1
    if not sizes:
        raise ValueError(f"none of the {len(paths)} pictures of {root} can be read")
    copies = _count_copies(layout, content_of)
    return Survey(root, layout, sizes, grey, transparent, skipped, broken, copies)


def _count_copies(layout: Layout, content_of: Mapping[str, bytes]) -> Copies:
    """Compare each picture with the first that holds the same, training first.

    Args:
        layout: whose pictures they are.
        content_of: {path: a hash of what the file holds} of those that can be read.
    """
    first: dict[bytes, tuple[str, str]] = {}  # split and class
    found: Counter[str] = Counter()
    for part, owned in layout.owners.items():
        for path, owner in owned.items():
            content = content_of.get(path)
            if content is None:
                continue
            if content not in first:
                first[content] = (part, owner)
            elif first[content][1] != owner:
                found["across_classes"] += 1
            else:
                found["inside" if first[content][0] == part else "across_splits"] += 1
    return Copies(**found)


def _say_why(name: str) -> str:
    """Return why a file is not taken for a picture."""
    if hidden(name):
        return "hidden, or left by a system"
    return f"no picture ({PurePosixPath(name).suffix or 'without an ending'})"


def _shown(paths: Sequence[str], progress: Any) -> Iterable[str]:
    return paths if progress is None else progress(paths)
