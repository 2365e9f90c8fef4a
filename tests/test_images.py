"""Bytes, grids and figures, checked pixel by pixel and by reading files back."""

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from ldm.images import Panel, heat_maps, labelled_grid, save_image, side_by_side, tile_images, to_uint8
from ldm.util import generator


def uniform(*shape, key=0):
    return torch.rand(shape, generator=generator("images", key)) * 2 - 1


def test_every_byte_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16)
    np.testing.assert_array_equal(to_uint8(levels / 127.5 - 1)[..., 0], levels[:, 0].numpy())


def test_values_outside_are_clipped_and_axes_are_last():
    images = torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    pixels = to_uint8(images)
    assert pixels.shape == (2, 4, 5, 3) and pixels.dtype == np.uint8
    assert pixels[1, 2, 3].tolist() == [0, 128, 255]
    assert to_uint8(images.half())[0, 0, 0].tolist() == [0, 128, 255]


def test_what_a_colour_bar_is_of_is_no_longer_than_the_bar(tmp_path):
    image, value = torch.zeros(1, 1, 8, 8), torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = {}
    for name, label in (("short", "nats"), ("long", "at most this through noise of deviation 0.707 in each channel")):
        heat_maps(image, value, tmp_path / f"{name}.png", label=label)
        with Image.open(tmp_path / f"{name}.png") as picture:
            sizes[name] = picture.height
    assert sizes["long"] <= 1.1 * sizes["short"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_images_are_refused_by_number(value):
    images = uniform(3, 1, 2, 2)
    images[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"images \[1\] of 3 hold NaN or infinite"):
        to_uint8(images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("zoom", "padding"), [(1, 0), (3, 2)])
def test_grid_holds_each_pixel_enlarged_at_its_place(channels, zoom, padding):
    images = to_uint8(uniform(5, channels, 4, 6))
    grid = tile_images(images, columns=3, padding=padding, zoom=zoom, fill=7)
    assert grid.shape == (2 * (4 * zoom + padding) + padding, 3 * (6 * zoom + padding) + padding, channels)
    for index in range(5):
        y, x = padding + index // 3 * (4 * zoom + padding), padding + index % 3 * (6 * zoom + padding)
        cell = grid[y : y + 4 * zoom, x : x + 6 * zoom]
        expected = Image.fromarray(images[index].squeeze()).resize((6 * zoom, 4 * zoom), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(cell.squeeze(), np.asarray(expected))
    assert (grid[-4 * zoom - padding :, -6 * zoom - padding :] == 7).all()


def test_grid_of_floats_equals_grid_of_bytes():
    images = uniform(4, 3, 5, 5)
    np.testing.assert_array_equal(tile_images(images), tile_images(to_uint8(images), columns=2))


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_image_reads_back_and_is_not_replaced_silently(tmp_path, channels):
    image = to_uint8(uniform(1, channels, 9, 7))[0]
    path = tmp_path / "folder" / "image.png"
    save_image(image, path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image.squeeze())
    with pytest.raises(FileExistsError, match="exists"):
        save_image(255 - image, path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image.squeeze())
    save_image(255 - image, path, overwrite=True)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), 255 - image.squeeze())
    assert [file.name for file in path.parent.iterdir()] == ["image.png"]


def colours_of(path):
    return {tuple(pixel) for pixel in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).tolist()}


def test_labelled_grid_draws_exact_pixels_and_the_same_bytes_twice(tmp_path):
    """Each enlarged 96-pixel cell keeps its own colour, so nothing is resampled or cut off."""
    shades = torch.linspace(-1, 1, 6).reshape(2, 3, 1, 1, 1)
    images = torch.cat([shades, -shades, shades * 0], dim=2).expand(2, 3, 3, 8, 8)
    for name in ("a.png", "b.png"):
        labelled_grid(images, tmp_path / name, ["member 0", "member 1"], ["one", "two words", "x" * 30], "title")
    assert {
        tuple(pixel) for pixel in to_uint8(images[:, :, :, 0, :1].reshape(-1, 3, 1, 1)).reshape(-1, 3).tolist()
    } <= (colours_of(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_heat_maps_share_one_colour_scale(tmp_path):
    """A map at half of another's value is drawn in the middle colour, and at the top colour when alone."""
    low, high = torch.full((1, 4, 4), 0.5), torch.full((1, 4, 4), 1.0)
    black = -torch.ones(2, 1, 4, 4)
    heat_maps(black, torch.cat([low, high]), tmp_path / "both.png", titles=["a", "b"])
    heat_maps(black[:1], low, tmp_path / "alone.png")
    top, middle = ([round(255 * part) for part in colormaps["cividis"](at)[:3]] for at in (1.0, 0.5))
    # The colour bar shows both colours too, in a strip of a few thousand pixels at most.
    assert count_near(tmp_path / "both.png", middle) > 10_000 > 5 * count_near(tmp_path / "alone.png", middle)
    assert count_near(tmp_path / "both.png", top) > 10_000 and count_near(tmp_path / "alone.png", top) > 10_000


def count_near(path, colour):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(-1) <= 3).sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: to_uint8(torch.zeros(1, 2, 4, 4)), "1 or 3, H, W"),
        (lambda path: to_uint8(torch.zeros(3, 4, 4)), "float tensor"),
        (lambda path: tile_images(np.zeros((0, 4, 4, 1), np.uint8)), "at least 1 image"),
        (lambda path: tile_images(np.zeros((1, 4, 4, 1))), "uint8"),
        (lambda path: save_image(torch.zeros(3, 4, 4), path), "`to_uint8` converts"),
        (lambda path: labelled_grid(torch.zeros(1, 2, 1, 4, 4), path, ["a"], ["b"]), "2 column labels"),
        (lambda path: heat_maps(torch.zeros(2, 1, 4, 4), torch.zeros(1, 4, 4), path), "N titles"),
        (lambda path: heat_maps(torch.zeros(1, 1, 4, 4), torch.full((1, 4, 4), float("nan")), path), r"maps \[0\]"),
        (lambda path: heat_maps(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4), path.with_suffix(".gif")), ".png or"),
    ],
)
def test_errors_say_what_was_expected(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


def test_panels_stand_beside_each_other_at_one_scale(tmp_path):
    """A panel's images appear in a figure of two as they do alone; the second begins right of the first."""
    white, black = torch.ones(2, 3, 1, 8, 8), -torch.ones(1, 3, 1, 8, 8)
    names = ["a", "b", "c"]
    panels = [Panel(white, ["x", "y"], names, "left"), Panel(black, ["z"], names, "right")]
    side_by_side(panels, tmp_path / "two.png")
    labelled_grid(black, tmp_path / "one.png", ["z"], names, "right")
    dark = [np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) < 8 for name in ("two", "one")]
    columns = [np.flatnonzero(part.sum(0) > 50) for part in dark]
    assert len(columns[0]) == pytest.approx(len(columns[1]), abs=4), "three images of the same width"
    assert columns[0].min() > dark[0].shape[1] / 2
    with pytest.raises(ValueError, match="at least one panel"):
        side_by_side([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="need 1 row and 3 column labels"):
        side_by_side([Panel(black, ["z", "w"], names)], tmp_path / "none.png")
