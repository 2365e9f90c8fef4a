"""What a file is by its own bytes, whatever its name says: weights, or something else that is called what it is."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

HEAD = 512  # bytes that are looked at
SAFETENSORS = "safetensors"
PICKLE = "pickle"
_BLOCK = 2**20  # bytes that are read at once
# How files of other programs begin, and what they are.
BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself: run `git lfs pull` where it came from",
    b"\x1f\x8b": "packed by gzip: unpack it",
    b"BZh": "packed by bzip2: unpack it",
    b"\xfd7zXZ\x00": "packed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it",
    b"7z\xbc\xaf'\x1c": "a 7z archive: unpack it",
    b"Rar!": "a rar archive: unpack it",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"%PDF": "a PDF document",
    b"\x89HDF": "an HDF5 file, as Keras writes weights: save them as a state dict of torch",
    b"\x93NUMPY": "an array of NumPy: save its tensors as a state dict of torch",
    b"\x7fELF": "a program",
    b"GGUF": "a GGUF file of llama.cpp",
}


def find_kind(path: Path) -> str:
    """Return `SAFETENSORS` or `PICKLE` (what torch saves, and any other pickle) for a file of weights.

    Raises:
        ValueError: for a file that is neither, with what it is.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
    reason = _find_reason(path, head, size)
    if reason is not None:
        raise ValueError(f"{path} is no checkpoint: it is {reason}")
    return SAFETENSORS if _header_size(head) is not None else PICKLE


def _find_reason(path: Path, head: bytes, size: int) -> str | None:
    """Say what a file is that holds no weights; None for one that may."""
    if size == 0:
        return "empty: what wrote or fetched it did not finish; fetch it again"
    known = next((what for start, what in BEGINNINGS.items() if head.startswith(start)), None)
    if known is not None:
        return known
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if head.startswith(b"PK\x03\x04"):
        return _read_archive(path, size)
    header = _header_size(head)
    if header is not None:
        return None if 8 + header <= size else f"cut off: {size} bytes of a longer safetensors file; fetch it again"
    return _read_text(head)


def _header_size(head: bytes) -> int | None:
    """Return the bytes of a safetensors header; None for a file that does not begin with one."""
    return int.from_bytes(head[:8], "little") if head[8:9] == b"{" and len(head) > 9 else None


def _read_archive(path: Path, size: int) -> str | None:
    """Say what a zip archive is that torch did not save."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [one.filename for one in members]
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return f"cut off or damaged: {size} bytes of what torch saves as a zip archive, without its end; fetch it again"
    if any(name.endswith("/constants.pkl") or name == "constants.pkl" for name in names):
        return "a TorchScript archive, which holds code: save the state dict of its module"
    if any(name.endswith("data.pkl") for name in names):
        return _find_damage(path, members)
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy's arrays: save them as a state dict of torch"
    return f"a zip archive of {len(names)} files ({', '.join(names[:3])}): unpack it"


def _find_damage(path: Path, members: list[zipfile.ZipInfo]) -> str | None:
    """Say which member of an archive is not what was written, by its checksum; None where all are.

    torch itself does not compare them. A member without one (`torch.serialization.set_crc32_options(False)`) has 0.
    """
    name = ""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in (one for one in members if one.CRC != 0):
                name = member.filename
                with archive.open(member) as file:
                    while file.read(_BLOCK):
                        pass
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError, zlib.error):
        return f"damaged: its part {name} is not what was written (its checksum differs); fetch it, or write it, again"
    return None


def _read_text(head: bytes) -> str | None:
    """Say which text a file is; None for one that is no text."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or len(head) < HEAD:  # not merely a letter that the limit cuts
            return None
        text = head[: error.start].decode("utf-8")
    if not all(letter.isprintable() or letter in "\n\r\t\f\ufeff" for letter in text):
        return None
    begin = text.lstrip("\ufeff \n\r\t").lower()
    if begin.startswith(("<!doctype html", "<html", "<head")) or "<html" in begin:
        return "an HTML page: the download gave a page in its place (a login, a quota, an error); fetch the file itself"
    if begin.startswith("<"):
        return "an XML page, the answer of a server: fetch the file itself"
    if begin.startswith(("{", "[")):
        return "a text of JSON"
    first = text.strip().splitlines()[0][:60] if text.strip() else ""
    return f"a text, which begins: {first}" if first else "a text of spaces alone"
