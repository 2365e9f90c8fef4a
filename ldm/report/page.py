"""A page of results: one HTML file that opens offline, with its pictures inside, by a template."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image, features

from ldm.data.decoding import open_picture
from ldm.files import reading
from ldm.util import atomic_write

PAGE = "page.html"
# Wider pictures are scaled down to this many pixels inside a page.
WIDEST_SHOWN = 1600
# From this width on, in pixels, a picture is not shrunk to a narrow screen.
WIDE = 600
# The least width of such a picture there, half a screen's pixel to a pixel, between these, in rem.
NARROWEST_REM, WIDEST_REM = 34, 62
# Pictures of more bytes are written as WebP, which takes a fraction of them for photographs.
LARGE = 60_000


@dataclass(frozen=True)
class Text:
    """A paragraph of whole sentences."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Code:
    """Words that are shown as they are, folded under their caption."""

    kind: ClassVar[str] = "code"
    caption: str
    text: str


@dataclass(frozen=True)
class Cell:
    """What a cell of a table shows, and the number that it is sorted by, None for words."""

    text: str
    number: float | None = None


@dataclass(frozen=True)
class PageTable:
    """A table that is sorted by a click on the name of a column.

    Attributes:
        columns: their names.
        rows: {column: value} of each; a missing value stays empty.
        caption: what it shows.
    """

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    caption: str = ""

    @property
    def cells(self) -> list[list[Cell]]:
        """The cells of each row."""
        return [[make_cell(row.get(name)) for name in self.columns] for row in self.rows]


@dataclass(frozen=True)
class Picture:
    """A picture, written into the page: a file, or one that was just drawn."""

    kind: ClassVar[str] = "picture"
    path: Path | Image.Image
    caption: str

    @property
    def width(self) -> int:
        """The width of the file in pixels."""
        if isinstance(self.path, Image.Image):
            return self.path.size[0]
        with reading(self.path, "a picture", "make it again, or remove it"), open_picture(self.path) as image:
            return image.size[0]

    @property
    def wide(self) -> bool:
        """Whether a narrow screen shows it better cut off, to be moved, than as small as the screen."""
        return self.width >= WIDE

    @property
    def least_rem(self) -> int:
        """The least width of a wide picture on any screen, in rem of 16 pixels: its letters stay readable."""
        return min(max(NARROWEST_REM, self.width // 32), WIDEST_REM)

    @property
    def source(self) -> str:
        """The picture as a data address: of 1,600 pixels' width at most, a PNG where that is small, else a WebP."""
        if isinstance(self.path, Image.Image):
            content = _encode(self.path, "PNG")
        else:
            with reading(self.path, "a picture", "make it again, or remove it"), open_picture(self.path) as image:
                small = image.width <= WIDEST_SHOWN and image.format == "PNG"
                content = self.path.read_bytes() if small else _encode(image, "PNG")
        kind = "png"
        if len(content) > LARGE and features.check("webp"):
            named = "this picture" if isinstance(self.path, Image.Image) else self.path
            with reading(named, "a picture", "make it again, or remove it"), Image.open(io.BytesIO(content)) as image:
                kind, content = "webp", _encode(image.convert("RGB"), "WEBP")
        return f"data:image/{kind};base64," + base64.b64encode(content).decode()


@dataclass(frozen=True)
class Section:
    """A part of a page, or a card in one: a title above blocks."""

    title: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Cards:
    """What belongs to one thing each, a class for example, side by side as many as fit."""

    kind: ClassVar[str] = "cards"
    cards: Sequence[Section]


@dataclass(frozen=True)
class ResultPage:
    """A page: what was found in whole sentences, then sections.

    Attributes:
        title: of the page.
        summary: sentences that come first.
        sections: in their order.
    """

    title: str
    summary: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=tuple)

    def write(self, path: str | Path) -> Path:
        """Write the page, in place of an earlier one; return its path."""
        templates = Environment(
            loader=PackageLoader("ldm.report"),
            undefined=StrictUndefined,
            autoescape=select_autoescape(default=True),
        )
        text = templates.get_template("page.html.j2").render(page=self)
        with atomic_write(path, overwrite=True) as partial:
            partial.write_text(text, encoding="utf-8")
        return Path(path)


def make_cell(value: Any) -> Cell:
    """Return a value as a cell: four digits of a number that is not whole; nothing where it is missing."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return Cell("")
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int | float):
        whole = float(value).is_integer() and abs(value) < 1e9
        return Cell(f"{int(value):,}" if whole else f"{value:.4g}", float(value))
    return Cell(str(value))


def _encode(image: Image.Image, kind: str) -> bytes:
    """Return a picture no wider than a page shows, as a PNG, or as a WebP that looks like it."""
    if image.width > WIDEST_SHOWN:
        image = image.resize((WIDEST_SHOWN, round(image.height * WIDEST_SHOWN / image.width)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 88} if kind == "WEBP" else {}))
    return file.getvalue()
