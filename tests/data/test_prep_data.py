"""`decu data prepare` against a local server: what it fetches, verifies and unpacks is what the data sets read."""

from __future__ import annotations

import gzip
import io
import struct

import numpy as np
import pytest
import torch
from scipy.io import savemat

from ldm.checkpoint import save_checkpoint
from ldm.commands.data_prepare import PrepareData
from ldm.data.idx import MNIST
from ldm.data.imagenet import ImageNetTrain, ImageNetValidation
from ldm.data.prepare import imagenet as prepare_imagenet
from ldm.data.prepare import sources
from ldm.training import released
from tests.cli import call
from tests.data.archives import md5, packed


def test_the_script_fetches_what_the_data_set_reads(server, tmp_path, monkeypatch, capsys):
    files = {}
    for name in sources.IDX_FILES:
        shape = (2, 28, 28) if "images" in name else (2,)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(struct.pack(">i", side) for side in shape)
        files[name] = gzip.compress(header + np.ones(shape, np.uint8).tobytes())
    server.files = {f"/mirror/{name}": content for name, content in files.items()}
    command = PrepareData("mnist", root=str(tmp_path), url=f"{server.url}/mirror/")
    with pytest.raises(ValueError, match=r"mnist: .*expected md5 f68b3c2dcbeaaa9fbdd348bbdeb94873"):
        command.run()
    published = sources.list_idx_files("unused", *(md5(content) for content in files.values()))
    monkeypatch.setitem(sources.SOURCES, "mnist", published)
    call("data prepare", ["--dataset", "mnist", "--root", tmp_path, "--url", f"{server.url}/mirror/"])
    assert "mnist: ready" in capsys.readouterr().out
    assert MNIST(str(tmp_path / "mnist"), "test").labels.tolist() == [1, 1]
    asked = len(server.requests)
    command.run()
    assert len(server.requests) == asked  # nothing is fetched twice
    with pytest.raises(ValueError, match="--url goes with a single data set"):
        PrepareData("mnist,kmnist", url=server.url).run()
    with pytest.raises(ValueError, match="--dataset takes one or more of mnist"):
        PrepareData("imagenet21k").run()


def test_networks_are_checked_against_the_key_list(server, tmp_path, monkeypatch, capsys):
    keys = released.read_keys(released.KEYS_FILE)
    assert len(keys) == 906 and keys["cond_stage_model.embedding.weight"] == (1001, 512)
    assert sum(name.startswith("model.diffusion_model.") for name in keys) == 688
    # Parameters of the UNet as published: 400,920,579.
    unet = (np.prod(shape) for name, shape in keys.items() if name.startswith("model.diffusion_model."))
    assert sum(int(count) for count in unet) == 400_920_579

    small = {"betas": (4,), "first_stage_model.quant_conv.bias": (3,)}
    monkeypatch.setattr(released, "KEYS_FILE", tmp_path / "keys.txt")
    released.KEYS_FILE.write_text("".join(f"{name} {shape[0]}\n" for name, shape in small.items()))
    model = {**{name: torch.zeros(shape) for name, shape in small.items()}, "model_ema.decay": torch.zeros(())}
    save_checkpoint({"state_dict": model}, tmp_path / "served.ckpt")
    save_checkpoint({"quant_conv.bias": torch.zeros(3), "loss.logvar": torch.zeros(())}, tmp_path / "stage.ckpt")
    archive = packed(tmp_path / "vq.zip", {"model.ckpt": (tmp_path / "stage.ckpt").read_bytes()})
    served = (tmp_path / "served.ckpt").read_bytes()
    server.files = {"/vq-f4.zip": archive.read_bytes(), "/model.ckpt": served}
    command = PrepareData("pretrained", models_root=str(tmp_path / "nets"), url=server.url)
    with pytest.raises(ValueError, match="expected 1827378153 bytes"):
        command.run()
    stage = sources.PublishedFile("", "vq-f4.zip", folder="vae")
    monkeypatch.setitem(sources.SOURCES, "pretrained", [stage, sources.PublishedFile("", "model.ckpt", folder="cin")])
    command.run()
    assert capsys.readouterr().out.count("as released") == 2 and (tmp_path / "nets/vae/model.ckpt").exists()
    for change, told in (
        ({"betas": torch.zeros(5)}, r"1 of another shape \(betas\)"),
        ({"other": torch.zeros(1)}, r"1 unknown \(other\)"),
    ):
        save_checkpoint({"state_dict": {**model, **change}}, tmp_path / "changed.ckpt", overwrite=True)
        with pytest.raises(ValueError, match=told):
            released.check_keys(tmp_path / "changed.ckpt", released.read_keys(released.KEYS_FILE))
    with pytest.raises(ValueError, match=r"2 missing \(betas, first"):
        released.check_keys(tmp_path / "stage.ckpt", small)


def imagenet_tars(folder):
    """Two classes of two images, three validation images, and a devkit whose numbering is not the sorted one."""
    folder.mkdir(parents=True)
    synsets = {"n02": "bullfrog", "n01": "goldfish, Carassius auratus"}
    images = {f"{synset}_{index}.JPEG": f"{synset}{index}".encode() for synset in synsets for index in range(2)}
    tars = {}
    for synset in synsets:
        own = {name: content for name, content in images.items() if name.startswith(synset)}
        tars[f"{synset}.tar"] = packed(folder / "inner.tar", own).read_bytes()
    (folder / "inner.tar").unlink()
    packed(folder / prepare_imagenet.TRAIN_TAR, tars)
    validation = {f"ILSVRC2012_val_{number}.JPEG": str(number).encode() for number in (3, 1, 2)}
    packed(folder / prepare_imagenet.VAL_TAR, validation)
    fields = [("ILSVRC2012_ID", int), ("WNID", object), ("words", object), ("num_children", int)]
    rows = [(1, "n02", "bullfrog", 0), (2, "n01", "goldfish, Carassius auratus", 0), (3, "n00", "animal", 2)]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=fields)})
    top = "ILSVRC2012_devkit_t12/data/"
    devkit = {f"{top}meta.mat": buffer.getvalue(), f"{top}ILSVRC2012_validation_ground_truth.txt": b"2\n1\n2\n"}
    packed(folder / prepare_imagenet.DEVKIT, devkit)


def test_imagenet_is_unpacked_into_the_layout_that_is_read(tmp_path, monkeypatch, capsys):
    command = PrepareData("imagenet", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"after a login(.|\n)*ILSVRC2012_img_train\.tar(.|\n)*put them into"):
        command.run()
    folder = tmp_path / "imagenet"
    imagenet_tars(folder)
    with pytest.raises(ValueError, match="not the published file"):
        command.run()
    tars = {name: md5((folder / name).read_bytes()) for name in prepare_imagenet.TARS}
    monkeypatch.setattr(prepare_imagenet, "MD5", tars)
    mine = folder / "data_train/data/n01/n01_0.JPEG"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    command.run()
    assert mine.read_bytes() == b"mine"
    train, val = ImageNetTrain(False, str(folder)), ImageNetValidation(False, str(folder))
    assert train.relpaths == [f"n0{number}/n0{number}_{index}.JPEG" for number in (1, 2) for index in range(2)]
    assert train.labels.tolist() == [0, 0, 1, 1] and train[0]["human_label"] == "goldfish, Carassius auratus"
    # Validation images 1, 2, 3 have the devkit's numbers 2, 1, 2: n01, n02, n01.
    assert val.relpaths == [f"n0{one}/ILSVRC2012_val_{number}.JPEG" for one, number in ((1, 1), (1, 3), (2, 2))]
    assert val.labels.tolist() == [0, 0, 1]
    assert (folder / "data_val/data/n02/ILSVRC2012_val_2.JPEG").read_bytes() == b"2"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    command.run()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
