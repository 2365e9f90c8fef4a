"""A folder of pictures as people have them, in which something is rarely seen: coloured shapes in twelve classes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from ldm.commands.line import run_file
from ldm.util import atomic_write

Colour = tuple[int, ...]
Points = list[tuple[float, float]]
# Some pictures of these classes have a transparent background.
TRANSPARENT = ("purple_star", "green_cross")
GREY = ("grey_dots", 0)


@dataclass(frozen=True)
class Canvas:
    """A picture to draw on, with the middle and the radius of its shape and its colour."""

    image: Image.Image
    x: float
    y: float
    radius: float
    colour: Colour

    @property
    def pen(self) -> ImageDraw.ImageDraw:
        """What draws on the picture."""
        return ImageDraw.Draw(self.image)

    def box(self, wide: float = 1, high: float = 1) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom of the shape, a share of its radius wide and high."""
        return (
            self.x - wide * self.radius,
            self.y - high * self.radius,
            self.x + wide * self.radius,
            self.y + high * self.radius,
        )

    def steps(self, first: int, apart: int) -> Iterator[tuple[int, int]]:
        """Yield places of a lattice over the picture."""
        width, height = self.image.size
        yield from ((x, y) for x in range(first, width, apart) for y in range(first, height, apart))


def draw_ring(on: Canvas) -> None:
    on.pen.ellipse(on.box(), outline=on.colour, width=max(3, int(min(on.image.size) * 0.1)))


def draw_disc(on: Canvas) -> None:
    on.pen.ellipse(on.box(), fill=on.colour)


def draw_square(on: Canvas) -> None:
    on.pen.rectangle(on.box(), fill=on.colour)


def draw_triangle(on: Canvas) -> None:
    left, top, right, bottom = on.box()
    on.pen.polygon([(on.x, top), (left, bottom), (right, bottom)], fill=on.colour)


def draw_cross(on: Canvas) -> None:
    on.pen.rectangle(on.box(high=0.3), fill=on.colour)
    on.pen.rectangle(on.box(wide=0.3), fill=on.colour)


def draw_heart(on: Canvas) -> None:
    left, top, right, bottom = on.box()
    on.pen.ellipse((left, top, on.x, on.y), fill=on.colour)
    on.pen.ellipse((on.x, top, right, on.y), fill=on.colour)
    shoulder = on.y - 0.4 * on.radius
    on.pen.polygon([(left, shoulder), (right, shoulder), (on.x, bottom)], fill=on.colour)


def draw_star(on: Canvas) -> None:
    points: Points = []
    for corner in range(10):
        length = on.radius if corner % 2 == 0 else 0.45 * on.radius
        angle = corner * math.pi / 5
        points.append((on.x + length * math.sin(angle), on.y - length * math.cos(angle)))
    on.pen.polygon(points, fill=on.colour)


def draw_stripes(on: Canvas) -> None:
    width, height = on.image.size
    for left in range(-height, width, 14):
        on.pen.line([(left, 0), (left + height, height)], fill=on.colour, width=6)


def draw_bars(on: Canvas) -> None:
    width, height = on.image.size
    for left in range(4, width, 16):
        on.pen.rectangle((left, 0, left + 7, height), fill=on.colour)


def draw_check(on: Canvas) -> None:
    cell = max(8, min(on.image.size) // 6)
    for x, y in on.steps(0, cell):
        if (x // cell + y // cell) % 2:
            on.pen.rectangle((x, y, x + cell, y + cell), fill=on.colour)


def draw_dots(on: Canvas) -> None:
    for x, y in on.steps(8, 18):
        on.pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=on.colour)


def draw_grid(on: Canvas) -> None:
    width, height = on.image.size
    for x in range(5, width, 15):
        on.pen.line([(x, 0), (x, height)], fill=on.colour, width=3)
    for y in range(5, height, 15):
        on.pen.line([(0, y), (width, y)], fill=on.colour, width=3)


# {class: number of pictures, colour, what draws the shape}
CLASSES: dict[str, tuple[int, Colour, Callable[[Canvas], None]]] = {
    "blue_ring": (80, (40, 70, 220), draw_ring),
    "brown_stripes": (72, (140, 90, 40), draw_stripes),
    "cyan_check": (64, (40, 200, 210), draw_check),
    "green_cross": (56, (40, 170, 60), draw_cross),
    "grey_dots": (48, (120, 120, 120), draw_dots),
    "magenta_heart": (40, (210, 40, 170), draw_heart),
    "orange_triangle": (36, (240, 140, 30), draw_triangle),
    "pink_grid": (30, (250, 150, 190), draw_grid),
    "purple_star": (30, (120, 50, 180), draw_star),
    "red_disc": (12, (220, 40, 40), draw_disc),
    "white_bars": (8, (245, 245, 245), draw_bars),
    "yellow_square": (5, (240, 220, 40), draw_square),
}


def draw_picture(name: str, number: int, chance: random.Random) -> Image.Image:
    """Return the picture of a class: 48 to 120 pixels high and wide, a place, a size and a tint drawn by `chance`."""
    _, colour, shape = CLASSES[name]
    size = chance.randint(48, 120), chance.randint(48, 120)
    clear = name in TRANSPARENT and number % 5 == 0
    ground = (0, 0, 0, 0) if clear else tuple(chance.randint(0, 60) for _ in range(3))
    tint = tuple(max(0, min(255, value + chance.randint(-20, 20))) for value in colour)
    side = min(size)
    radius = side * chance.uniform(0.25, 0.42)
    x, y = (length / 2 + chance.uniform(-0.08, 0.08) * side for length in size)
    image = Image.new("RGBA" if clear else "RGB", size, ground)
    shape(Canvas(image, x, y, radius, (*tint, 255) if clear else tint))
    return image.convert("L") if (name, number) == GREY else image


@dataclass(frozen=True)
class Shapes:
    """Draw 481 pictures in class folders, 80 down to 5 a class, of mixed sizes, some transparent, one grey.

    Examples:
      python -m benchmarks.shapes --out pictures
      decu new --data pictures --size 32 --out my.yaml
    """

    out: Path
    """The folder of the class folders; pictures that are there stay."""
    seed: int = 0
    """The seed of places, sizes and tints."""

    def run(self) -> int:
        """Draw what is missing; return the number of pictures."""
        chance, count = random.Random(self.seed), 0
        for name, (pictures, _, _) in CLASSES.items():
            for number in range(pictures):
                image = draw_picture(name, number, chance)
                path = self.out / name / f"{name}_{number:03}{'.png' if image.mode == 'RGBA' else '.jpg'}"
                if not path.exists():
                    with atomic_write(path) as part:
                        image.save(part, "PNG" if image.mode == "RGBA" else "JPEG", quality=92)
                count += 1
        print(f"{count} pictures in {len(CLASSES)} classes: {self.out}")
        return count


if __name__ == "__main__":
    run_file(Shapes)
