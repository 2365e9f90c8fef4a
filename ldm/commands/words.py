"""What stands between a user's words and a parser: older spellings going in, shared groups of the help coming out."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.options import WITH_VALUE

# What a switch may be followed by.
TRUTH = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}
# EDM's options of churn, which are taken as --sampler_options; a wrong one is the sampler's to refuse.
_CHURN = re.compile(r"--(?P<name>S_\w+)")
# Groups of options that many commands share; the help names them, and --help_all explains them.
SHARED = (
    "texts",
    "sampling",
    "sampling.scaling",
    "sampling.guidance",
    "sampling.classifier",
    "sampling.steering",
    "place",
    "speed",
)
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


def refuse_options(words: Sequence[str], form: str) -> None:
    """Refuse words that are no options of a command, unless they change a value; `form` says how those look.

    Raises:
        ValueError: for a word without =, or one that begins as an option does.
    """
    wrong = [word for word in words if word.startswith("-") or "=" not in word]
    if wrong:
        raise ValueError(f"unknown option '{wrong[0]}': expected an option of --help, or {form}")


@dataclass(frozen=True)
class Switch:
    """An option that is True or False.

    Args:
        name: of the option, without dashes.
        aliases: further spellings, with their dashes.
        default: what it is where nothing is said.
        valued: whether the parser takes a value after it (True, False, where the config may decide also None), or the
            option alone, in the one form that changes the default.
    """

    name: str
    aliases: tuple[str, ...]
    default: bool | None
    valued: bool

    @property
    def spellings(self) -> dict[str, bool]:
        """Every spelling, with what it means when no value follows."""
        names = (self.name, self.name.replace("_", "-"))
        positive = {f"--{name}": True for name in names} | dict.fromkeys(self.aliases, True)
        return positive | {f"--no{dash}{name}": False for name in names for dash in "-_"}

    def takes(self, word: str) -> bool:
        """Whether a word that follows is the value of this switch."""
        return word.lower() in TRUTH or (self.valued and word == "None")

    def write(self, meaning: bool, value: str) -> list[str]:
        """Return the words for the parser; `value` is what followed, or empty."""
        if value and value.lower() not in TRUTH:
            return [f"--{self.name}", value]
        chosen = (TRUTH[value.lower()] if value else True) == meaning
        if self.valued:
            return [f"--{self.name}", str(chosen)]
        if chosen == self.default:
            return []
        return [f"--{self.name}" if chosen else f"--no-{self.name}"]


def normalise(command: type, words: Sequence[str]) -> list[str]:
    """Rewrite older spellings: switches with and without a value (-t True), EDM's options of churn (--S_churn 40)."""
    switches = {spelling: switch for switch in find_switches(command) for spelling in switch.spellings}
    found: list[str] = []
    rest = gather_churn(words) if takes_option(command, "sampler_options") else list(words)
    while rest:
        word = rest.pop(0)
        head, given, value = word.partition("=")
        if head not in switches:
            found.append(word)
            continue
        switch = switches[head]
        if not given and rest and switch.takes(rest[0]):
            value = rest.pop(0)
        found += switch.write(switch.spellings[head], value)
    return found


def take_trusted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take --trust PACKAGE, which every command has, out of words: (the other words, the packages).

    What follows -- belongs to other commands and stays.

    Raises:
        ValueError: if no package follows.
    """
    end = list(words).index("--") if "--" in words else len(words)
    others: list[str] = []
    packages: list[str] = []
    rest = list(words[:end])
    while rest:
        word = rest.pop(0)
        head, given, value = word.partition("=")
        if head != "--trust":
            others.append(word)
            continue
        if not given and (not rest or rest[0].startswith("-")):
            raise ValueError("--trust needs the name of a package of yours: --trust mypackage")
        packages.append(value if given else rest.pop(0))
    return [*others, *words[end:]], packages


def takes_option(kind: type, name: str) -> bool:
    """Whether a command, or a value that it holds, has an option of this name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for hint in (hints[field.name] for field in dataclasses.fields(kind)):
        inner, *notes = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
        if any(getattr(note, "name", None) == name for note in notes):
            return True
        if dataclasses.is_dataclass(inner) and takes_option(typing.cast(type, inner), name):
            return True
    return False


def gather_churn(words: Sequence[str]) -> list[str]:
    """Write EDM's options of churn, --S_churn 40 or --S_churn=40, as words of --sampler_options."""
    found: list[str] = []
    churn: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        head, given, value = word.partition("=")
        option = _CHURN.fullmatch(head)
        if option is None:
            found.append(word)
            continue
        if not given:
            value = rest.pop(0) if rest else ""
        churn.append(f"{option['name']}={value}")
    if not churn:
        return found
    if "--sampler_options" not in found:
        return [*found, "--sampler_options", *churn]
    place = found.index("--sampler_options") + 1
    return [*found[:place], *churn, *found[place:]]


def find_switches(kind: type, value: Any = None) -> Iterator[Switch]:
    """Yield the switches of a command and of the values that it holds; `value` has the defaults, where there is one."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        inner, *notes = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
        given = getattr(value, field.name, None if field.default is dataclasses.MISSING else field.default)
        if dataclasses.is_dataclass(inner):
            yield from find_switches(typing.cast(type, inner), given)
            continue
        optional = isinstance(inner, types.UnionType) and set(typing.get_args(inner)) == {bool, type(None)}
        if inner is bool or optional:
            names = [note.name for note in notes if getattr(note, "name", None)]
            aliases = [alias for note in notes for alias in getattr(note, "aliases", None) or ()]
            valued = optional or WITH_VALUE in notes
            yield Switch(names[0] if names else field.name, tuple(aliases), given, valued)
