"""How a field of a value becomes an option of a command line: its name, its spellings, what its help says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro

from ldm.ranges import DISTINCT, OPTIONS, check_range
from ldm.settings.names import choose_name

OptionValue = bool | int | float | str

# What a command takes where neither its words nor the config say; its help names these.
SHOWN: dict[str, float] = {"steps": 200, "scale": 5}
# Marks of a field that no option of its own stands for.
FIXED = tyro.conf.Fixed
SUPPRESSED = tyro.conf.Suppress
# Mark of an option of one word that may be repeated.
APPENDED = tyro.conf.UseAppendAction
# Mark of a switch that is written with its value, --scale_lr False.
WITH_VALUE = tyro.conf.FlagConversionOff


def read_pairs(words: Sequence[str]) -> dict[str, OptionValue]:
    """Read words A=B as {A: B}, B a number, True or False where it is written so, else a word.

    Raises:
        ValueError: for a word without =, or a name that comes twice.
    """
    found: dict[str, OptionValue] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise ValueError(f"expected NAME=VALUE, got '{word}'")
        if name in found:
            raise ValueError(f"{name} is given twice, {found[name]} and {value}")
        found[name] = _read_value(value)
    return found


def _read_value(word: str) -> OptionValue:
    if word in ("True", "False"):
        return word == "True"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


# Mark of a field of several words A=B, a mapping.
PAIRS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="A=B ...",
    instance_from_str=read_pairs,
    is_instance=lambda value: isinstance(value, Mapping),
    str_from_instance=lambda value: [f"{name}={one}" for name, one in value.items()],
)


def one_of(known: Sequence[str]) -> Any:
    """Mark a field that is one of these names, so that a wrong one is answered with the nearest."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME",
        instance_from_str=lambda words: choose_name(words, known),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )


# How a command line reads words, beyond what the parser knows.
READING = tyro.constructors.ConstructorRegistry()


@READING.primitive_rule
def _read_optional(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Read a value that may be left out as what it is otherwise, so that a wrong word is not told of None.

    The parser's own rule counts "None" among the words that are expected. Values of several words keep that rule.
    """
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    if info.type_origin not in (Union, UnionType) or len(kinds) != 1 or len(get_args(info.type)) != 2:
        return None
    made = tyro.constructors.PrimitiveTypeInfo.make(kinds[0], info.markers)
    plain = tyro.constructors.ConstructorRegistry.get_primitive_spec(made)
    if not isinstance(plain, tyro.constructors.PrimitiveConstructorSpec) or plain.nargs != 1:
        return None
    return replace(
        plain,
        instance_from_str=lambda words: None if words == ["None"] else _read_known(words, plain),
        is_instance=lambda value: value is None or plain.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else plain.str_from_instance(value),
        choices=None,
    )


def _read_known(words: list[str], plain: tyro.constructors.PrimitiveConstructorSpec) -> Any:
    if plain.choices is not None:
        choose_name(words, plain.choices)
    return plain.instance_from_str(words)


def option(*aliases: str, name: str | None = None, metavar: str | None = None, default: str | None = None) -> Any:
    """Describe the command-line option of a field.

    Args:
        aliases: further spellings with their dashes, the published ones for example.
        name: the option's name where it is not the field's.
        metavar: what stands for the value in the help.
        default: what happens where the option is not given, in words; for fields whose default is None.
    """

    def hint(_: str) -> str:
        assert default is not None
        return f"(default: {default.format_map(SHOWN)})"

    shown = None if default is None else hint
    return tyro.conf.arg(name=name, aliases=aliases or None, metavar=metavar, help_behavior_hint=shown)


def check_options(value: Any) -> None:
    """Make sure that the numbers of a command, or of one of its values, lie in the ranges of `ldm.ranges.OPTIONS`.

    Raises:
        ValueError: naming the option, its range and what came; or what a list names twice.
    """
    for name, given in option_values(value).items():
        check_range(name, given, OPTIONS, f"--{name}")
        twice = [one for one in given if given.count(one) > 1] if name in DISTINCT and isinstance(given, list) else []
        if twice:
            raise ValueError(f"--{name} names {twice[0]} twice: name it once")


def option_name(value: Any, field: str) -> str:
    """Return the name of the option of a value's field."""
    return option_spellings(value, field)[0]


def option_spellings(value: Any, field: str) -> list[str]:
    """Return the name of the option of a value's field, and its further spellings, without dashes."""
    hint = get_type_hints(type(value), include_extras=True)[field]
    notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    named = [note.name for note in notes if getattr(note, "name", None)]
    further = [alias for note in notes for alias in getattr(note, "aliases", None) or ()]
    return [*(named or [field]), *(alias.lstrip("-").replace("-", "_") for alias in further)]


def option_values(value: Any) -> dict[str, Any]:
    """Return the values of a command or of one of its values by the names of their options, nested ones flat."""
    found: dict[str, Any] = {}
    hints = get_type_hints(type(value), include_extras=True)
    for one in fields(value):
        if not one.compare:  # what is known about the options is none
            continue
        given = getattr(value, one.name)
        if is_dataclass(given):
            found |= option_values(given)
            continue
        notes = get_args(hints[one.name])[1:] if get_origin(hints[one.name]) is Annotated else ()
        named = [note.name for note in notes if getattr(note, "name", None)]
        found[named[0] if named else one.name] = list(given) if isinstance(given, tuple) else given
    return found
