"""Whether values fit the constructor that takes them, by its signature and annotations: names, types and ranges."""

from __future__ import annotations

import ast
import collections.abc
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal

from ldm.ranges import PARAMETERS, check_range

SEQUENCES = (
    list,
    tuple,
    set,
    frozenset,
    collections.abc.Sequence,
    collections.abc.Iterable,
    collections.abc.Collection,
)
MAPPINGS = (dict, collections.abc.Mapping)
# An argument of which nothing is known but its name.
_FREE = inspect.Parameter("free", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Any)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


def suggest_key(word: str, known: Iterable[str]) -> str:
    """Return words that name the nearest known key, or all of them where none is near."""
    names = sorted(known)
    small = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), small, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{small[near[0]]}'?"
    return f"known are {', '.join(names)}" if names else "nothing is known there"


def check_arguments(target: Callable[..., Any], params: Mapping[str, Any], place: str, complete: bool = True) -> None:
    """Make sure that `target(**params)` has arguments that exist, of the types and in the ranges that they take.

    Args:
        target: a class or a function. What stands in its **keywords is looked for in its base classes.
        params: keywords with plain values; a value that is an object is passed over.
        place: what a message begins with, the dotted key of the config for example.
        complete: whether an argument without a default has to be there.

    Raises:
        ValueError: naming the argument, what it takes and what came.
    """
    known, open_ended = find_arguments(target)
    # What an argument of this name means in other packages is not known here.
    named = target.func if isinstance(target, partial) else target
    ranges = PARAMETERS if named.__module__.split(".")[0] == "ldm" else {}
    for name, value in params.items():
        shown = f"{place}.{name}"
        if name not in known:
            if open_ended:
                continue
            raise ValueError(f"{shown}: {_title(named)} takes no '{name}'; {suggest_key(str(name), known)}")
        check_value(value, known[name].annotation, shown)
        check_range(str(name), value, ranges, shown)
    missing = [name for name, one in known.items() if one.default is inspect.Parameter.empty and name not in params]
    if missing and complete and not open_ended:
        raise ValueError(f"{place}: {_title(named)} needs {', '.join(missing)}")


@lru_cache(maxsize=512)
def find_arguments(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the keywords of a class or function with their types, and whether it may take others as well.

    Where it hands **keywords on, to its base class or to another one, those that this takes count as its own, and so do
    the names in `IGNORED_ARGUMENTS` of its module.
    """
    return _follow(_constructors(target))


def _follow(functions: Sequence[Callable[..., Any]]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the keywords of the first function, and of what it hands its **keywords to: often the next one."""
    if not functions:
        return {}, True
    function, *bases = functions
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}, True
    hints = _hints(function)
    found = {
        name: one.replace(annotation=hints.get(name, Any))
        for name, one in parameters.items()
        if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    }
    found.pop("self", None)
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return found, False
    ignored = getattr(function, "__globals__", {}).get("IGNORED_ARGUMENTS", ())
    receivers, call = _find_receivers(function, bases)
    further, open_ended = _follow(receivers)
    supplied = _supplied(call, list(further))
    for name, one in {**dict.fromkeys(ignored, _FREE), **further}.items():
        if name not in supplied:
            found.setdefault(name, one)  # after its own, which come by position
    return found, open_ended


def _supplied(call: ast.Call | None, names: Sequence[str]) -> list[str]:
    """Return the arguments, of these names, that a call gives itself beside **keywords."""
    if call is None:
        return []
    listed = names if any(isinstance(one, ast.Starred) for one in call.args) else names[: len(call.args)]
    return [*listed, *(keyword.arg for keyword in call.keywords if keyword.arg is not None)]


def _find_receivers(
    function: Callable[..., Any], bases: list[Callable[..., Any]]
) -> tuple[list[Callable[..., Any]], ast.Call | None]:
    """Return the constructors that a function calls with **keywords, of its bases or of a class, and the call."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return [], None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        if not any(keyword.arg is None for keyword in call.keywords):
            continue
        called = ast.unparse(call.func)
        if called == "super().__init__":
            return bases, call
        if called in function.__globals__:
            return _constructors(function.__globals__[called]), call
    return [], None


def _constructors(target: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return a function, or the constructors of a class in its order of resolution."""
    if not inspect.isclass(target):
        return [target]
    own = [vars(one)["__init__"] for one in target.__mro__[:-1] if "__init__" in vars(one)]
    return own or [lambda: None]


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception:
        # A name that is imported for type checking alone.
        return {}


def check_value(value: Any, hint: Any, shown: str) -> None:
    """Make sure that a plain value has the type of an annotation; what cannot be said of either is passed over.

    Raises:
        ValueError: naming what was expected and what came.
    """
    if not fits(value, hint):
        quoted = f"the word '{value}'" if isinstance(value, str) else "null" if value is None else repr(value)
        raise ValueError(f"{shown} must be {describe_type(hint)}, got {quoted[:200]}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value (number, word, list, mapping, None) has the type of an annotation."""
    if hint in (Any, inspect.Parameter.empty) or isinstance(hint, typing.TypeVar | str):
        return True
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inside)
    if origin is typing.Annotated:
        return fits(value, inside[0])
    if origin is Literal:
        return value in inside
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool) or value in (0, 1)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    kind = origin or hint
    if kind in SEQUENCES:
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return listed and _elements_fit(value, inside, kind is tuple)
    if kind in MAPPINGS:
        return isinstance(value, Mapping)
    if kind is collections.abc.Callable:
        return callable(value)
    return not isinstance(kind, type) or kind is type or isinstance(value, kind)


def _elements_fit(value: Sequence[Any], inside: tuple[Any, ...], fixed: bool) -> bool:
    if not inside:
        return True
    # A tuple of one kind is often meant to hold any number of them.
    if fixed and Ellipsis not in inside and len(inside) > 1:
        return len(value) == len(inside) and all(fits(one, kind) for one, kind in zip(value, inside, strict=True))
    return all(fits(one, inside[0]) for one in value)


def describe_type(hint: Any) -> str:
    """Return an annotation in words, "a whole number" for example."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_type(one) for one in inside))
    if origin is typing.Annotated:
        return describe_type(inside[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}"
    if hint in _WORDS:
        return _WORDS[hint]
    kind = origin or hint
    if kind in SEQUENCES:
        return f"a list, each {describe_type(inside[0])}" if inside else "a list"
    if kind in MAPPINGS:
        return "a mapping of keys"
    return f"a {getattr(kind, '__name__', kind)}"


def _title(target: Callable[..., Any]) -> str:
    return getattr(target, "__name__", str(target))


def leave_out_neutral(given: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return arguments without those of another code that change nothing here.

    Args:
        given: arguments by name.
        neutral: names of the other code's, with the values under which they do nothing there; none: whatever they are.

    Raises:
        ValueError: for a value that would act there.
    """
    for name, values in neutral.items():
        if values and given.get(name, values[0]) not in values:
            raise ValueError(f"{name} must be one of {values}: others have no counterpart here; got {given[name]!r}")
    return {name: value for name, value in given.items() if name not in neutral}
