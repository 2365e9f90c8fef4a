"""Do pictures of digits show what their captions ask for? Recognition cell by cell, by nearest training pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.data.captions import STYLES, CaptionedDigits, make_caption
from ldm.data.counted import CELL_SIDE, DIGIT_SIZES, GROUP_COUNTS, CountedDigits, place_digits
from ldm.records import Row

NEIGHBOURS = 3
_BLANK = 10


@dataclass(frozen=True)
class Shown:
    """What is on a canvas, or should be: digit 0..9, how many, of `DIGIT_SIZES` and `STYLES`; None: anything."""

    digit: int | None
    count: int
    size: str | None
    style: str | None

    def agrees(self, asked: Shown) -> bool:
        """Whether this is what was asked for."""
        pairs = ((self.digit, asked.digit), (self.size, asked.size), (self.style, asked.style))
        return self.count == asked.count and all(wanted in (None, own) for own, wanted in pairs)


@dataclass(frozen=True)
class _References:
    """Pictures [K, D] in [-1, 1] with their digits [K], `_BLANK` for none, and the places of their styles [K]."""

    pictures: Tensor
    digits: Tensor
    styles: Tensor

    def find(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return squared distance [B], digit [B] and style [B] of pictures [B, D] by their nearest neighbours."""
        distances, near = torch.cdist(pictures, self.pictures).topk(NEIGHBOURS, largest=False)
        return distances[:, 0] ** 2, self.digits[near].mode(1).values, self.styles[near[:, 0]]


@dataclass
class CanvasClassifier:
    """Three nearest neighbours in each cell, and of the whole canvas for a large digit; the nearer of the two counts.

    Args:
        data: the training pictures; those of `CaptionedDigits` are one cell.
    """

    data: CountedDigits | CaptionedDigits
    _small: _References = field(init=False)
    _large: _References = field(init=False)

    def __post_init__(self) -> None:
        lights = (self.data.data.images + 1) / 2  # [N, 8, 8, 1]
        large = torch.stack([place_digits(one[None], "large", (0,)) for one in lights])
        blank = torch.zeros(NEIGHBOURS, CELL_SIDE, CELL_SIDE, 1)
        labels = self.data.data.labels
        with_blank = torch.cat([labels, torch.full((NEIGHBOURS,), _BLANK)])
        self._small = self._in_styles(torch.cat([lights, blank]), with_blank)
        self._large = self._in_styles(large, labels)

    def _in_styles(self, lights: Tensor, digits: Tensor) -> _References:
        styled = torch.stack([2 * STYLES[name](lights) - 1 for name in self.data.styles])  # [S, N, h, w, 1]
        styles = torch.arange(len(self.data.styles)).repeat_interleave(len(lights))
        return _References(styled.flatten(0, 1).flatten(1), digits.repeat(len(self.data.styles)), styles)

    def read(self, images: Tensor) -> list[Shown]:
        """Return what images [B, 1, 16, 16], or [B, 1, 8, 8], show; the digit is None where different ones are.

        Images lie in [-1, 1]. The size of a digit that is alone on its picture is None.
        """
        several = images.shape[-1] > CELL_SIDE
        cells = F.unfold(images, CELL_SIDE, stride=CELL_SIDE).movedim(1, 2)  # [B, cells, 64]
        each, digits, styles = self._small.find(cells.flatten(0, 1))
        parts = (value.unflatten(0, (len(images), -1)) for value in (each, digits, styles))
        far, digits, styles = parts
        whole, own, own_style = self._large.find(images.flatten(1)) if several else (each, each, each)
        found = []
        for place in range(len(images)):
            if several and whole[place] < far[place].sum():
                found.append(Shown(int(own[place]), 1, DIGIT_SIZES[1], self.data.styles[int(own_style[place])]))
            else:
                found.append(self._count(digits[place].tolist(), styles[place].tolist()))
        return found

    def _count(self, digits: Sequence[int], styles: Sequence[int]) -> Shown:
        filled = [(digit, style) for digit, style in zip(digits, styles, strict=True) if digit != _BLANK]
        kinds = {digit for digit, _ in filled}
        style = Counter(style for _, style in filled).most_common(1)
        name = self.data.styles[style[0][0]] if style else None
        return Shown(kinds.pop() if len(kinds) == 1 else None, len(filled), DIGIT_SIZES[0], name)


def make_prompts(counted: bool) -> dict[str, Shown]:
    """Return {prompt: what it asks for}: every digit once in each style, forty in all.

    Of counted digits also once in each kind: one, two and three digits, and a large one; the style of digit d in kind
    k is the (d + k)-th.
    """
    found = {}
    if not counted:
        pairs = [(digit, style) for digit in range(10) for style in STYLES]
        return {make_caption(style, digit): Shown(digit, 1, None, style) for digit, style in pairs}
    for digit in range(10):
        for kind, count in enumerate(GROUP_COUNTS):
            style = tuple(STYLES)[(digit + kind) % len(STYLES)]
            size = DIGIT_SIZES[1] if kind == len(GROUP_COUNTS) - 1 else ""
            found[make_caption(style, digit, count, size)] = Shown(digit, count, size or None, style)
    return found


def show_test_picture(data: Any, index: int) -> Shown:
    """Return what a picture of `CountedDigits` or `CaptionedDigits` shows."""
    if isinstance(data, CountedDigits):
        group = data.group(index)
        return Shown(group.digit, group.count, group.size, group.style)
    image, style = divmod(index, len(data.styles))
    return Shown(int(data.data.labels[image]), 1, None, data.styles[style])


def share_recognised(what: str, read: Sequence[Shown], asked: Sequence[Shown]) -> Row:
    """Return the shares of canvases that show all that was asked for, the digit, the count, and the style."""
    pairs = list(zip(read, asked, strict=True))
    return {
        "of": what,
        "canvases": len(pairs),
        "all": float(np.mean([own.agrees(wanted) for own, wanted in pairs])),
        "digit": float(np.mean([own.digit == wanted.digit for own, wanted in pairs])),
        "count": float(np.mean([own.count == wanted.count for own, wanted in pairs])),
        "style": float(np.mean([own.style == wanted.style for own, wanted in pairs])),
    }
