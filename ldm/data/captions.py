"""Pictures with captions: folders of files, and scikit-learn's digits in styles that a caption names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ldm.data.base import LabelledImages, Transform, check_choice
from ldm.data.digits import Digits
from ldm.data.folder import FileImages
from ldm.data.lists import (
    TEXT_COLUMNS,
    PictureRows,
    choose_part,
    find_lists,
    find_shared_folder,
    name_parts,
    read_picture_rows,
)
from ldm.data.pictures import Files

# Lists of captions that need not be named.
LISTS = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")


class CaptionedFolder(FileImages):
    """Pictures of a folder or a .zip with their captions: items hold `caption` besides those of `FileImages`.

    Captions come from a list with a path and a caption a row, or else from the text file beside each picture, cat1.png
    and cat1.txt. A class is a caption: they are numbered in their order.

    Args:
        root: folder or .zip.
        file: the list, or several, as of `ListedImages`; captions.csv or captions.jsonl (also called metadata) beside
            or above the pictures where not given, and the text files where there is none.
        split: "all", or a split by the word of the list's column `split`, or by the folder of the text file; where
            there are none, "train" or "test", the splits of a fixed draw, which is stratified by caption.
        test_fraction: share of each caption's pictures that is "test", where there are no splits.
        files: further arguments of `FileImages`: image_size, channels, crop, flip, broken, in_memory, transform, seed.

    Raises:
        ValueError: if a picture has no caption, or a list names a picture that is not there.
    """

    def __init__(
        self,
        root: str,
        split: str = "all",
        test_fraction: float = 0.1,
        file: str | Sequence[str] | None = None,
        **files: Any,
    ):
        source = Files(root)
        rows = read_captions(source, file)
        own = rows.columns["caption"]
        captions = sorted(set(own))
        numbers = {caption: number for number, caption in enumerate(captions)}
        labels = torch.tensor([numbers[caption] for caption in own])
        kept = choose_part(rows, labels, split, test_fraction, "captions")
        super().__init__(source, [rows.paths[place] for place in kept], labels[kept], captions, **files)

    def describe(self, index: int) -> dict[str, Any]:
        facts = super().describe(index)
        return {**facts, "caption": self.class_names[facts["class_label"]]}


def read_captions(files: Files, file: str | Sequence[str] | None = None) -> PictureRows:
    """Return the captioned pictures of a folder, sorted by path, with columns `caption` and, if there are, `split`.

    Args:
        files: the folder or .zip.
        file: a list of captions, or several; None: see `CaptionedFolder`.

    Raises:
        ValueError: if a picture has no caption, or a list names a picture that is not there.
    """
    found = files.images()
    if file is None:
        known = (name for name in find_lists(files, found) if PurePosixPath(name).name in LISTS)
        file = next(known, None)
    rows = _read_texts(files, found) if file is None else read_picture_rows(files, file)
    if "caption" not in rows.columns:
        raise ValueError(f"{file} needs a column with captions, called {', '.join(TEXT_COLUMNS)}")
    order = sorted(range(len(rows.paths)), key=rows.paths.__getitem__)
    columns = {name: [values[place] for place in order] for name, values in rows.columns.items()}
    return PictureRows([rows.paths[place] for place in order], columns)


def _read_texts(files: Files, found: Sequence[str]) -> PictureRows:
    """Return the captions in text files beside the pictures, and their splits where the folders at the top are such."""
    texts = {path: str(PurePosixPath(path).with_suffix(".txt")) for path in found}
    read = {path: files.read(text).decode("utf-8-sig").strip() for path, text in texts.items() if files.has(text)}
    missing = [path for path in found if not read.get(path)]
    if missing:
        raise ValueError(
            f"captions and pictures of {files.roots[0]} do not fit together: {len(missing)} pictures without a caption "
            f"({', '.join(missing[:3])})"
        )
    columns = {"caption": [read[path] for path in found]}
    level = len(find_shared_folder(found))
    tops = [PurePosixPath(path).parts[level] if path.count("/") > level else "" for path in found]
    return PictureRows(list(found), columns if name_parts(tops) is None else {**columns, "split": tops})


DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# What a style makes of brightness [0, 1].
STYLES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "handwritten": lambda light: light,
    "bold": lambda light: light**0.35,
    "faint": lambda light: 0.45 * light,
    "inverted": lambda light: 1 - light,
}


def make_caption(style: str, digit: int, count: int = 1, size: str = "") -> str:
    """Return "a bold three", "an inverted three", "two small sevens"; an empty word is left out."""
    word = DIGIT_WORDS[digit]
    if count > 1:
        word += "es" if word.endswith("x") else "s"
    words = [given for given in (size, style, word) if given]
    article = "an" if words[0][0] in "aei" else "a"  # none of the words begins with a spoken o or u
    return " ".join([article if count == 1 else DIGIT_WORDS[count], *words])


class CaptionedDigits(LabelledImages):
    """Scikit-learn's digits, each in every style, with captions such as "a bold three"; classes are words or captions.

    Args:
        split: "train", "test" or "all".
        classes: "words", the ten words of digits, "styles", or "captions", digit by digit in every style.
        styles: of `STYLES`.
        digits: further arguments of `Digits`: image_size, resize, test_fraction, channels.
        transform, seed: see `LabelledImages`.

    Attributes:
        captions: every caption, digit by digit.
    """

    def __init__(
        self,
        split: str = "train",
        classes: str = "words",
        styles: Sequence[str] = tuple(STYLES),
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
        **digits: Any,
    ):
        check_choice("classes", classes, ("words", "styles", "captions"))
        for style in styles:
            check_choice("styles", style, tuple(STYLES))
        self.data = Digits(split, **digits)
        self.styles = tuple(styles)
        self.captions = [make_caption(style, digit) for digit in range(10) for style in styles]
        shown = self.data.labels.repeat_interleave(len(styles))  # [N S], image by image
        caption = shown * len(styles) + torch.arange(len(styles)).repeat(len(self.data))
        self._captions = caption.tolist()
        chosen: dict[str, tuple[Sequence[str], Tensor]] = {
            "words": (DIGIT_WORDS, shown),
            "styles": (self.styles, caption % len(styles)),
            "captions": (self.captions, caption),
        }
        names, labels = chosen[classes]
        super().__init__(labels, names, self.data.image_shape, transform=transform, seed=seed)

    def read(self, index: int) -> Tensor:
        image, style = divmod(index, len(self.styles))
        light = (self.data.read(image) + 1) / 2
        return 2 * STYLES[self.styles[style]](light) - 1

    def describe(self, index: int) -> dict[str, Any]:
        return {**super().describe(index), "caption": self.captions[self._captions[index]]}
