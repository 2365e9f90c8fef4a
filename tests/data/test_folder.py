"""Image files in folders and zip files: whole, nested, broken."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.folder import ImageFolder
from ldm.data.omniglot import Omniglot
from ldm.data.pictures import decode
from ldm.data.tiny_imagenet import TinyImageNet
from tests.conftest import data_folder


def png(value: int, size=(6, 6), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(buffer, "png")
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


FILES = {
    f"train/{name}/{part}{index}.png": png(20 * index)
    for name, part in (("cat", ""), ("dog", "x/"))
    for index in range(3)
}
BY_PRODUCTS = {"train/.DS_Store": b"x", "__MACOSX/train/cat/._0.png": b"x", "notes.txt": b"x"}


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_a_folder_and_a_zip_of_it_are_the_same_data_set(tmp_path, place):
    files = {**FILES, **BY_PRODUCTS}
    root = write(tmp_path / "images", files) if place == "folder" else zipped(tmp_path / "images.zip", files)
    data = ImageFolder(str(root), "train", image_size=6)
    assert data.relpaths == sorted(FILES) and data.class_names == ["cat", "dog"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.image_shape == (6, 6, 3)
    item = data[4]
    assert item == {**item, "relpath": "train/dog/x/1.png", "class_label": 1, "human_label": "dog", "index": 4}
    expected = torch.tensor([20 / 127.5 - 1, -1.0, 1.0]).expand(6, 6, 3)
    torch.testing.assert_close(item["image"], expected)
    batches = DataLoader(data, batch_size=2, num_workers=2)
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), torch.stack([one["image"] for one in data]))


def test_depth_and_given_classes(tmp_path):
    root = str(write(tmp_path, FILES))
    assert ImageFolder(root, depth=2, image_size=6).class_names == ["train/cat", "train/dog"]
    given = ImageFolder(root, "train", class_names=["cow", "dog", "cat"], image_size=6)
    assert given.n_classes == 3 and given.labels.tolist() == [2, 2, 2, 1, 1, 1]
    with pytest.raises(ValueError, match="got also dog"):
        ImageFolder(root, "train", class_names=["cat"])
    with pytest.raises(ValueError, match=r"2 or more .* class folders"):
        ImageFolder(root, "train", depth=2)
    with pytest.raises(ValueError, match="no image files"):
        ImageFolder(root, "val")
    with pytest.raises(ValueError, match=r"expected a folder or a \.zip"):
        ImageFolder(f"{root}/absent")


def test_split_is_a_partition(tmp_path):
    root = str(write(tmp_path, FILES))
    parts = [ImageFolder(root, "train", split=split, test_fraction=0.34).relpaths for split in ("train", "test")]
    assert sorted(parts[0] + parts[1]) == sorted(FILES) and len(parts[1]) == 2


def test_the_shortest_side_is_scaled_and_the_rest_cropped(tmp_path):
    ramp = np.tile(np.arange(0, 240, 2, dtype=np.uint8), (40, 1))  # 40 high, 120 wide, brighter to the right
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "png")
    root = str(write(tmp_path, {"a/1.png": buffer.getvalue()}))
    centre = ImageFolder(root, image_size=20, channels=1)[0]["image"]
    # Half size: 20 x 60; the centre window starts at column 20, that is at pixel 40.5 with grey level 2 * 40.5.
    assert centre.shape == (20, 20, 1)
    assert centre[10, 0, 0].item() == pytest.approx(81 / 127.5 - 1, abs=1.5 / 127.5)
    whole = ImageFolder(root, image_size=20, channels=1, crop="none")[0]["image"]
    assert whole[10, 0, 0] < -0.95 and whole[10, -1, 0] > 0.8
    drawn = ImageFolder(root, image_size=20, channels=1, crop="random", flip=True)
    windows = []
    for epoch in range(40):
        drawn.set_epoch(epoch)
        windows.append(drawn[0]["image"][10, :, 0])
    assert len({round(window.min().item(), 2) for window in windows}) > 10
    assert 5 < sum(bool(window[0] > window[-1]) for window in windows) < 35  # mirrored about half of the time
    assert decode(buffer.getvalue(), 3).shape == (40, 120, 3)


def broken_folder(root: Path) -> Path:
    files = {
        "a/1.png": png(1),
        "a/2.png": png(2)[:40],
        "a/3.png": png(3),
        "b/1.png": png(4),
        "b/2.png": b"not an image",
    }
    return write(root, files)


def test_a_broken_image_is_an_error_with_its_path(tmp_path):
    data = ImageFolder(str(broken_folder(tmp_path)), image_size=6)
    for index, path in ((1, "a/2.png"), (4, "b/2.png")):
        with pytest.raises(ValueError, match=f"'{path}' in {tmp_path}"):
            data[index]
    (tmp_path / "b/1.png").unlink()
    with pytest.raises(ValueError, match="b/1"):
        data[3]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped_within_their_class_and_counted(tmp_path, workers):
    data = ImageFolder(str(broken_folder(tmp_path)), image_size=6, broken="skip")
    for _ in range(2):
        batches = list(DataLoader(data, batch_size=1, num_workers=workers))
        assert [batch["relpath"][0] for batch in batches] == ["a/1.png", "a/3.png", "a/3.png", "b/1.png", "b/1.png"]
        assert [int(batch["class_label"]) for batch in batches] == [0, 0, 0, 1, 1]
        assert data.n_broken == 2 and data.broken_relpaths == ["a/2.png", "b/2.png"]
    (tmp_path / "b/1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the images of class 'b'"):
        data[3]


def test_omniglot_counts_shared_drawings_once(tmp_path):
    greek = {f"Greek/character0{one}/0_{draw}.png": png(0, mode="L") for one in (1, 2) for draw in range(5)}
    latin = {f"Latin/character01/1_{draw}.png": png(255, mode="L") for draw in range(5)}
    zipped(tmp_path / "images_small1.zip", {f"images_small1/{name}": data for name, data in (greek | latin).items()})
    write(tmp_path / "images_small2", latin | {"Tagalog/character01/2_0.png": png(0, mode="L")})
    data = Omniglot(str(tmp_path), split="all", image_size=6)
    assert data.class_names == ["Greek/character01", "Greek/character02", "Latin/character01", "Tagalog/character01"]
    assert data.labels.bincount().tolist() == [5, 5, 5, 1]
    assert {float(item["image"].mean()) for item in data if item["human_label"].startswith("Latin")} == {1.0}
    assert Omniglot(str(tmp_path), ["images_small2"], "all").n_classes == 2
    assert Omniglot(str(tmp_path), split="test").labels.bincount().tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="neither"):
        Omniglot(str(tmp_path), ["images_background"])
    with pytest.raises(ValueError, match=r"no images_\*"):
        Omniglot(str(tmp_path / "images_small2"))


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_tiny_imagenet_reads_its_annotations(tmp_path, place):
    files = {
        "wnids.txt": b"n02\nn01\n",
        "words.txt": b"n01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn03\tunused\n",
        "train/n01/images/n01_0.JPEG": png(10),
        "train/n02/images/n02_0.JPEG": png(20),
        "val/images/val_0.JPEG": png(30),
        "val/images/val_1.JPEG": png(40),
        "val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n",
    }
    files = {f"tiny-imagenet-200/{name}": content for name, content in files.items()}
    root = str(write(tmp_path / "all", files) if place == "folder" else zipped(tmp_path / "tiny.zip", files))
    train, val = TinyImageNet(root, image_size=6), TinyImageNet(root, "val", image_size=6)
    assert train.class_names == val.class_names == ["n01", "n02"]
    assert train.labels.tolist() == [0, 1] and val.labels.tolist() == [1, 0]
    assert val[1]["human_label"] == "goldfish, Carassius auratus"
    assert val[1]["image"][0, 0, 0].item() == pytest.approx(40 / 127.5 - 1)
    with pytest.raises(ValueError, match=r"not Tiny-ImageNet"):
        TinyImageNet(str(write(tmp_path / "other", {"a/1.png": png(1)})))


def test_omniglot_itself():
    data = Omniglot(str(data_folder("omniglot")), split="all")
    # small1 and small2 hold 136 and 156 characters of 20 drawings; Greek (24) and Latin (26) are in both.
    assert data.n_classes == 136 + 156 - 50 and data.labels.bincount().unique().tolist() == [20]
    item = data[1000]
    assert item["image"].shape == (32, 32, 1) and item["image"].mean() > 0.5  # thin black strokes on white


def test_files_kept_in_memory_are_read_once_and_stay_the_same(tmp_path):
    files = {f"{name}/{index}.png": png(30 * index) for name in "ab" for index in range(3)}
    data = ImageFolder(str(write(tmp_path, files)), image_size=6, in_memory=True)
    before = [item["image"].clone() for item in data]
    data[0]["image"].zero_()  # an item is the caller's own
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    assert all(torch.equal(item["image"], image) for item, image in zip(data, before, strict=True))
    with pytest.raises(ValueError, match="cannot read image"):
        ImageFolder(str(write(tmp_path, {"a/1.png": b"x"})), image_size=6, in_memory=True)[0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_images_of_16_bits_keep_their_shades(kind):
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(257 * shades).save(file, kind)
    for channels in (1, 3):
        assert np.array_equal(decode(file.getvalue(), channels).numpy()[:, :, -1], shades)
