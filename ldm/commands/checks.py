"""Whether every option of a command acts: numbers in their ranges, and no option without the one that it goes with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from ldm.options import check_options, option_name


def check_command(command: Any, words: Sequence[str] = ()) -> None:
    """Make sure that the options of a command are in their ranges, and that none of them is without effect.

    A command, or a value that it holds, may say in `acts_with` which of its fields act only beside another one:
    {"frames": "interpolate", "every": "method=bayesdiff_skip|published_skip"}.

    Args:
        command: made from `words`.
        words: of the command line, by which an option counts as given even where it has its default.

    Raises:
        ValueError: naming the option, and what it needs.
    """
    check_options(command)
    named = {word.partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    for value in list_values(command):
        defaults = {one.name: _default(one) for one in fields(value)}
        names = {one.name: option_name(value, one.name) for one in fields(value)}
        for name, rule in getattr(value, "acts_with", {}).items():
            given = getattr(value, name) != defaults[name] or f"__{names[name]}" in named
            if given and not _holds(value, rule):
                other, _, wanted = rule.partition("=")
                beside = f"--{names.get(other, other)}" + (f" {wanted.replace('|', ' or ')}" if wanted else "")
                raise ValueError(f"--{names[name]} acts only with {beside}: add it, or leave --{names[name]} out")


def list_values(command: Any) -> Iterator[Any]:
    """Yield a command and the values that it holds."""
    yield command
    for one in fields(command):
        held = getattr(command, one.name)
        if is_dataclass(held):
            yield from list_values(held)


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _holds(value: Any, rule: str) -> bool:
    name, _, wanted = rule.partition("=")
    found = getattr(value, name)
    if not wanted:
        return found not in (None, (), "", False)
    named = found if isinstance(found, tuple) else (found,)
    return any(str(one) in wanted.split("|") for one in named)
