"""FFHQ's 128x128 thumbnails, each verified by the data set's own list (github.com/NVlabs/ffhq-dataset)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.data.prepare.archives import safe_path
from ldm.data.prepare.download import fetch
from ldm.data.prepare.pages import drive_url

LIST = {"name": "ffhq-dataset-v2.json", "size": 267_793_842, "md5": "425ae20f06a4da1d4dc0f46d40ba5fd6"}
LIST_ID = "16N0RV4fHI6joBuKbQAoG34V_cQk7vxSA"
CONNECTIONS = 16  # at a time; a file takes as long to ask for as to send


def read_entries(listing: Path) -> list[dict[str, Any]]:
    """The thumbnails of FFHQ's list: file_path, file_url, file_size, file_md5.

    Raises:
        ValueError: if it is no such list.
    """
    try:
        return [item["thumbnail"] for _, item in sorted(json.loads(listing.read_text()).items(), key=_number)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{listing} is not FFHQ's list of files ({error})") from error


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])


def is_whole(path: Path, size: int, md5: str) -> bool:
    """Whether a file is there with this length and checksum."""
    if not path.exists() or path.stat().st_size != size:
        return False
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == md5


def fetch_thumbnails(folder: str | Path, listing: Path, address: Callable[[dict[str, Any]], str]) -> list[Path]:
    """Fetch the thumbnails that `folder` lacks, and verify all of them.

    Args:
        listing: FFHQ's list.
        address: a thumbnail's entry -> where it is fetched from.

    Raises:
        ValueError: if a file is there with another content.
    """
    folder, entries = Path(folder), read_entries(listing)

    def one(entry: dict[str, Any]) -> Path:
        target = safe_path(folder, entry["file_path"])
        if not is_whole(target, entry["file_size"], entry["file_md5"]):
            fetch(address(entry), target, entry["file_size"], entry["file_md5"], quiet=True)
        return target

    with ThreadPoolExecutor(CONNECTIONS) as pool:  # the first error cancels what was not begun
        return list(tqdm(pool.map(one, entries), total=len(entries), desc="thumbnails", unit="file"))


def published_address(entry: dict[str, Any]) -> str:
    """Where a thumbnail of the list is published."""
    return drive_url(entry["file_url"].partition("id=")[2])
