"""Whether every option of a command acts: numbers in their ranges, and no option without the one that it goes with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any

from ldm.options import check_options, option_name, option_spellings

# What an option holds that is followed by no word, or by an empty one, as a script's unset variable gives it.
_NOTHING: tuple[Any, ...] = ((), {}, "", ("",))


def check_command(command: Any, words: Sequence[str] = ()) -> None:
    """Make sure that the options of a command are in their ranges, and that none of them is without effect.

    A command, or a value that it holds, may say in `acts_with` which of its fields act only beside another one:
    {"frames": "interpolate", "posterior.every": "method=bayesdiff_skip|published_skip"}, the latter a field of a value
    that it holds. In `stands_alone` it names fields whose option may be followed by nothing, and in `without_effect`
    those of values that it holds and has no use for: {"posterior.draws": "no weights are drawn here"}.

    Args:
        command: made from `words`.
        words: of the command line, by which an option counts as given even where it has its default.

    Raises:
        ValueError: naming the option, and what it needs.
    """
    check_options(command)
    named = find_named(words)
    for value in list_values(command):
        names = {one.name: option_name(value, one.name) for one in fields(value)}
        for field, name in names.items():
            if field in getattr(value, "stands_alone", ()):
                continue
            if getattr(value, field) in _NOTHING and not named.isdisjoint(option_spellings(value, field)):
                raise ValueError(f"--{name} is followed by nothing: give what it names, or leave it out")
        for place, reason in getattr(value, "without_effect", {}).items():
            shown, given = _find_given(value, place, named)
            if given:
                raise ValueError(f"--{shown} has no effect here: {reason}; leave it out")
        for place, rule in getattr(value, "acts_with", {}).items():
            shown, given = _find_given(value, place, named)
            if given and (missing := _find_missing(value, rule)):
                other, _, wanted = missing.partition("=")
                beside = f"--{names.get(other, other)}" + (f" {wanted.replace('|', ' or ')}" if wanted else "")
                raise ValueError(f"--{shown} acts only with {beside}: add it, or leave --{shown} out")


def run_checked(command: Any) -> Any:
    """Run a command where files can be written at its --out; hours of work would else end with what is known now."""
    from ldm.files import check_writable

    place = getattr(command, "out", None) or getattr(command, "outdir", None)
    if isinstance(place, str) and not getattr(command, "dry_run", False):
        check_writable(place)
    return command.run()


def find_named(words: Sequence[str]) -> set[str]:
    """Return the options that words give, as they spell them but for the dashes."""
    return {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("-")}


def tell_named(command: Any, words: Sequence[str]) -> Any:
    """Return a command in which each value that has a field `named` knows which of its own fields the words give."""
    told: dict[str, Any] = {}
    given = find_named(words)
    for one in fields(command):
        held = getattr(command, one.name)
        if is_dataclass(held) and (knowing := tell_named(held, words)) is not held:
            told[one.name] = knowing
    if hasattr(command, "named"):
        names = [one.name for one in fields(command)]
        told["named"] = tuple(name for name in names if not given.isdisjoint(option_spellings(command, name)))
    return replace(command, **told) if told else command


def list_values(command: Any) -> Iterator[Any]:
    """Yield a command and the values that it holds."""
    yield command
    for one in fields(command):
        held = getattr(command, one.name)
        if is_dataclass(held):
            yield from list_values(held)


def _find_given(value: Any, place: str, named: set[str]) -> tuple[str, bool]:
    """Return the option of a field, or of one of a held value ("posterior.draws"), and whether it was given."""
    holder, _, name = place.rpartition(".")
    owner = getattr(value, holder) if holder else value
    shown, *_ = spellings = option_spellings(owner, name)
    changed = getattr(owner, name) != _default(type(owner).__dataclass_fields__[name])
    return shown, changed or not named.isdisjoint(spellings)


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _find_missing(value: Any, rule: str) -> str | None:
    """Return the rule that does not hold: this one, or one of the option that it names; None where all of them do."""
    if not _holds(value, rule):
        return rule
    further = value.acts_with.get(rule.partition("=")[0])
    return None if further is None else _find_missing(value, further)


def _holds(value: Any, rule: str) -> bool:
    name, _, wanted = rule.partition("=")
    found = getattr(value, name)
    if not wanted:
        return found not in (None, (), "", False)
    if found is None:  # the command chooses, and may choose that
        return True
    named = found if isinstance(found, tuple) else (found,)
    return any(str(one) in wanted.split("|") for one in named)
