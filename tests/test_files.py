"""Files that are read back: damage is told with the file, and a failed write with the name that a user knows."""

import errno
import json

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from ldm.checkpoint import load_state_dict
from ldm.files import read_json, read_mapping, reading
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


def test_other_errors_of_a_write_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), atomic_write(tmp_path / "last.ckpt"):
        raise RuntimeError("shapes do not fit")
