"""Files that are read back: damage is told with the file, and a failed write with the name that a user knows."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open

from ldm.checkpoint import load_state_dict, save_tensors
from ldm.files import (
    check_writable,
    open_array,
    read_arrays,
    read_json,
    read_mapping,
    read_metadata,
    reading,
    write_arrays,
)
from ldm.util import atomic_write

BROKEN = ["", "[1, 2", "- a\n- b\n", "a: [", "\x00\x01", "just words", "!!python/object/apply:os.getcwd []"]


@pytest.mark.parametrize("text", BROKEN)
def test_a_record_that_is_damaged_is_named(text, tmp_path):
    file = tmp_path / "record.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"record\.yaml .*is not the record of a test.*: make it again") as caught:
        read_mapping(file, "the record of a test", required=("a",))
    assert "\n" not in str(caught.value)


def test_a_record_without_a_key_names_it(tmp_path):
    file = tmp_path / "record.yaml"
    file.write_text("a: 1\n")
    assert read_mapping(file, "a record", required=("a",)) == {"a": 1}
    with pytest.raises(ValueError, match="it lacks b, c"):
        read_mapping(file, "a record", required=("a", "b", "c"))


def test_numbers_of_json_stay_numbers(tmp_path):
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"rate": 1e-5}))
    assert read_mapping(file, "a record") == {"rate": 1e-5} == read_json(file, "a record")


def test_bytes_that_are_no_text_are_named(tmp_path):
    file = tmp_path / "record.json"
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"record\.json is damaged"):
        read_json(file, "a record")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 64])
def test_weights_that_are_damaged_are_named(content, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    with pytest.raises(SafetensorError):
        safe_open(file, framework="pt")
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        load_state_dict(file)


def test_arrays_that_are_damaged_are_named(tmp_path):
    file = tmp_path / "array.npy"
    np.save(file, np.zeros(9))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"array\.npy is damaged"), reading(file, "an array", "make it again"):
        np.load(file)


def save_npz(file, **arrays):
    with open(file, "wb") as opened:
        np.savez(opened, **arrays)


def test_arrays_are_read_by_name_and_opened_by_shape(tmp_path):
    save_npz(tmp_path / "a.npz", x=np.arange(3), y=np.ones(2))
    assert list(read_arrays(tmp_path / "a.npz", ["y"], "arrays")) == ["y"]
    assert list(read_arrays(tmp_path / "a.npz", None, "arrays")) == ["x", "y"]
    np.save(tmp_path / "a.npy", np.ones((4, 2)))
    assert open_array(tmp_path / "a.npy", "an array", shape=(None, 2)).shape == (4, 2)


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_are_written_whole_or_not_at_all(compressed, tmp_path):
    file = tmp_path / "folder" / "a.npz"
    x, y = np.arange(3.0), np.zeros((100, 100))
    write_arrays(file, {"x": x, "y": y}, compressed=compressed)
    content = np.load(file)
    assert content.files == ["x", "y"]
    np.testing.assert_array_equal(content["x"], x)
    assert (file.stat().st_size < y.nbytes) == compressed
    with pytest.raises(FileExistsError):
        write_arrays(file, {"x": y})
    with pytest.raises(ValueError, match=r"cannot reshape|inhomogeneous"):
        write_arrays(file, {"x": [[1], [2, 3]]}, overwrite=True)
    np.testing.assert_array_equal(np.load(file)["x"], x)  # what was there stays
    assert list(file.parent.iterdir()) == [file]


def test_arrays_that_are_others_are_named(tmp_path):
    file = tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"a\.npz is damaged, or is not arrays \(it has no z, but x\): make it again"):
        save_npz(file, x=np.arange(3))
        read_arrays(file, ["z"], "arrays")
    array = tmp_path / "a.npy"
    for content in (np.ones(3), np.ones((3, 5)), np.array([["a", "b"]]), np.ones((3, 2), dtype=complex)):
        np.save(array, content)
        with pytest.raises(ValueError, match=r"a\.npy is damaged, or is not an array \(it h.*: make it again"):
            open_array(array, "an array", shape=(None, 2))
    with pytest.raises(ValueError, match="it holds one array"):
        read_arrays(array, None, "arrays")
    with pytest.raises(ValueError, match="it holds several arrays"):
        open_array(file, "an array")


def test_words_beside_tensors_are_read(tmp_path):
    file = tmp_path / "a.safetensors"
    save_tensors({"x": torch.zeros(2)}, file, {"name": "n"})
    assert read_metadata(file, "name") == {"name": "n"}
    with pytest.raises(ValueError, match="it does not say its kind"):
        read_metadata(file, "name", "kind")


def test_what_was_named_within_is_named_once(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("{")
    named = pytest.raises(ValueError, match=r"a\.json is damaged, or is not inner")
    with named as caught, reading(file, "outer", "mend it"):
        read_json(file, "inner")
    assert "outer" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        RuntimeError("PytorchStreamWriter failed writing"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_write_that_fails_names_the_file_that_was_asked_for(error, tmp_path):
    file = tmp_path / "last.ckpt"
    with pytest.raises(OSError) as caught, atomic_write(file) as partial:
        partial.write_bytes(b"half")
        raise error
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(file))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_arrays_that_a_full_disk_takes_in_part_are_said_to_fill_it(tmp_path):
    """Numpy says how much was written, and not why."""
    file = tmp_path / "a.npy"
    with pytest.raises(OSError) as caught, atomic_write(file), open("/dev/full", "wb") as full:
        np.ones(2**18).tofile(full)  # as np.save writes what follows its header
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(file))


def test_other_errors_of_a_write_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), atomic_write(tmp_path / "last.ckpt"):
        raise RuntimeError("shapes do not fit")


def test_a_place_where_nothing_can_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for good in ("new", "new/deeper", "file", "."):
        check_writable(tmp_path / good)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
    for bad, number in (("file/deeper/x", errno.ENOTDIR), ("a" * 5000, errno.ENAMETOOLONG)):
        with pytest.raises(OSError) as raised:
            check_writable(tmp_path / bad)
        assert raised.value.errno == number
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != locked)  # root may write anywhere
    with pytest.raises(PermissionError, match="locked"):
        check_writable(locked / "x")
