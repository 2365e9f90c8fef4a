"""Letters of figures that their font does not have: another installed font's are taken, or it is said that none has."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.text import Text

log = logging.getLogger(__name__)

# A font that has a box for every letter.
LAST_RESORT = "Last Resort"

_MISSING = re.compile(r"Glyph (\d+) ")


def save_with_letters(figure: Figure, save: Callable[[], None]) -> None:
    """Save a figure; texts with letters that their font lacks take them from an installed font that has them.

    Args:
        figure: what is saved.
        save: draws it and writes it, a second time where letters were missing.
    """
    missing = _find_missing(save)
    families = find_families(missing) if missing else ()
    if families:
        for text in figure.findobj(Text):
            if missing & set(text.get_text()):
                text.set_fontfamily([*text.get_fontfamily(), *families])
        missing = _find_missing(save)
    if missing:
        _say("".join(sorted(missing)))


def _find_missing(save: Callable[[], None]) -> set[str]:
    """Save, and return the letters that no font has; other warnings are given as they came."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save()
    missing = set()
    for one in caught:
        found = _MISSING.match(str(one.message))
        if found is None:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        else:
            missing.add(chr(int(found.group(1))))
    return missing


def find_families(letters: set[str]) -> tuple[str, ...]:
    """Return installed font families that together have as many of some letters as fonts have, fewest first."""
    left, families = set(letters), []
    while left:
        name, own = max(((name, own & left) for name, own in _read_letters(frozenset(letters)).items()),
                        key=lambda one: len(one[1]), default=("", set()))  # fmt: skip
        if not own:
            break
        families.append(name)
        left -= own
    return tuple(families)


@cache
def _read_letters(letters: frozenset[str]) -> dict[str, set[str]]:
    """Return {family of an installed font: those of the letters that it has}."""
    found: dict[str, set[str]] = {}
    for entry in fontManager.ttflist:
        if entry.name.startswith(LAST_RESORT):
            continue
        try:
            known = get_font(entry.fname).get_charmap()
        except (OSError, RuntimeError):  # no font that can be read
            continue
        found.setdefault(entry.name, set()).update(one for one in letters if ord(one) in known)
    return found


@cache
def _say(letters: str) -> None:
    log.warning(
        "no installed font has the letters %s, which pictures show as boxes: install one that has, Noto Sans CJK for "
        "example",
        letters,
    )
