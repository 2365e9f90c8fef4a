"""Sets of images: every form gives the same bytes in an order that is told."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.data.digits import Digits
from ldm.pipelines.images import Chosen, DataSetImages, NpzImages, TensorImages, as_bytes, load_images, positions_of
from ldm.training.data_words import read_data_config
from ldm.util import generator

PIXELS = torch.randint(256, (7, 6, 5, 3), generator=generator("sources"), dtype=torch.uint8)  # [N, H, W, C]
EXPECTED = PIXELS.permute(0, 3, 1, 2)
# Out of order on purpose, and not in the order of numbers.
NAMES = ("b/10.png", "a.png", "b/2.png", "c.png", "b/1.png", "z.png", "m.png")


def write_folder(root):
    for name, image in zip(NAMES, PIXELS.numpy(), strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
    return root


def test_a_folder_and_its_zip_are_sorted_by_path(tmp_path):
    folder = write_folder(tmp_path / "pictures")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as file:
        for name in NAMES:
            file.write(folder / name, name)
    order = sorted(range(7), key=lambda i: NAMES[i])
    for path in (folder, tmp_path / "pictures.zip"):
        source = load_images(path)
        assert source.names == sorted(NAMES) and len(source) == 7
        assert torch.equal(source.read(0, 7), EXPECTED[order])
        assert torch.equal(source.read(5, 99), EXPECTED[order[5:]])
    assert source.describe()["names_sha256"] == load_images(folder).describe()["names_sha256"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_rows_are_read_where_they_lie(tmp_path, save):
    save(tmp_path / "a.npz", other=np.zeros(3), arr_0=PIXELS.numpy(), arr_1=np.arange(7))
    source = NpzImages(tmp_path / "a.npz")
    assert len(source) == 7 and torch.equal(source.read(3, 5), EXPECTED[3:5])
    assert torch.equal(source.read(6, 20), EXPECTED[6:]) and torch.equal(source.read(0, 7), EXPECTED)
    source = pickle.loads(pickle.dumps(source))
    assert torch.equal(torch.cat([source.read(start, start + 2) for start in (0, 2, 4, 6, 7)]), EXPECTED)
    assert (source.rows.stored is None) == (save is np.savez_compressed)


def test_tensors_of_every_layout_give_the_same_bytes(tmp_path):
    save_file({"images": EXPECTED.contiguous(), "labels": torch.arange(7)}, tmp_path / "a.safetensors")
    torch.save(PIXELS, tmp_path / "b.pt")
    torch.save({"whatever": EXPECTED.float() / 127.5 - 1}, tmp_path / "c.pt")
    for name in ("a.safetensors", "b.pt", "c.pt"):
        assert torch.equal(load_images(tmp_path / name).read(2, 6), EXPECTED[2:6])


def test_data_sets_give_bytes_in_their_order():
    data = Digits("test")
    source = DataSetImages(data)
    images, labels = source.everything()
    assert images.shape == (359, 1, 8, 8) and torch.equal(labels, data.labels)
    expected = ((data[5]["image"][:, :, 0] + 1) * 127.5).round()
    assert torch.equal(images[5, 0].float(), expected) and torch.equal(source.read(5, 6), images[5:6])


def test_chosen_images_come_in_the_order_of_the_list(tmp_path):
    source = load_images(write_folder(tmp_path))
    words = ["m.png", "", "0", "b/2.png", "3"]
    chosen = Chosen(source, positions_of(source, words), "a list")
    whole = source.read(0, 7)
    places = [sorted(NAMES).index("m.png"), 0, sorted(NAMES).index("b/2.png"), 3]
    assert torch.equal(chosen.read(0, 4), whole[places]) and torch.equal(chosen.read(1, 3), whole[places[1:3]])
    with pytest.raises(ValueError, match="neither the path"):
        positions_of(source, ["d.png"])
    with pytest.raises(ValueError, match=r"0\.\.6"):
        Chosen(source, [7], "a list")


def test_what_holds_no_images_says_so(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(3))
    np.savez(tmp_path / "f.npz", arr_0=np.zeros((2, 4, 4, 3), np.float32))
    torch.save({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "x.pt")
    for name, match in (("s.npz", "arr_0"), ("f.npz", "uint8"), ("x.pt", "one tensor")):
        with pytest.raises(ValueError, match=match):
            load_images(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_images(tmp_path / "none")
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        as_bytes(torch.zeros(1, 3, 4, 4, dtype=torch.int64), "x")
    with pytest.raises(ValueError, match="four axes"):
        TensorImages(torch.zeros(3, 4, 4))


def test_pictures_of_different_sizes_need_a_size(tmp_path):
    for name, size in (("a.png", (8, 6)), ("b.png", (12, 12))):
        Image.new("RGB", size, (10, 200, 30)).save(tmp_path / name)
    with pytest.raises(ValueError, match="--image_size"):
        load_images(tmp_path).read(0, 2)
    scaled = load_images(tmp_path, image_size=6).read(0, 2)
    assert scaled.shape == (2, 3, 6, 6) and scaled[:, 1].unique().tolist() == [200]
    assert load_images(tmp_path, channels=1, image_size=4).read(0, 1).shape == (1, 1, 4, 4)


def test_words_name_a_data_set():
    config = read_data_config(["target=ldm.data.digits.Digits", "params.split=test"])
    assert config == {"target": "ldm.data.digits.Digits", "params": {"split": "test"}}
    config = read_data_config(["configs/evaluation/mnist.yaml:validation", "paths.data_root=there"])
    assert config["params"] == {"root": "there", "split": "test"}
    with pytest.raises(ValueError, match=r"mnist\.yaml:train, .*mnist\.yaml:validation"):
        read_data_config(["configs/evaluation/mnist.yaml"])
    with pytest.raises(ValueError, match="target="):
        read_data_config(["params.split=test"])


def test_images_that_were_replaced_are_told_apart(tmp_path):
    """Other content under the same names and of the same size; a copy of the same content is the same."""
    told = []
    for shift in (0, 1, 0):
        np.savez(tmp_path / "a.npz", arr_0=PIXELS.numpy() ^ shift)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        for place, pixels in enumerate(PIXELS.numpy() ^ shift):
            Image.fromarray(pixels).save(tmp_path / "pictures" / f"{place}.png")
        found = [load_images(tmp_path / name).describe() for name in ("a.npz", "pictures")]
        told.append([one.pop("content_sha256") for one in found])
    assert told[0] == told[2] and told[0][0] == told[0][1] and told[0][0] != told[1][0] == told[1][1]
