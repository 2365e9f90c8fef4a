"""What a picture file shows, as 8 bits: upright, opaque, and at the range of values that it states."""

from __future__ import annotations

import io
import os
import struct
from functools import cache
from typing import IO, Any

import numpy as np
from PIL import Image

MODES = {1: "L", 3: "RGB"}
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
# Transparent parts show this colour, whatever the file hides under them.
BACKGROUND = (255, 255, 255)
# EXIF's tag 274, and what turns pixels stored so upright (EXIF 2.32, 4.6.4; 1: they are).
_ORIENTATION = 274
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags of TIFF 6.0: bits of a sample, what 0 means, the highest sample (and of other types than unsigned integers).
_BITS, _PHOTOMETRIC, _HIGHEST, _HIGHEST_OF_TYPE = 258, 262, 281, 341
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
# Values that 12 bits can hold, which is what most cameras and scanners of more than 8 bits have.
_TWELVE_BITS = 4095


@cache
def list_formats() -> tuple[str, ...]:
    """Return the formats of `FORMATS` that this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_picture(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Open a picture by what it holds, whatever its name: of the formats that are decoded in this process.

    For PostScript, which could lie in a file named .png, Pillow would start another program.

    Raises:
        PIL.UnidentifiedImageError: if it is of no such format.
    """
    return Image.open(file, formats=list_formats())


def decode_pixels(content: bytes, channels: int) -> np.ndarray:
    """Decode a picture file to uint8 [H, W, channels].

    EXIF's orientation is obeyed. Transparent parts are composited on white (`BACKGROUND`). Grey values of more than 8
    bits are scaled from the range that the file states: 16 bits of PNG, the maximum of a PGM, TIFF's bits, and of
    floating-point numbers [0, 1]. Colour profiles are left out.

    Args:
        content: the file's bytes, in one of `FORMATS`; of an animation the first frame is taken.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        ValueError: if the file does not say which value is white.
    """
    with open_picture(io.BytesIO(content)) as image:
        image.load()
        narrow = scale_to_bytes(image) if image.mode.startswith("I") or image.mode == "F" else image
        pixels = np.array(turn_upright(make_opaque(narrow), read_orientation(image)).convert(MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


def decode_labels(content: bytes) -> np.ndarray:
    """Decode a label map to its values or indices of its palette, [H, W] as a rule, turned upright as pictures are."""
    with open_picture(io.BytesIO(content)) as image:
        image.load()
        return np.array(turn_upright(image, read_orientation(image)))


def read_orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 where there is none that can be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, IndexError, struct.error):
        return 1
    return found if found in _UPRIGHT else 1


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return an image as its orientation says that it is shown."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def make_opaque(image: Image.Image) -> Image.Image:
    """Return an image composited on `BACKGROUND`; as it is where it has no transparency."""
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image
    straight = image.convert("LA") if image.mode == "La" else image
    shown = straight.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, (*BACKGROUND, 255)), shown)


def scale_to_bytes(image: Image.Image) -> Image.Image:
    """Return a grey image of integers beyond 8 bits, or of floating-point numbers, scaled to 8 bits.

    Raises:
        ValueError: if the file does not say which value is white, or holds values beyond.
    """
    values = np.asarray(image).astype(np.float64)
    tags = getattr(image, "tag_v2", {})
    white = find_white(image, values, tags)
    lowest, highest = values.min(), values.max()
    if not 0 <= lowest <= highest <= white:  # NaN fails as well
        raise ValueError(f"its values go from {lowest:g} to {highest:g}, and should lie between 0 and {white:g}")
    inverted = image.format == "TIFF" and tags.get(_PHOTOMETRIC) == 0
    light = (white - values if inverted else values) / white
    narrow = Image.fromarray(np.round(255 * light).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        narrow.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return narrow


def find_white(image: Image.Image, values: np.ndarray, tags: Any) -> float:
    """Return the value that stands for white in an image of more than 8 bits.

    Raises:
        ValueError: if the file does not say it.
    """
    if image.format == "PPM" and image.mode != "F":
        return 65535.0  # to which Pillow has scaled the maximum of the file's header
    bits = _first(tags.get(_BITS)) if image.format == "TIFF" else 16
    known = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if known and (bits < 16 or values.max() > _TWELVE_BITS or not values.any()):
        return 2.0**bits - 1
    stated = _first(tags.get(_HIGHEST)) or _first(tags.get(_HIGHEST_OF_TYPE))
    if stated:
        return float(stated)
    if image.mode == "F" and values.min() >= 0 and values.max() <= 1:
        return 1.0
    kind = "floating-point numbers, which should lie in [0, 1]," if image.mode == "F" else "integers"
    raise ValueError(
        f"its {kind} go from {values.min():g} to {values.max():g}, and the file does not say which is white: save it "
        "as 8 bits, or scaled to the full range of 16 bits, or as TIFF with the tag MaxSampleValue"
    )


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value
