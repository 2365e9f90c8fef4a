"""Checkpoints: what loads, what is refused, and that nothing half-written is left behind."""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.checkpoint import averaged, load_into, load_state_dict, save_checkpoint, save_tensors, sha256
from ldm.modules.ema import LitEma


class Touch:
    """Unpickling this creates a file: the mark of executed code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_round_trips_and_lightning_wrapping(tmp_path):
    state = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3)}
    save_checkpoint({"state_dict": state, "epoch": 3}, tmp_path / "x.ckpt")
    save_tensors(state, tmp_path / "x.safetensors")
    for name in ("x.ckpt", "x.safetensors"):
        loaded = load_state_dict(tmp_path / name)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_malicious_pickle_is_refused_without_running(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"state_dict": {"w": Touch(mark)}}, tmp_path / "bad.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Touch(mark)))
    for name in ("bad.ckpt", "plain.ckpt"):
        with pytest.raises(ValueError, match=r"was refused.*nsupported") as told:
            load_state_dict(tmp_path / name)
        assert "weights_only" not in str(told.value), "no advice to run what was refused"
    assert not mark.exists()
    torch.load(tmp_path / "bad.ckpt", weights_only=False)
    assert mark.exists(), "the file would have run code, had it been unpickled freely"


def test_truncated_file_is_an_error(tmp_path):
    save_checkpoint({"w": torch.randn(100)}, tmp_path / "x.ckpt")
    (tmp_path / "y.ckpt").write_bytes((tmp_path / "x.ckpt").read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        load_state_dict(tmp_path / "y.ckpt")


@pytest.mark.parametrize("part", ["data.pkl", "data/0", "data/1", "version"])
def test_a_flipped_byte_is_found_by_the_checksum_of_its_part(part, tmp_path):
    """torch compares no checksums: a weight of another value would be taken."""
    file = tmp_path / "x.ckpt"
    save_checkpoint({"state_dict": {"a": torch.randn(300), "b": torch.randn(300)}}, file)
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith(f"/{part}"))
        content = archive.read(name)
    whole = file.read_bytes()
    place = whole.index(content) + len(content) // 2
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=rf"x\.ckpt is no checkpoint: it is damaged: its part {name} is not what was"):
        load_state_dict(file)


def test_a_file_without_checksums_is_taken(tmp_path):
    """torch leaves them out where it is asked to."""
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint({"a": torch.arange(3.0)}, tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(computed)
    assert torch.equal(load_state_dict(tmp_path / "x.ckpt")["a"], torch.arange(3.0))


def test_strict_loading_lists_every_difference():
    module = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"(?s)1 missing, 1 unknown, 1 of another shape.*bias.*extra.*\(2, 2\)"):
        load_into(module, {"weight": torch.zeros(2, 2), "extra": torch.zeros(1)})
    before = module.bias.clone()
    load_into(module, {"weight": torch.ones(3, 2), "loss.extra": torch.zeros(1)}, ignore=["loss.*", "bias"])
    assert torch.equal(module.weight, torch.ones(3, 2))
    assert torch.equal(module.bias, before)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3, 2).to_sparse(),
        torch.ones(3, 2, dtype=torch.complex64),
        torch.ones(3, 2, dtype=torch.int8),
    ],
    ids=["sparse", "complex", "bytes"],
)
def test_numbers_that_stand_for_others_are_refused(value):
    with pytest.raises(ValueError, match=r"^x\.ckpt holds sparse, complex or quantised tensors.*: weight$"):
        load_into(nn.Linear(2, 3), {"weight": value, "bias": torch.zeros(3)}, file="x.ckpt")


@pytest.mark.parametrize("content", [None, "text", 5, torch.zeros(2), {1: torch.zeros(2)}])
def test_what_has_no_names_is_no_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt (is not a state dict|is no checkpoint)"):
        load_state_dict(tmp_path / "x.ckpt")


def test_averaged_puts_the_ema_copies_in_place():
    model = nn.Module()
    model.model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model.model_ema = LitEma(model.model)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(1)
    state = averaged(model.state_dict())
    assert sorted(state) == [f"model.{name}" for name in sorted(model.model.state_dict())]
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(state[f"model.{name}"], parameter - 1)


def test_writes_are_whole_and_not_silent(tmp_path):
    path = tmp_path / "x.ckpt"
    save_checkpoint({"w": torch.zeros(1)}, path)
    first = sha256(path)
    with pytest.raises(FileExistsError):
        save_checkpoint({"w": torch.ones(1)}, path)
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint({"w": lambda: None}, path, overwrite=True)
    assert sha256(path) == first
    assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]


def test_tensors_are_written_under_one_name_and_for_all_who_may_read(tmp_path, monkeypatch):
    """A library's own temporary file would outlive a kill: nothing but the partial file may ever be there."""
    seen = []
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (seen.extend(os.listdir(tmp_path)), flush(file)))
    save_tensors({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    assert len(seen) == 1 and ".partial" in seen[0] and os.listdir(tmp_path) == ["x.safetensors"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_hash_of_a_file_follows_its_content(tmp_path):
    for content in (b"one", b"two"):
        (tmp_path / "a").write_bytes(content)
        assert sha256(tmp_path / "a") == sha256(str(tmp_path / "a")) == hashlib.sha256(content).hexdigest()


def test_the_same_content_gives_the_same_bytes(tmp_path):
    """A trunk that is written twice is one trunk: components name theirs by its hash."""
    content = {"state_dict": {"a": torch.arange(5.0)}, "step": 3}
    for name in ("one.ckpt", "two.ckpt"):
        save_checkpoint(content, tmp_path / name)
    assert (tmp_path / "one.ckpt").read_bytes() == (tmp_path / "two.ckpt").read_bytes()
