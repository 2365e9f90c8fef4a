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

CELL, ACROSS = 8, 2  # pixels of a small digit, and small digits side by side on the canvas
SIZES = ("small", "large")
# Small digits on a canvas of each kind; the last kind is one large digit that fills the canvas.
KINDS = (1, 2, 3, 1)
MOST = max(KINDS)
# As names of classes: ".." stands for the rest of a caption.
COUNT_NAMES = ("a ..", "two ..", "three ..")
# What a caption says beside the count and the digit.
SAYS = (("size", "style"), ("size",), ("style",))


class Group(NamedTuple):
    """What a canvas shows, and what its caption says of it.

    Attributes:
        digit, count, size, style: 0..9, 1..3, of `SIZES`, and of `STYLES`.
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
        self._kinds = torch.randint(len(KINDS), (count,), generator=draws)
        self._says = torch.randint(len(SAYS), (count,), generator=draws)
        self._cells = torch.rand(count, ACROSS**2, generator=draws).argsort(1)
        self._others = torch.rand(count, MOST - 1, generator=draws)
        self._same = by_class(self.data.labels)
        digit = self.data.labels.repeat_interleave(len(styles))
        large = self._kinds == len(KINDS) - 1
        labels: dict[str, tuple[Sequence[str], Tensor]] = {
            "digits": (DIGIT_WORDS, digit),
            "counts": (COUNT_NAMES, torch.tensor(KINDS)[self._kinds] - 1),
            "sizes": (SIZES, large.long()),
            "styles": (self.styles, torch.arange(len(styles)).repeat(len(self.data))),
        }
        names, chosen = labels[classes]
        side = ACROSS * CELL
        super().__init__(chosen, names, (side, side, 1), transform=transform, seed=seed)

    def group(self, index: int) -> Group:
        """Return what canvas `index` shows."""
        image, style = divmod(index, len(self.styles))
        kind = int(self._kinds[index])
        digit = int(self.data.labels[image])
        same = self._same[digit]
        others = same[(self._others[index, : KINDS[kind] - 1] * len(same)).long()].tolist()
        cells = self._cells[index, : KINDS[kind]].tolist()
        size = SIZES[kind == len(KINDS) - 1]
        says = SAYS[int(self._says[index])]
        return Group(digit, KINDS[kind], size, self.styles[style], (image, *others), tuple(cells), says)

    def read(self, index: int) -> Tensor:
        group = self.group(index)
        lights = (self.data.images[list(group.images)] + 1) / 2  # [count, 8, 8, 1]
        return 2 * STYLES[group.style](place_digits(lights, group.size, group.cells)) - 1

    def describe(self, index: int) -> dict[str, Any]:
        return {**super().describe(index), "caption": self.group(index).caption}


def place_digits(lights: Tensor, size: str, cells: Sequence[int]) -> Tensor:
    """Return a canvas [16, 16, 1] with digits [N, 8, 8, 1] in N of its cells, or with one that fills it."""
    side = ACROSS * CELL
    if size == "large":
        return enlarge(lights, side, "bilinear")[0]
    canvas = torch.zeros(side, side, 1)
    for light, cell in zip(lights, cells, strict=True):
        top, left = (CELL * place for place in divmod(cell, ACROSS))
        canvas[top : top + CELL, left : left + CELL] = light
    return canvas
