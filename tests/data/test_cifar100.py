"""CIFAR-100's two forms hold the same images, under fine and coarse labels."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from ldm.data.cifar100 import CIFAR100
from ldm.data.prepare.sources import SOURCES

COUNT = 4
FINE, COARSE = ["apple", "baby", "castle"], ["food", "people"]


def rows(split):
    seed = 0 if split == "train" else 1
    pixels = torch.randint(256, (COUNT, 3072), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return pixels.numpy(), [0, 1, 2, 1], [0, 1, 0, 1]


def write_python(folder):
    folder.mkdir()
    for split in ("train", "test"):
        data, fine, coarse = rows(split)
        content = {b"data": data, b"fine_labels": fine, b"coarse_labels": coarse, b"filenames": [b"a.png"] * COUNT}
        (folder / split).write_bytes(pickle.dumps(content, protocol=3))
    names = {b"fine_label_names": [name.encode() for name in FINE], b"coarse_label_names": COARSE}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=3))


def write_binary(folder):
    folder.mkdir()
    for split in ("train", "test"):
        data, fine, coarse = rows(split)
        labels = np.array([coarse, fine], np.uint8).T
        (folder / f"{split}.bin").write_bytes(np.concatenate([labels, data], axis=1).tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(COARSE) + "\n")


def test_both_forms_and_both_labels(tmp_path):
    write_python(tmp_path / "cifar-100-python")
    write_binary(tmp_path / "cifar-100-binary")
    for split in ("train", "test"):
        for labels, names, place in (("fine", FINE, 1), ("coarse", COARSE, 2)):
            python = CIFAR100(str(tmp_path), split, labels)
            binary = CIFAR100(str(tmp_path / "cifar-100-binary"), split, labels)
            assert python.class_names == binary.class_names == names
            assert python.labels.tolist() == binary.labels.tolist() == rows(split)[place]
            assert torch.equal(python.pixels, binary.pixels)
    item = CIFAR100(str(tmp_path), image_size=16)[2]
    assert item["image"].shape == (16, 16, 3) and item["human_label"] == "castle"
    assert python[0]["image"][5, 7, 1].item() == pytest.approx(rows("test")[0][0, 1024 + 5 * 32 + 7] / 127.5 - 1)


def test_absent_or_damaged_batches_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"decu data prepare --dataset cifar100"):
        CIFAR100(str(tmp_path))
    write_binary(tmp_path / "cifar-100-binary")
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(b"\0" * 3073)
    with pytest.raises(ValueError, match=r"records of 3074 bytes"):
        CIFAR100(str(tmp_path))
    for content, message in (([1], "must hold a mapping"), ({b"data": 1, b"labels": 2}, "'fine_labels'")):
        (tmp_path / "train").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=message):
            CIFAR100(str(tmp_path))
    (source,) = SOURCES["cifar100"]
    assert source.name == "cifar-100-python.tar.gz" and source.md5 == "eb9058c3a382ffc7106e4002c42a8d85"
