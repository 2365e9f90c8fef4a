"""Which pictures the paths of a list mean, however the list writes them."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from ldm.data.pictures import Files


def find_pictures(source: Files, file: str, paths: Sequence[str]) -> list[str]:
    """Return the paths of a list's pictures below the root.

    A list may write them below the root, below its own folder, below the folder of the pictures, from further above
    (with the root's name before them, or whole, also of another machine), with "./" or with backslashes, and without
    their endings. All of a list's paths are read in one way.

    Args:
        source: the files.
        file: the list's name, for messages.
        paths: as the list writes them [N].

    Raises:
        ValueError: if some are not there, or one is named twice.
    """
    clean = [posixpath.normpath(path if source.has(path) else path.replace("\\", "/")) for path in paths]
    found = clean
    if not all(not posixpath.isabs(path) and source.has(path) for path in clean):
        found = _read_otherwise(source, file, clean)
    path, times = Counter(found).most_common(1)[0] if found else ("", 0)
    if times > 1:
        raise ValueError(f"{file} names the picture {path} {times} times: keep one row of each picture")
    return found


def _read_otherwise(source: Files, file: str, paths: Sequence[str]) -> list[str]:
    """Return the pictures that paths mean which are not all below the root as they stand."""
    pictures = _by_path(source.images())
    beside = "" if not source.has(file) or "/" not in file else f"{posixpath.dirname(file)}/"
    best: list[str | None] = []
    whole = {}
    for taken, added in dict.fromkeys([("", ""), ("", beside), *_readings(paths, pictures)]):
        meant = [added + path.removeprefix(taken) for path in paths]
        read = [pictures.get(one, pictures.get(one.lower())) for one in meant]
        if None not in read:
            whole[taken, added] = read
        if not best or read.count(None) < best.count(None):
            best = read
    own = next((read for taken, read in whole.items() if taken in (("", ""), ("", beside))), None)
    if own is None and len(whole) > 1:
        places = ", ".join(added or "the root" for _, added in list(whole)[:3])
        raise ValueError(f"the paths of {file} may mean pictures in several folders, {places}: write them in whole")
    missing = [path for path, picture in zip(paths, best, strict=True) if picture is None]
    if missing:
        raise ValueError(
            f"{file} names {len(missing)} of {len(paths)} pictures that are not in {source.roots[0]}, "
            f"{', '.join(missing[:3])} among them; paths are relative to that folder, or to the list's"
        )
    return [picture for picture in (own or best) if picture is not None]


def _by_path(found: Sequence[str]) -> dict[str, str]:
    """Return {path, also in small letters or without its ending where these mean one picture: picture}."""
    known: dict[str, str] = {}
    for write in (_without_ending, str.lower):
        times = Counter(map(write, found))
        known |= {write(path): path for path in found if times[write(path)] == 1}
    return {**known, **{path: path for path in found}}


def _without_ending(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _readings(paths: Sequence[str], pictures: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (what is taken from the front of every path, what is added there), so that one of the first is a picture.

    Only one of the two is not empty: a list that speaks of another folder than the pictures' is not guessed at.
    """
    for path in paths[:20]:
        for one in (path, path.lower()):
            yield from (("", known.removesuffix(one)) for known in pictures if known.endswith(f"/{one}"))
        parts = PurePosixPath(path).parts
        for level in range(1, len(parts)):
            rest = "/".join(parts[level:])
            if rest in pictures:
                yield path.removesuffix(rest), ""
                break
