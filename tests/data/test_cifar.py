"""CIFAR-10's three forms agree, and a pickle that would run something is refused."""

from __future__ import annotations

import os
import pickle
import pickletools

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.cifar import CIFAR10, CLASS_NAMES
from ldm.data.safe_pickle import load_plain
from tests.conftest import data_folder

COUNT = 4


def rows(batch: int) -> tuple[np.ndarray, list[int]]:
    """Rows as published: 1,024 red, then green, then blue values."""
    draws = torch.randint(256, (COUNT, 3072), generator=torch.Generator().manual_seed(batch), dtype=torch.uint8)
    return draws.numpy(), [(batch + row) % 10 for row in range(COUNT)]


NAMES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


def write_python(folder):
    folder.mkdir()
    for batch, name in enumerate(NAMES):
        data, labels = rows(batch)
        content = {b"batch_label": b"x", b"data": data, b"labels": labels, b"filenames": [b"a.png"] * COUNT}
        (folder / name).write_bytes(pickle.dumps(content, protocol=3))


def write_binary(folder):
    folder.mkdir()
    for batch, name in enumerate(NAMES):
        data, labels = rows(batch)
        records = np.concatenate([np.array(labels, np.uint8)[:, None], data], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())


def write_folders(folder):
    for batch, name in enumerate(NAMES):
        for row, (pixels, label) in enumerate(zip(*rows(batch), strict=True)):
            path = folder / ("test" if name == "test_batch" else "train") / CLASS_NAMES[label] / f"{batch}{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.merge("RGB", [Image.fromarray(plane) for plane in pixels.reshape(3, 32, 32)]).save(path)


def items(data) -> set:
    return {(item["human_label"], tuple(item["image"].flatten().tolist())) for item in data}


def test_the_three_forms_hold_the_same_images(tmp_path):
    write_python(tmp_path / "cifar-10-batches-py")
    write_binary(tmp_path / "cifar-10-batches-bin")
    write_folders(tmp_path)
    for split, count in (("train", 20), ("test", 4)):
        sets = [CIFAR10(str(tmp_path), split, layout=layout) for layout in ("python", "binary", "folders")]
        assert [len(data) for data in sets] == [count] * 3
        assert items(sets[0]) == items(sets[1]) == items(sets[2])
        assert sets[2].labels.tolist() == [item["class_label"] for item in sets[2]]
    data, labels = rows(0)
    item = CIFAR10(str(tmp_path / "cifar-10-batches-py"))[2]
    assert item["class_label"] == labels[2] and item["image"].shape == (32, 32, 3)
    assert item["image"][5, 7, 1].item() == pytest.approx(data[2, 1024 + 5 * 32 + 7] / 127.5 - 1, abs=1e-6)
    assert CIFAR10(str(tmp_path), image_size=16)[0]["image"].shape == (16, 16, 3)


def test_absent_or_damaged_batches_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"decu data prepare --dataset cifar10"):
        CIFAR10(str(tmp_path))
    write_binary(tmp_path / "cifar-10-batches-bin")
    path = tmp_path / "cifar-10-batches-bin/data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin must hold records of 3073"):
        CIFAR10(str(tmp_path))
    batch = tmp_path / "data_batch_1"
    for content, message in (
        ({b"data": np.zeros((2, 9), np.uint8), b"labels": [1, 2]}, r"\[2, 3072\], got uint8 \[2, 9\]"),
        ({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}, "got float64"),
        ({b"data": 1}, "'labels'"),
        ([1, 2], "'labels'"),
    ):
        batch.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=message):
            CIFAR10(str(tmp_path))


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("arrays", [False, True])
def test_a_pickle_that_names_anything_else_is_refused_unrun(tmp_path, arrays):
    path, mark = tmp_path / "data_batch_1", tmp_path / "mark"
    for evil in (Call(os.mkdir, str(mark)), Call(eval, "1"), Call(getattr, {}, "clear"), torch.zeros(1), print):
        path.write_bytes(pickle.dumps({b"data": evil, b"labels": [1]}))
        with pytest.raises(ValueError, match="refused: it names"):
            load_plain(path, arrays=arrays)
    assert not mark.exists()
    path.write_bytes(pickle.dumps({"data": np.zeros(2)}))
    assert arrays == ("it names" not in outcome(path, arrays))
    for junk in (b"", b"junk", pickle.dumps([1, 2])[:-1], b"\x80\x05K\x01R."):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="refused"):
            load_plain(path, arrays=arrays)


def outcome(path, arrays) -> str:
    try:
        return str(load_plain(path, arrays=arrays))
    except ValueError as error:
        return str(error)


def test_pickles_as_python_2_wrote_them_are_read(tmp_path):
    # The published batches are protocol 2 with byte strings (op codes U and T) and numpy 1 module names.
    values = np.arange(3072, dtype=np.uint8)
    text = (
        b"\x80\x02}(U\x04data" + b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T\x00\x0c\x00\x00" + values.tobytes() + b"tb" + b"U\x06labels]K\x03au."
    )
    assert "GLOBAL" in {code.name for code, _, _ in pickletools.genops(text)}  # raises where it is malformed
    for name in NAMES:
        (tmp_path / name).write_bytes(text)
    data = CIFAR10(str(tmp_path))
    assert data.labels.tolist() == [3] * 5
    assert torch.equal(data.pixels[0].permute(2, 0, 1).flatten(), torch.from_numpy(values))


def test_cifar_itself_from_its_zip():
    data = CIFAR10(str(data_folder("cifar10") / "cifar10_jpg.zip"), "test")
    assert len(data) == 10000 and data.labels.bincount().tolist() == [1000] * 10
    item = data[2500]
    assert item["human_label"] == "bird" and item["relpath"].startswith("test/bird/")
    assert item["image"].shape == (32, 32, 3) and item["image"].std() > 0.1
