"""The MNIST family's files: written here byte by byte, and MNIST's own where it is at hand."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.idx import IMAGES_MAGIC, KMNIST, LABELS_MAGIC, MNIST, FashionMNIST, IdxImages, read_idx
from tests.conftest import data_folder

PIXELS = (np.arange(3 * 28 * 28) % 256).astype(np.uint8).reshape(3, 28, 28)


def idx_bytes(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(struct.pack(">i", side) for side in values.shape)
    return header + values.tobytes()


def write(folder, prefix="train", pixels=PIXELS, labels=(7, 0, 9), zipped=False, dot=False):
    pack, suffix, mark = (gzip.compress, ".gz", "-") if zipped else (bytes, "", ".") if dot else (bytes, "", "-")
    (folder / f"{prefix}-images{mark}idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(pixels)))
    (folder / f"{prefix}-labels{mark}idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(np.array(labels, np.uint8))))


@pytest.mark.parametrize("form", [{}, {"zipped": True}, {"dot": True}])
def test_every_form_gives_the_written_values(tmp_path, form):
    write(tmp_path, **form)
    data = MNIST(str(tmp_path))
    assert data.labels.tolist() == [7, 0, 9] and data.n_classes == 10 and data.image_shape == (28, 28, 1)
    for index in range(3):
        expected = torch.tensor(PIXELS[index] / 127.5 - 1, dtype=torch.float32)[:, :, None]
        torch.testing.assert_close(data[index]["image"], expected, atol=1e-6, rtol=0)


def test_padding_puts_background_around_and_resizing_is_pillows(tmp_path):
    write(tmp_path, "t10k")
    padded = FashionMNIST(str(tmp_path), "test", image_size=33, channels=3)[1]
    assert padded["human_label"] == "T-shirt/top" and padded["image"].shape == (33, 33, 3)
    inner = MNIST(str(tmp_path), "test")[1]["image"]
    assert torch.equal(padded["image"][2:30, 2:30], inner.expand(28, 28, 3))
    assert padded["image"].sum() == pytest.approx(float(3 * (inner.sum() - (33 * 33 - 28 * 28))), abs=1e-2)
    resized = KMNIST(str(tmp_path), "test", image_size=14, fit="resize")[2]["image"]
    pillow = np.array(Image.fromarray(PIXELS[2]).resize((14, 14), Image.Resampling.BICUBIC))
    torch.testing.assert_close(resized[:, :, 0], torch.tensor(pillow / 127.5 - 1, dtype=torch.float32))


def test_wrong_files_are_named_with_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"decu data prepare --dataset mnist"):
        MNIST(str(tmp_path))
    with pytest.raises(ValueError, match=rf"into {tmp_path.parent}/kmnist with: .*--dataset kmnist --root"):
        KMNIST(str(tmp_path))
    write(tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    with pytest.raises(ValueError, match="0x00000801, got 0x00000803"):
        read_idx(images, LABELS_MAGIC)
    with pytest.raises(ValueError, match="0x00000803, got 0x00000801"):
        read_idx(labels, IMAGES_MAGIC)
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match="3x28x28 values, got 2351"):
        MNIST(str(tmp_path))
    images.write_bytes(gzip.compress(idx_bytes(PIXELS))[:-20])
    with pytest.raises(ValueError, match="broken gzip"):
        MNIST(str(tmp_path))
    for stub in (b"", b"\0\0\x08\x03", b"\0\0\x08\x03\0\0\0\x02"):
        images.write_bytes(stub)
        with pytest.raises(ValueError, match="train-images"):
            MNIST(str(tmp_path))
    write(tmp_path, labels=(1, 2))
    with pytest.raises(ValueError, match="label for each of its 3 images, got 2"):
        MNIST(str(tmp_path))


def test_padding_never_shrinks(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="image_size of at least 28"):
        IdxImages(str(tmp_path), image_size=16)


def test_mnist_itself():
    root = str(data_folder("mnist"))
    train, test = MNIST(root), MNIST(root, "test", image_size=32)
    assert (len(train), len(test)) == (60000, 10000)
    # Class counts as published on the data set's page.
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert [item["class_label"] for item in (test[0], test[1], test[2])] == [7, 2, 1]
    assert test[0]["image"].shape == (32, 32, 1) and test[0]["image"].min() == -1
    # The mean and deviation that MNIST's users normalise by: 0.1307 and 0.3081 on [0, 1].
    counts, levels = train.pixels.flatten().bincount(minlength=256).double(), torch.arange(256).double() / 255
    mean = (counts * levels).sum() / counts.sum()
    assert mean.item() == pytest.approx(0.1307, abs=1e-4)
    assert ((counts * (levels - mean) ** 2).sum() / counts.sum()).sqrt().item() == pytest.approx(0.3081, abs=1e-4)
