"""Archives are unpacked safely and resumed; damaged ones are told."""

from __future__ import annotations

import tarfile
import zipfile

import pytest

from ldm.data.prepare.archives import check_whole, unpack
from tests.data.archives import packed


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_unpacking_writes_resumes_and_never_overwrites(tmp_path, name):
    archive = packed(tmp_path / name, {"d/one": b"1", "d/e/two": b"22"})
    out = tmp_path / "out"
    assert unpack(archive, out) == [out / "d/one", out / "d/e/two"]
    assert (out / "d/one").read_bytes() == b"1" and (out / "d/e/two").read_bytes() == b"22"
    (out / "d/e/two").unlink()
    (out / "d/one").write_bytes(b"m")  # mine, of the same length
    unpack(archive, out)
    assert (out / "d/e/two").read_bytes() == b"22" and (out / "d/one").read_bytes() == b"m"
    (out / "d/one").write_bytes(b"longer")
    (out / "d/e/two").unlink()
    with pytest.raises(ValueError, match="6 bytes, not 1"):
        unpack(archive, out)
    assert (out / "d/one").read_bytes() == b"longer" and not (out / "d/e/two").exists()


@pytest.mark.parametrize("name", ["x.zip", "x.tar"])
@pytest.mark.parametrize("member", ["../escaped", "/tmp/escaped", "a/../../escaped", "C:/escaped", "..\\escaped"])
def test_an_archive_cannot_write_elsewhere(tmp_path, name, member):
    archive = packed(tmp_path / name, {"fine": b"1", member: b"2"})
    with pytest.raises(ValueError, match="refusing to unpack"):
        unpack(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_links_and_damaged_archives_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    with pytest.raises(ValueError, match="no plain file"):
        unpack(tmp_path / "x.tar", tmp_path / "out")
    (tmp_path / "y.tar").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="damaged") as refused:
        unpack(tmp_path / "y.tar", tmp_path / "out")
    assert "\n" not in str(refused.value)
    content = packed(tmp_path / "z.zip", {"one": b"a" * 100}).read_bytes()
    (tmp_path / "z.zip").write_bytes(content.replace(b"a" * 100, b"a" * 99 + b"b"))
    with pytest.raises(ValueError, match="damaged"):
        unpack(tmp_path / "z.zip", tmp_path / "out")
    assert not (tmp_path / "out/one").exists()


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_bits_that_turned_inside_compressed_data_are_told(tmp_path, name):
    pattern = bytes(range(256)) * 400
    if name == "x.zip":
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as content:
            content.writestr("one", pattern)
    else:
        packed(tmp_path / name, {"one": pattern})
    whole = (tmp_path / name).read_bytes()
    for place in range(60, len(whole) - 200, 37):
        content = bytearray(whole)
        content[place] ^= 0x55
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no archive"):
            unpack(tmp_path / name, tmp_path / f"out{place}")
        assert not list((tmp_path / f"out{place}").rglob("*"))


def test_a_checkpoint_is_compared_with_its_own_checksums(tmp_path):
    path = packed(tmp_path / "x.zip", {"fine": b"1" * 50, "data": b"a" * 50})
    check_whole(path)
    path.write_bytes(path.read_bytes().replace(b"a" * 50, b"a" * 49 + b"b"))
    with pytest.raises(ValueError, match=r"damaged \(its part data\)"):
        check_whole(path)
    (tmp_path / "old.pt").write_bytes(b"no zip file")
    check_whole(tmp_path / "old.pt")
