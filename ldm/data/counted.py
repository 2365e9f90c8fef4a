"""Several digits of scikit-learn on one canvas, counted in captions such as "two small sevens"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.data.base import LabelledImages, Transform, by_class, check_choice
from ldm.data.captions import DIGIT_WORDS, STYLES, make_caption
from ldm.data.digits import Digits, enlarge
from ldm.util import generator

CELL_SIDE, CELLS_ACROSS = 8, 2  # pixels of a small digit, and small digits side by side on the canvas
DIGIT_SIZES = ("small", "large")
# Small digits on a canvas of each kind; the last kind is one large digit that fills the canvas.
GROUP_COUNTS = (1, 2, 3, 1)
_MOST = max(GROUP_COUNTS)
# As names of classes: ".." stands for the rest of a caption.
COUNT_NAMES = ("a ..", "two ..", "three ..")
# What a caption says beside the count and the digit.
SAID_WORDS = (("size", "style"), ("size",), ("style",))


class DigitGroup(NamedTuple):
    """What a canvas shows, and what its caption says of it.

    Attributes:
        digit, count, size, style: 0..9, 1..3, of `DIGIT_SIZES`, and of `STYLES`.
        images: number of each digit's picture within the split.
        cells: place of each small digit, row by row.
        says: which of size and style the caption names.
    """

    digit: int
    count: int
    size: str
    style: str
    images: tuple[int, ...]
    cells: tuple[int, ...]
    says: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The caption, "two small sevens" or "a large bold three"."""
        style = self.style if "style" in self.says else ""
        return make_caption(style, self.digit, self.count, self.size if "size" in self.says else "")


class CountedDigits(LabelledImages):
    """One to three small digits of a class, or a large one, on a canvas [16, 16, 1], in every style, with captions.

    A caption says the count and the digit, and the size, the style or both: "two small sevens", "three bold ones",
    "a large inverted four". Each digit of the split begins one canvas a style; what else is on it, and where, is drawn
    once from `seed`.

    Args:
        split: "train", "test" or "all".
        classes: which words of the captions are the classes: "digits", "counts", "sizes" or "styles".
        styles: of `STYLES`.
        transform, seed: see `LabelledImages`.
        digits: further arguments of `Digits`: test_fraction.
    """

    def __init__(
        self,
        split: str = "train",
        classes: str = "digits",
        styles: Sequence[str] = tuple(STYLES),
        transform: Transform | Mapping[str, Any] | None = None,
        seed: int = 0,
        **digits: Any,
    ):
        check_choice("classes", classes, ("digits", "counts", "sizes", "styles"))
        for style in styles:
            check_choice("styles", style, tuple(STYLES))
        self.data = Digits(split, **digits)
        self.styles = tuple(styles)
        count = len(self.data) * len(styles)
        draws = generator("groups of digits", seed, split)
        self._kinds = torch.randint(len(GROUP_COUNTS), (count,), generator=draws)
        self._says = torch.randint(len(SAID_WORDS), (count,), generator=draws)
        self._cells = torch.rand(count, CELLS_ACROSS**2, generator=draws).argsort(1)
        self._others = torch.rand(count, _MOST - 1, generator=draws)
        self._same = by_class(self.data.labels)
        digit = self.data.labels.repeat_interleave(len(styles))
        large = self._kinds == len(GROUP_COUNTS) - 1
        labels: dict[str, tuple[Sequence[str], Tensor]] = {
            "digits": (DIGIT_WORDS, digit),
            "counts": (COUNT_NAMES, torch.tensor(GROUP_COUNTS)[self._kinds] - 1),
            "sizes": (DIGIT_SIZES, large.long()),
            "styles": (self.styles, torch.arange(len(styles)).repeat(len(self.data))),
        }
        names, chosen = labels[classes]
        side = CELLS_ACROSS * CELL_SIDE
        super().__init__(chosen, names, (side, side, 1), transform=transform, seed=seed)

    def group(self, index: int) -> DigitGroup:
        """Return what canvas `index` shows."""
        image, style = divmod(index, len(self.styles))
        kind = int(self._kinds[index])
        digit = int(self.data.labels[image])
        same = self._same[digit]
        others = same[(self._others[index, : GROUP_COUNTS[kind] - 1] * len(same)).long()].tolist()
        cells = self._cells[index, : GROUP_COUNTS[kind]].tolist()
        size = DIGIT_SIZES[kind == len(GROUP_COUNTS) - 1]
        says = SAID_WORDS[int(self._says[index])]
        return DigitGroup(digit, GROUP_COUNTS[kind], size, self.styles[style], (image, *others), tuple(cells), says)

    def read(self, index: int) -> Tensor:
        group = self.group(index)
        lights = (self.data.images[list(group.images)] + 1) / 2  # [count, 8, 8, 1]
        return 2 * STYLES[group.style](place_digits(lights, group.size, group.cells)) - 1

    def describe(self, index: int) -> dict[str, Any]:
        return {**super().describe(index), "caption": self.group(index).caption}


def place_digits(lights: Tensor, size: str, cells: Sequence[int]) -> Tensor:
    """Return a canvas [16, 16, 1] with digits [N, 8, 8, 1] in N of its cells, or with one that fills it."""
    side = CELLS_ACROSS * CELL_SIDE
    if size == "large":
        return enlarge(lights, side, "bilinear")[0]
    canvas = torch.zeros(side, side, 1)
    for light, cell in zip(lights, cells, strict=True):
        top, left = (CELL_SIDE * place for place in divmod(cell, CELLS_ACROSS))
        canvas[top : top + CELL_SIDE, left : left + CELL_SIDE] = light
    return canvas
