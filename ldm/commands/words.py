"""What stands between a user's words and a parser: older spellings going in, shared groups of the help coming out."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence

# Switches that are on where nothing is said: the first version took the word as well.
ON_ALREADY = ("--ema", "--standardise")
# Groups of options that many commands share; the help names them, and --help_all explains them.
SHARED = ("sampling", "sampling.scaling", "sampling.classifier", "place", "speed")
# A group is a box, or where the terminal has no such characters a heading between two empty lines.
_BOXED = r"^╭─ (?P<boxed>[\w.]+) options ─.*?^╰[^\n]*╯\n"
_PLAIN = r"^ (?P<plain>[\w.]+) options *\n -+ *\n.*?(?=^ [\w.]+ options *\n|\Z)"
_GROUP = re.compile(f"{_BOXED}|{_PLAIN}", re.M | re.S)
_OPTION = re.compile(r"^(?:│|  ?) ?(--\w+)", re.M)


def collapse(text: str) -> str:
    """Return a help text in which each shared group is one line with the names of its options."""
    lines: list[str] = []

    def shorten(group: re.Match[str]) -> str:
        name = group["boxed"] or group["plain"]
        if not any(name == shared or name.endswith(f".{shared}") for shared in SHARED):
            return group[0]
        names = " ".join(_OPTION.findall(group[0]))
        lines.append(f"  {name.rpartition('.')[2]}: {names}")
        return ""

    text = _GROUP.sub(shorten, text)
    if not lines:
        return text
    return "\n".join([text.rstrip("\n"), "Shared options, which --help_all explains:", *lines, ""])


def normalise(command: type, words: Sequence[str]) -> list[str]:
    """Rewrite older spellings: switches of three states without a value, those that are on already, a second name."""
    switches = {f"--{name}" for name in _optional_switches(command)}
    found: list[str] = []
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        positive = word.replace("--no-", "--", 1).replace("--no_", "--", 1)
        if word in switches and following not in ("True", "False", "None"):
            found += [word, "True"]
        elif positive != word and positive in switches:
            found += [positive, "False"]
        elif word in ON_ALREADY:
            continue
        else:
            found.append("DPM-Solver++" if word == "dpmpp_2m" else word)
    return found


def _optional_switches(command: type) -> set[str]:
    """Return the options that are True, False, or left to the config."""
    names = set()
    for name, hint in typing.get_type_hints(command, include_extras=True).items():
        inner, *notes = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
        if dataclasses.is_dataclass(inner):
            names |= _optional_switches(typing.cast(type, inner))
        elif isinstance(inner, types.UnionType) and set(typing.get_args(inner)) == {bool, type(None)}:
            given = [note.name for note in notes if getattr(note, "name", None)]
            names.add(given[0] if given else name)
    return names
