"""Which classes a text names: "two small sevens" names seven, and of classes by count "two .."."""

from __future__ import annotations

import re

NUMBERS = frozenset(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
# A class name that ends so is named by the texts that begin with the rest of it.
REST = " .."
# What ends a phrase: "a three beside two sevens" is two phrases.
_BREAK = re.compile(
    r"\b(?:and|or|of|with|without|beside|near|by|on|in|at|over|under|above|below|behind|between|to)\b|[^\w\s'-]+"
)
_WORD = re.compile(r"[^\W_]+")


def names_class(text: str, name: str) -> bool:
    """Return whether a text names a class.

    It does where the words of the name stand in it in their order, the last in the singular or the plural. A number
    that counts a plural is no name: "two small sevens" does not name two, and "a bold two" does. A name that ends in
    ".." is named by the texts that begin as it does, whether with a or an.
    """
    if name.endswith(REST):
        begins = _split(name.removesuffix(REST))
        return _split(text)[: len(begins)] == begins
    wanted = _WORD.findall(name.lower())
    if not wanted:
        return False
    for phrase in _BREAK.split(text.lower()):
        words = _WORD.findall(phrase)
        if words[:1] == ["the"]:
            words = words[1:]
        if words and words[0] in NUMBERS and any(map(_is_plural, words[1:])):
            words[0] = ""
        starts = range(len(words) - len(wanted) + 1)
        if any(_equal(words[start : start + len(wanted)], wanted) for start in starts):
            return True
    # Words of a name that hold a break, "salt and pepper", are sought in the whole text.
    whole = _BREAK.search(name.lower()) is not None
    return whole and f" {' '.join(wanted)} " in f" {' '.join(_WORD.findall(text.lower()))} "


def _split(text: str) -> list[str]:
    return ["a" if word == "an" else word for word in _WORD.findall(text.lower())]


def _is_plural(word: str) -> bool:
    return word.endswith("s") and not word.endswith("ss")


def _equal(words: list[str], wanted: list[str]) -> bool:
    """Whether words are those of a name, the last of them in the singular or the plural."""
    last = words[-1]
    forms = {last, last.removesuffix("s"), last.removesuffix("es")}
    if last.endswith("ies"):
        forms.add(f"{last.removesuffix('ies')}y")
    return words[:-1] == wanted[:-1] and wanted[-1] in forms
