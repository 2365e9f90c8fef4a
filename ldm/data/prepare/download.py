"""Fetching published files: resumed, verified; nothing of the user's is overwritten."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from ldm.data.prepare.pages import Page

_CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without any byte
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP errors of a server that is busy
LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR}  # own disk


def fetch(
    url: str,
    path: str | Path,
    size: int | None = None,
    md5: str | None = None,
    attempts: int = 5,
    quiet: bool = False,
    pause: float = 1.0,
) -> Path:
    """Download `url` to `path` through `path`.part, which a later call resumes; a correct file is left as it is.

    Proxies and certificates are those of the environment: https_proxy, http_proxy, no_proxy, SSL_CERT_FILE.

    Args:
        url: http or https address.
        path: where the file goes.
        size: its length in bytes, where known.
        md5: its checksum in hexadecimal, where known.
        attempts: connections in a row that bring nothing new, before giving up.
        quiet: without progress bars, for one of many small files.
        pause: seconds before the second such connection, doubled before each further one.

    Raises:
        ValueError: if a file already at `path`, or the one fetched, is not the expected one (the first is left alone,
            the second kept as `path`.rejected), if a web page was sent in its place, or it cannot be written.
        ConnectionError: if the download does not complete; what came stays for the next call.
    """
    path = Path(path)
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url must begin with http:// or https://, got '{url}'")
    if path.exists():
        fault = find_fault(path, size, md5, quiet)
        if fault:
            raise ValueError(f"{path} is not what {url} should hold: {fault}; move it away to fetch it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    fetch_rest(url, part, size, attempts, quiet, pause)
    fault = find_fault(part, size, md5, quiet)
    if fault:
        rejected = path.with_name(f"{path.name}.rejected")
        os.replace(part, rejected)
        raise ValueError(f"what {url} sent is not the published file: {fault}; it is kept as {rejected}")
    os.replace(part, path)
    return path


def fetch_rest(url: str, part: Path, size: int | None, attempts: int, quiet: bool, pause: float) -> None:
    """Fetch what is missing of `part`, by as many connections as it takes while they bring something; see `fetch`."""
    most, vain = read_size(part), 0
    while vain < attempts:
        if vain:
            time.sleep(pause * 2 ** (vain - 1))
        problem = "the connection was closed early"
        try:
            if resume(url, part, size, quiet):
                return
        except (OSError, http.client.HTTPException) as error:
            final = last_word(url, part, error)
            if final:
                raise final from error
            problem = str(getattr(error, "reason", error)) or type(error).__name__
            if isinstance(error, urllib.error.HTTPError):
                problem = f"{error.code} {problem}"
        vain = 0 if read_size(part) > most else vain + 1
        most = max(most, read_size(part))
    if most:
        raise ConnectionError(
            f"{url} broke off after {read_size(part)} bytes, and {attempts} attempts brought no more ({problem}); "
            "run again to resume"
        )
    raise ConnectionError(
        f"{url} sent nothing in {attempts} attempts ({problem}); check the connection (https_proxy and http_proxy "
        "name a proxy), try later, or give a mirror with --url"
    )


def read_size(path: Path) -> int:
    """Length of a file in bytes, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def last_word(url: str, part: Path, error: Exception) -> Exception | None:
    """What to raise for an error that another attempt would only repeat, None for one that may pass."""
    if isinstance(error, urllib.error.HTTPError):
        refusal = ConnectionError(f"{url} answered {error.code} {error.reason}; give a mirror with --url")
        return None if error.code in PASSING else refusal
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return ConnectionError(
            f"the certificate of {url} is not trusted ({reason.verify_message}); where your system or proxy has its "
            "own authorities, the environment variable SSL_CERT_FILE names the file that holds them"
        )
    if getattr(error, "errno", None) in LOCAL:
        return ValueError(f"{part} cannot be written ({error.strerror}); what came stays there, run again to resume")
    return None


def resume(url: str, part: Path, size: int | None = None, quiet: bool = False) -> bool:
    """Fetch what is missing of `part`; return whether it is complete by the server's own length.

    Raises:
        ValueError: before anything is written, if the reply is a web page, of another length than `size`, or too long
            for the disk.
    """
    start = read_size(part)
    try:
        reply = connect(url, start, part.with_suffix(""))
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            if error.headers.get("Content-Range", f"/{size}").rpartition("/")[2] == str(start):
                return True
            part.unlink()  # longer than the file: begin again
            return resume(url, part, size, quiet)
        raise
    with reply:
        if reply.status != http.client.PARTIAL_CONTENT:
            start = 0
        elif not reply.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise http.client.HTTPException(f"asked for bytes {start}-, got {reply.headers.get('Content-Range')}")
        length = reply.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        if None not in (size, total) and total != size:
            raise ValueError(f"{url} is not the published file: expected {size} bytes, it has {total}")
        if total is not None and shutil.disk_usage(part.parent).free < total - start:
            raise ValueError(f"{part.parent} has too little space: {total - start} bytes are still to come from {url}")
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=quiet)
        with bar, open(part, "ab" if start else "wb") as file:
            while chunk := reply.read1(_CHUNK):  # what is there, so that a connection that breaks loses none of it
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total


def connect(url: str, start: int, path: Path) -> http.client.HTTPResponse:
    """Open `url` from byte `start` on, where the server can; a page's download form on the way is followed.

    Args:
        path: where the file belongs, for messages.

    Raises:
        ValueError: if the reply is a web page rather than a file.
    """
    headers = {"User-Agent": "ldm-prep-data", **({"Range": f"bytes={start}-"} if start else {})}
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    address: str | None = url
    for _ in range(2):
        reply = opener.open(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
        if reply.headers.get_content_type() != "text/html":
            return reply
        with reply:
            page = Page(reply.url, reply.read(_CHUNK).decode(errors="replace"))
        address = page.download
        if address is None:
            break
    raise ValueError(
        f"{url} sent a web page in place of the file: '{page.words}'. Try later, fetch it with a browser and put it at "
        f"{path}, or give a mirror with --url"
    )


def find_fault(path: Path, size: int | None, md5: str | None, quiet: bool = False) -> str:
    """Return what distinguishes a file from the published one, or nothing."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"expected {size} bytes, got {found}"
    if md5 is not None:
        digest = hashlib.md5(usedforsecurity=False)
        bar = tqdm(total=found, unit="B", unit_scale=True, desc=f"md5 {path.name}", disable=quiet)
        with open(path, "rb") as file, bar:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                bar.update(len(chunk))
        if digest.hexdigest() != md5:
            return f"expected md5 {md5}, got {digest.hexdigest()}"
    return ""
