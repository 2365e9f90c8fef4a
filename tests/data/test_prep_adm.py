"""ADM's models and data from a local server: checked against configs and lists, resumed, nothing overwritten."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import save_checkpoint
from ldm.commands.data_prepare import PrepareData
from ldm.data.folder import ImageFolder
from ldm.data.prepare import ffhq as prepare_ffhq
from ldm.data.prepare import lsun as prepare_lsun
from ldm.data.prepare import sources
from ldm.training import released
from ldm.training.config import packaged_configs
from tests.data.archives import md5, packed
from tests.models.test_classifier_training import ENCODER, classifier


def picture(kind: str, shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(content, kind)
    return content.getvalue()


def test_released_models_are_checked_against_their_configs(server, tmp_path, monkeypatch, capsys):
    (tmp_path / "guided-diffusion").mkdir()
    OmegaConf.save(OmegaConf.create({"model": ENCODER}), tmp_path / "guided-diffusion" / "imagenet-128-classifier.yaml")
    monkeypatch.setattr(released, "packaged_configs", lambda: tmp_path)
    state = classifier().classifier.state_dict()
    save_checkpoint({name: value.half() for name, value in state.items()}, tmp_path / "served.pt")
    server.files = {"/imagenet-128-classifier.pt": (tmp_path / "served.pt").read_bytes()}
    command = PrepareData("adm", only="imagenet-128-classifier", url=server.url, models_root=str(tmp_path / "nets"))
    command.run()
    assert (tmp_path / "nets" / "adm" / "imagenet-128-classifier.pt").exists()
    assert f"all {len(state)} keys and shapes as released" in capsys.readouterr().out
    asked = len(server.requests)
    command.run()
    assert len(server.requests) == asked, "nothing is fetched twice"
    server.pages = {"/imagenet-128-classifier.pt": "<!DOCTYPE html> Too many users have viewed this file"}
    with pytest.raises(ValueError, match=r"a web page in place of the file: 'Too many users have viewed this file'"):
        replace(command, models_root=str(tmp_path / "others")).run()
    mine = tmp_path / "nets" / "adm" / "imagenet-128-classifier.pt"
    content = bytearray(mine.read_bytes())
    content[len(content) // 2] ^= 1
    mine.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged \(its part .*move it away"):
        command.run()
    for wrong in (PrepareData("mnist", only="cifar10-32"), PrepareData("adm", only="cifar100")):
        with pytest.raises(ValueError, match="--only goes with --dataset adm or latent-diffusion"):
            wrong.run()


def test_every_released_model_has_its_config():
    folder = packaged_configs() / "guided-diffusion"
    assert all((folder / f"{name}.yaml").is_file() for name in sources.ADM)
    assert len({source.url for source in sources.SOURCES["adm"]}) == 6


def test_ffhq_is_verified_file_by_file(server, tmp_path, monkeypatch):
    contents = {f"thumbnails128x128/00000/{k:05d}.png": picture("png", 10 * k) for k in range(3)}
    entries = {
        str(k): {
            "thumbnail": {"file_path": name, "file_size": len(content), "file_md5": md5(content), "file_url": "?id=X"}
        }
        for k, (name, content) in enumerate(contents.items())
    }
    listing = json.dumps(entries).encode()
    served = {"/list.json": listing, **{f"/{name}": content for name, content in contents.items()}}
    server.files = dict(served)
    source = sources.PublishedFile("", "list.json", len(listing), md5(listing), url="http://127.0.0.1:1/never")
    monkeypatch.setitem(sources.SOURCES, "ffhq", [source])
    command = PrepareData("ffhq", root=str(tmp_path), url=server.url)
    broken = f"/{next(iter(contents))}"
    server.files[broken] = contents[broken[1:]][:-1] + b"?"
    with pytest.raises(ValueError, match="expected md5"):
        command.run()
    (tmp_path / "ffhq" / f"{broken[1:]}.rejected").unlink()
    server.files = dict(served)
    command.run()
    data = ImageFolder(str(tmp_path / "ffhq"), image_size=8)
    assert len(data) == 3 and float(data[2]["image"][0, 0, 0]) == pytest.approx(20 / 127.5 - 1, abs=1e-5)
    asked = len(server.requests)
    command.run()
    assert len(server.requests) == asked
    (tmp_path / "ffhq" / broken[1:]).write_bytes(b"mine")
    with pytest.raises(ValueError, match="move it away"):
        command.run()
    assert prepare_ffhq.published_address(entries["0"]["thumbnail"]) == prepare_ffhq.drive_url("X")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="not FFHQ's list"):
        prepare_ffhq.read_entries(tmp_path / "x.json")


def test_towers_are_exported_and_resumed(server, tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    monkeypatch.setattr(prepare_lsun, "TOWER", {"tower_train": 3, "tower_val": 1})
    pictures = {
        "tower_train": {f"{k}ab{k % 2}": picture("webp", 20 * k) for k in range(3)},
        "tower_val": {"x": picture("jpeg", 9)},
    }
    for name, records in pictures.items():
        with (
            lmdb.open(str(tmp_path / f"{name}_lmdb"), map_size=1 << 20) as environment,
            environment.begin(write=True) as put,
        ):
            for key, content in records.items():
                put.put(key.encode(), content)
        members = {f"{name}_lmdb/data.mdb": (tmp_path / f"{name}_lmdb" / "data.mdb").read_bytes()}
        server.files[f"/{name}_lmdb.zip"] = packed(tmp_path / f"{name}.zip", members).read_bytes()
    monkeypatch.setitem(
        sources.SOURCES, "lsun-tower", [sources.PublishedFile("", f"{name}_lmdb.zip") for name in pictures]
    )
    command = PrepareData("lsun-tower", root=str(tmp_path / "data"), url=server.url)
    command.run()
    images = tmp_path / "data" / "lsun-tower" / "images"
    data = ImageFolder(str(images), folder="tower_train", image_size=8)
    assert (
        len(data) == 3 and (images / "tower_train" / "b0" / "0ab0.webp").read_bytes() == pictures["tower_train"]["0ab0"]
    )
    (images / "tower_train" / "b0" / "0ab0.webp").unlink()
    command.run()
    assert (images / "tower_train" / "b0" / "0ab0.webp").exists()
    (images / "tower_train" / "b0" / "0ab0.webp").write_bytes(b"mine")
    with pytest.raises(ValueError, match="move it away"):
        command.run()
    with pytest.raises(ValueError, match="holds 3 pictures, the published database 4"):
        prepare_lsun.export(tmp_path / "tower_train_lmdb", tmp_path / "out", 4)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    for attempt in (
        prepare_lsun.database,
        lambda folder: PrepareData("lsun-tower", root=str(folder)).run(),
    ):
        with pytest.raises(ValueError, match=r"pip install 'decu-uncertainty\[lsun\]'"):
            attempt(tmp_path)
    with pytest.raises(ValueError, match="no webp, jpg or png"):
        prepare_lsun.detect_suffix(b"GIF89a")
