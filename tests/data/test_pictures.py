"""Pictures as people have them are read as they are seen: upright, opaque, at the range that the file states."""

import io
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from ldm.data.decoding import decode_pixels
from ldm.data.folder import ImageFolder
from ldm.data.imagenet import ImageNetTrain, ImageNetValidation
from ldm.data.picture_list import read_picture_list
from ldm.data.pictures import BrokenImageError, Files
from ldm.data.plans import read_list
from ldm.data.segmented import SegmentedImages
from ldm.pipelines.images import FolderImages

RAMP = np.tile(np.linspace(0, 1, 32), (32, 1))
GREY = np.round(255 * RAMP).astype(np.uint8)


def scaled(highest, kind=np.uint16):
    return np.round(highest * RAMP).astype(kind)


def halves():
    """Red above, blue below."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4], image[4:] = (255, 0, 0), (0, 0, 255)
    return image


# What turns upright pixels into those that are stored under an orientation (EXIF 2.32, 4.6.4).
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_orientation_is_obeyed(tmp_path, suffix):
    upright = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    for orientation, store in STORED.items():
        tag, file = Image.Exif(), tmp_path / f"{orientation}.{suffix}"
        tag[274] = orientation
        stored = Image.fromarray(np.ascontiguousarray(store(upright)))
        stored.save(file, exif=tag, **({"lossless": True} if suffix == "webp" else {}))
        assert np.array_equal(decode_pixels(file.read_bytes(), 3), upright), orientation


def test_a_damaged_orientation_leaves_the_picture_as_it_is(tmp_path):
    tag, file = Image.Exif(), tmp_path / "a.jpg"
    tag[274] = 6
    Image.fromarray(halves()).save(file, exif=tag, quality=95)
    content = bytearray(file.read_bytes())
    place = content.find(b"Exif\0\0") + 6
    content[place : place + 20] = b"\xff" * 20
    assert decode_pixels(bytes(content), 3)[1, 6, 0] > 200


def test_what_is_hidden_under_transparency_is_white(tmp_path):
    """Three pictures that look the same, in every way to say it, are read the same; grey ones too."""
    clear = np.ones((8, 8), bool)
    clear[2:6, 2:6] = False
    expected = np.where(clear[..., None], 255, np.array([255, 0, 0])).astype(np.uint8)
    for number, hidden in enumerate([(0, 0, 0), (255, 255, 255), (0, 255, 0)]):
        pixels = np.zeros((8, 8, 4), np.uint8)
        pixels[..., :3] = hidden
        pixels[~clear] = (255, 0, 0, 255)
        image = Image.fromarray(pixels)
        image.save(tmp_path / f"{number}.png")
        image.save(tmp_path / f"{number}.webp", lossless=True, exact=True)
        image.save(tmp_path / f"{number}.gif")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 9
    for file in files:
        assert np.array_equal(decode_pixels(file.read_bytes(), 3), expected), file.name
    half = Image.fromarray(np.array([[[100, 128]]], np.uint8), "LA")
    half.save(tmp_path / "half.png")
    assert decode_pixels((tmp_path / "half.png").read_bytes(), 1).item() == round(100 * 128 / 255 + 127)
    wide = Image.fromarray(np.array([[0, 60000]], np.uint16))
    wide.save(tmp_path / "wide.png", transparency=0)
    assert decode_pixels((tmp_path / "wide.png").read_bytes(), 1)[0, :, 0].tolist() == [255, 233]


def ramps(folder):
    """The ramp 0 .. 1 in files of more than 8 bits that say which value is white."""
    for highest in (4095, 1023, 65535):
        header = f"P5\n32 32\n{highest}\n".encode()
        (folder / f"{highest}.pgm").write_bytes(header + scaled(highest, ">u2").tobytes())
    plain = " ".join(map(str, scaled(4095).ravel()))
    (folder / "plain.pgm").write_text(f"P2\n32 32\n4095\n{plain}")
    Image.fromarray(scaled(65535)).save(folder / "16.png")
    Image.fromarray(scaled(65535)).save(folder / "16.tif")
    Image.fromarray(65535 - scaled(65535)).save(folder / "white_is_zero.tif", tiffinfo={262: 0})
    Image.fromarray(scaled(4095)).save(folder / "12.tif", tiffinfo={281: 4095})
    Image.fromarray(scaled(50000, np.int32)).save(folder / "32.tif", tiffinfo={281: 50000})
    Image.fromarray(RAMP.astype(np.float32)).save(folder / "float.tif")


def test_values_beyond_8_bits_are_scaled_by_what_the_file_says(tmp_path):
    ramps(tmp_path)
    files = list(tmp_path.iterdir())
    assert len(files) == 10
    for file in files:
        found = decode_pixels(file.read_bytes(), 1)[:, :, 0].astype(int)
        assert np.abs(found - GREY).max() <= 1, file.name


def unclear(folder):
    """Files that do not say which value is white, or hold no numbers."""
    Image.fromarray(scaled(4095)).save(folder / "a.png")
    Image.fromarray(scaled(4095)).save(folder / "b.tif")
    Image.fromarray(scaled(65535, np.int32)).save(folder / "c.tif")
    Image.fromarray((255 * RAMP).astype(np.float32)).save(folder / "d.tif")
    Image.fromarray((RAMP - 0.5).astype(np.float32)).save(folder / "e.tif")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(folder / "f.tif")
    Image.fromarray(scaled(65535, np.int32)).save(folder / "g.tif", tiffinfo={281: 4095})


def test_values_of_an_unknown_range_are_refused_and_never_clipped(tmp_path):
    unclear(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=r"go from .* to"):
            decode_pixels(file.read_bytes(), 1)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "black.png")
    assert decode_pixels((tmp_path / "black.png").read_bytes(), 1).max() == 0


@pytest.fixture
def classes(tmp_path):
    """Two classes of two pictures."""
    root = tmp_path / "data"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(halves()).save(root / name / f"img {number}.png")
    return root


BY_PRODUCTS = ["@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information", ".Trash-1000", "@eadir"]


def test_by_products_of_systems_and_network_drives_are_no_classes(classes):
    for name in BY_PRODUCTS:
        for folder in (classes / name, classes / "a" / name / "0.png"):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(classes / "a" / "img 0.png", folder / "thumb.png")
    data = ImageFolder(str(classes), image_size=8)
    assert data.class_names == ["a", "b"] and len(data) == 4
    with zipfile.ZipFile(classes.parent / "data.zip", "w") as archive:
        for file in sorted(classes.rglob("*.png")):
            if file.is_file():
                archive.write(file, file.relative_to(classes))
    assert len(Files(classes.parent / "data.zip").images()) == 4


def test_other_layouts_are_refused_when_they_are_read(classes):
    with pytest.raises(ValueError, match="depth: 2, and if they are not give class_names"):
        ImageFolder(str(classes.parent), image_size=8)
    assert ImageFolder(str(classes.parent), depth=2, image_size=8).class_names == ["data/a", "data/b"]
    assert ImageFolder(str(classes.parent), class_names=["data"], image_size=8).n_classes == 1
    classes.rename(classes.parent / "train")
    shutil.copytree(classes.parent / "train", classes.parent / "val")
    with pytest.raises(ValueError, match="names of splits: choose one of them by folder: train"):
        ImageFolder(str(classes.parent), image_size=8)
    flat = classes.parent / "val" / "a"
    with pytest.raises(ValueError, match=r"class folders above each image, got 'img 0.png'"):
        ImageFolder(str(flat), image_size=8)


def test_layouts_of_imagenet(classes, tmp_path):
    """Flat validation pictures and a folder too many are refused; lists take names with spaces, and real ones only."""
    (tmp_path / "data_train").mkdir()
    inner = tmp_path / "data_train" / "data"
    classes.rename(inner)
    listed = tmp_path / "data_train" / "filelist.txt"
    listed.write_text("a/img 0.png\r\nb/img 1.png\n", encoding="utf-8-sig")
    data = ImageNetTrain(data_root=str(tmp_path), config={"size": 8})
    assert data.relpaths == ["a/img 0.png", "b/img 1.png"] and data.class_names == ["a", "b"]
    assert data[1]["image"].shape == (8, 8, 3)
    (tmp_path / "member.txt").write_text("b/img 1.png\n\n")
    assert read_list(tmp_path / "member.txt", data).tolist() == [1]
    listed.write_text("a/img 0.png\na/none.png\n")
    with pytest.raises(ValueError, match=r"'a/none.png', which is not in"):
        ImageNetTrain(data_root=str(tmp_path))
    listed.unlink()
    (inner / "deeper").mkdir()
    shutil.move(inner / "a", inner / "deeper" / "a")
    with pytest.raises(ValueError, match=r"'deeper/a/img 0.png', in more than one folder"):
        ImageNetTrain(data_root=str(tmp_path))
    shutil.copytree(inner / "b", tmp_path / "data_val" / "data")
    with pytest.raises(ValueError, match=r"'img 0.png', without a folder; the published archive"):
        ImageNetValidation(data_root=str(tmp_path))


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "page": lambda content: b"<html>not found</html>",
    "zeros": lambda content: content[:40] + bytes(60) + content[100:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_reader_names_a_damaged_picture(classes, damage):
    (classes / "b").rename(classes.parent / "b")
    bad = classes / "a" / "img 1.png"
    shutil.copytree(classes, classes.parent / "maps")
    for file in (classes.parent / "maps" / "a").iterdir():
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(file)
    bad.write_bytes(DAMAGES[damage](bad.read_bytes()))
    good = classes.parent / "good"
    shutil.copytree(classes.parent / "b", good / "a")
    readers = [
        lambda: ImageFolder(str(classes), image_size=8)[1],
        lambda: FolderImages(classes).read(0, 2),
        lambda: read_picture_list(classes),
        lambda: read_picture_list(good, masks=classes),
        lambda: SegmentedImages(str(classes), str(classes.parent / "maps"), 2, image_size=8)[1],
        lambda: SegmentedImages(str(good), str(classes), 256, image_size=8)[1],
    ]
    for read in readers:
        with pytest.raises(BrokenImageError, match=r"cannot read image 'a/img 1.png' in") as caught:
            read()
        assert "BytesIO" not in str(caught.value)


def test_a_damaged_picture_in_a_zip_is_named(classes):
    path = classes.parent / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/0.png", "b/1.png"):
            archive.write(classes / "a" / "img 0.png", name)
    content = bytearray(path.read_bytes())
    place = content.rfind(b"b/1.png", 0, content.rfind(b"PK\x01\x02")) + 30
    content[place : place + 8] = b"\xff" * 8
    path.write_bytes(bytes(content))
    data = ImageFolder(str(path), image_size=8)
    assert torch.is_tensor(data[0]["image"])
    with pytest.raises(BrokenImageError, match=r"cannot read image 'b/1.png' in .*data\.zip"):
        data[1]


def test_a_picture_starts_no_program(tmp_path, monkeypatch):
    """PostScript in a file named .png, with a Ghostscript on the path that leaves a file where it is started."""
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(UnidentifiedImageError):
        decode_pixels(script, 3)
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "0.png").write_bytes(script)
    with pytest.raises(BrokenImageError, match=r"0\.png"):
        ImageFolder(str(tmp_path / "root"), image_size=8)[0]
    assert not started.exists()


@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_formats_that_are_decoded_here_are_read_by_what_they_hold(name):
    content = io.BytesIO()
    Image.new("RGB", (6, 4), (250, 10, 10)).save(content, name)
    assert decode_pixels(content.getvalue(), 3).shape == (4, 6, 3)
