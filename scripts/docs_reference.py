"""Pages of the site's reference, made from what they describe: commands from their dataclasses, keys from signatures.

A hook of MkDocs (mkdocs.yml): pages exist while the site is built, and never as files of their own.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from omegaconf import OmegaConf

from ldm.arguments import find_arguments
from ldm.commands.line import COMMANDS, GROUPS, TRUST, load_command
from ldm.commands.words import SHARED
from ldm.options import FIXED, SHOWN, SUPPRESSED
from ldm.ranges import PARAMETERS
from ldm.training.config_keys import SECTION_VALUES, SECTIONS
from ldm.util import get_obj_from_str

ROOT = Path(__file__).parent.parent
SHARED_PAGE = "reference/shared_options.md"
# What each section of a config is; a section without its line fails the build.
SECTION_TEXTS = {
    "model": "The model: the class that trains, its parameters, and one of the two rates.",
    "data": "The data module: batch size, loaders, and the sets `train`, `validation` and `test`.",
    "lightning": "Lightning's trainer, callbacks and the checkpoints that are kept.",
    "uncertainty": "What the commands of uncertainty take where their words do not say.",
    "classifier": "How `decu evaluate classifier` trains on these data.",
    "probe": "Where features are read: noise levels to choose among, the chosen one, the layer.",
    "churn": "The window in which EDM's sampler adds noise.",
    "epsilon_scaling": "Published divisors by number of steps, which `--eps_scaler published` takes.",
    "diffusers": "How a folder of diffusers samples; `decu export` writes it.",
    "paths": "Paths by name, which other keys refer to as `${paths.NAME}`.",
    "run": "What a run wrote of its own training; `--resume` reads it.",
}
# Where the classes that configs name are found, with the heading of their tables.
KINDS = {
    "main": "The data module",
    "ldm.models": "Models",
    "ldm.modules": "Networks, encoders and losses",
    "ldm.diffusion": "Schedules and times of training",
    "ldm.data": "Data sets",
    "ldm.lr_scheduler": "Schedules of the learning rate",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the reference to those of the site."""
    pages = {name: command_page(name) for name in dict.fromkeys(name.split()[0] for name in COMMANDS)}
    made = {f"reference/{name}.md": text for name, text in pages.items()}
    made |= {"reference/commands.md": overview_page(), SHARED_PAGE: shared_page(), "reference/config.md": config_page()}
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    return files


def escape(text: str) -> str:
    """Return a sentence of a docstring as Markdown: options as code, pages as links, nothing else marked."""
    parts = re.split(r"(`[^`]+`|(?<![\w`])--\w+|\bdocs/\w+\.md)", text)
    return "".join(_mark(part) for part in parts)


def _mark(part: str) -> str:
    if page := re.fullmatch(r"docs/(\w+)\.md", part):
        return f"[{page[1]}](../{page[1]}.md)"
    if part.startswith("--"):
        return f"`{part}`"
    return part if part.startswith("`") else re.sub(r"([*_<>\[\]{}|#])", r"\\\1", part)


def to_markdown(doc: str) -> str:
    """Return a docstring as Markdown: sentences as paragraphs, indented lines as blocks of code."""
    found, code = [], []
    doc = inspect.cleandoc(doc).partition("\nRaises:")[0]
    for line in [*doc.splitlines(), None]:
        if line is not None and (line.startswith("  ") or (code and not line)):
            code.append(line)
            continue
        if code:
            found += ["", "```text", *inspect.cleandoc("\n" + "\n".join(code)).splitlines(), "```", ""]
            code = []
        found.append("" if line is None else escape(line))
    return "\n".join(found).strip() + "\n"


def cell(text: str) -> str:
    """Return a text as one cell of a table."""
    return " ".join(text.split())


def describe_fields(kind: type) -> dict[str, str]:
    """Return the sentences below the fields of a dataclass, those of its bases included."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = str(text.value.value)
    return found


def list_options(kind: type) -> tuple[list[str], dict[str, type]]:
    """Return the rows of a dataclass's options, and the dataclasses that it holds by the names of its fields."""
    texts = describe_fields(kind)
    hints = typing.get_type_hints(kind, include_extras=True)
    rows: list[str] = []
    held: dict[str, type] = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        inner, *notes = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
        if dataclasses.is_dataclass(inner):
            held[field.name] = typing.cast(type, inner)
        elif FIXED not in notes and SUPPRESSED not in notes:
            rows.append(_option_row(field, inner, notes, texts[field.name]))
    return rows, held


def _option_row(field: dataclasses.Field[Any], hint: Any, notes: Sequence[Any], text: str) -> str:
    """Return the line of a table: an option's spellings with its value, what it means, its default."""
    settings = [note for note in notes if hasattr(note, "aliases")]
    names = [one.name for one in settings if one.name] or [field.name]
    names += [alias.lstrip("-") for one in settings for alias in one.aliases or ()]
    metavars = [note.metavar for note in notes if getattr(note, "metavar", None)]
    shown = [one.help_behavior_hint for one in settings if one.help_behavior_hint]
    default = re.sub(r"^\(default: (.*)\)$", r"\1", shown[0]("")) if shown else _show_default(field)
    value = metavars[0] if metavars else _show_type(hint)
    spelt = "<br>".join(f"`--{name}`" for name in names)
    return f"| {f'{spelt} {escape(value)}'.strip()} | {cell(escape(text))} | {cell(escape(default))} |"


def _show_default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    given = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return " ".join(map(str, given)) or "none" if isinstance(given, tuple) else str(given)


def _show_type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    kinds = {bool: "", int: "INT", float: "NUMBER", str: "TEXT"}
    return next((kinds[one] for one in (hint, *typing.get_args(hint)) if one in kinds), "VALUE")


def option_tables(kind: type) -> Iterator[str]:
    """Yield the tables of a dataclass and of those that it holds, shared ones as links."""
    own, held = list_options(kind)
    if own:
        yield "\n".join(["| option | meaning | default |", "| --- | --- | --- |", *own])
    links = [name for name in held if name in SHARED]
    for name in held:
        if name not in links:
            yield f"**{name.capitalize()}.** " + escape((held[name].__doc__ or "").strip().splitlines()[0])
            yield from option_tables(held[name])
    if links:
        words = ", ".join(f"[{name}]({Path(SHARED_PAGE).name}#{name})" for name in links)
        yield f"Options that commands share: {words}."


def command_page(group: str) -> str:
    """Return the page of the commands whose first word is `group`."""
    names = [name for name in COMMANDS if name.split()[0] == group]
    parts = [
        f"# The commands of decu {group}" if len(names) > 1 else f"# The command decu {group}",
        escape(GROUPS.get(group, "")),
    ]
    for name in names:
        command = load_command(name)
        SHOWN.update(steps=getattr(command, "default_steps", 200), scale=getattr(command, "default_scale", 1.0))
        parts += [f"## decu {name}", to_markdown(command.__doc__ or "")]
        parts += option_tables(command)
        if hasattr(command, "default_steps"):
            parts.append(f"Where neither words nor the config say, it takes {SHOWN['steps']} steps.")
    return "\n\n".join(part for part in parts if part) + "\n"


def overview_page() -> str:
    """Return the page that lists all commands."""
    rows = [
        f"| [`decu {name}`]({name.split()[0]}.md#decu-{name.replace(' ', '-')}) | {escape(entry.summary)} |"
        for name, entry in COMMANDS.items()
    ]
    intro = (
        "What `decu COMMAND --help_all` prints, made from the same dataclasses; `python -m ldm COMMAND` is the same."
    )
    return "\n".join(["# Commands", "", intro, "", "| command | what it does |", "| --- | --- |", *rows, ""])


def find_shared() -> dict[str, type]:
    """Return the dataclasses of options that many commands share, by name."""
    found: dict[str, type] = {}
    rest: list[type] = [load_command(name) for name in COMMANDS]
    while rest:
        _, held = list_options(rest.pop())
        found |= {name: kind for name, kind in held.items() if name in SHARED and name not in found}
        rest += held.values()
    return found


def shared_page() -> str:
    """Return the page of the options that many commands share."""
    SHOWN.update(steps="the command's", scale="the command's")  # type: ignore[dict-item]
    shared = find_shared()
    parts = ["# Options that commands share", "A command's `--help` names them, and its `--help_all` explains them."]
    for name in dict.fromkeys(full.rpartition(".")[2] for full in SHARED):
        if name in shared:
            parts += [f"## {name}", to_markdown(shared[name].__doc__ or ""), *option_tables(shared[name])]
    parts += ["## trust", "Every command takes this option.", "```text\n" + TRUST + "```"]
    return "\n\n".join(parts) + "\n"


def read_arguments(target: Callable[..., Any]) -> dict[str, str]:
    """Return what the docstrings of a class, its constructor and its bases say of arguments."""
    found: dict[str, str] = {}
    for kind in reversed(getattr(target, "__mro__", (target,))):
        for doc in (kind.__dict__.get("__doc__"), getattr(kind.__dict__.get("__init__"), "__doc__", None)):
            found |= _parse_arguments(inspect.cleandoc(doc)) if doc else {}
    return found


def _parse_arguments(doc: str) -> dict[str, str]:
    block = re.search(r"^Args:\n((?:    .*\n?|\n)+)", doc, re.MULTILINE)
    entries = re.findall(r"^    ([\w, *]+): ((?:.*\n?(?:     .*\n?)*))", block[1], re.MULTILINE) if block else []
    return {name.strip(" *"): text for names, text in entries for name in names.split(",")}


def list_targets() -> dict[str, str]:
    """Return the classes that the shipped configs name, with one config that does."""
    found: dict[str, str] = {}
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        for target in _find_targets(OmegaConf.to_container(OmegaConf.load(file), resolve=False)):
            found.setdefault(target, file.relative_to(ROOT).as_posix())
    return found


def _find_targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict) and isinstance(node.get("target"), str):
        yield node["target"]
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _find_targets(value)


def target_section(target: str, config: str) -> list[str]:
    """Return the table of one class that configs name."""
    kind = get_obj_from_str(target)
    known, open_ended = find_arguments(kind)
    texts = read_arguments(kind)
    parts = [f"### {target}", to_markdown((kind.__doc__ or "").split("\n\n")[0]), f"Used in `{config}`, for example."]
    rows = [_argument_row(name, one, texts.get(name, "")) for name, one in known.items()]
    if rows:
        parts.append("\n".join(["| key of `params` | default | range | meaning |", "| --- | --- | --- | --- |", *rows]))
    return [*parts, "Other keys are handed on to what it builds."] if open_ended else parts


def _argument_row(name: str, one: inspect.Parameter, text: str) -> str:
    default = "required" if one.default is inspect.Parameter.empty else f"`{one.default}`".replace("|", r"\|")
    allowed = str(PARAMETERS[name]) if name in PARAMETERS else ""
    return f"| `{name}` | {cell(default)} | {allowed} | {cell(escape(text))} |"


def config_page() -> str:
    """Return the page of the keys of configs: sections, values, and the arguments of the classes that they name."""
    sections = [
        f"| `{name}` | {', '.join(f'`{key}`' for key in keys) if keys else 'any'} | {SECTION_TEXTS[name]} |"
        for name, keys in SECTIONS.items()
    ]
    kinds = {int: "a whole number", float: "a number", str: "a word"}
    values = [
        f"| `{place}` | {kinds.get(hint, cell(escape(str(hint))))} | {allowed} |"
        for place, (hint, allowed) in SECTION_VALUES.items()
    ]
    parts = [
        "# Keys of configs",
        "What a YAML may say, read from the signatures that take it. A key that nothing reads is an error "
        "([what is refused](../errors.md)). The section `components` goes on top of the others when a member trains, "
        "and `bases` names files that are merged below.",
        "## Sections",
        "\n".join(["| section | keys | what it is |", "| --- | --- | --- |", *sections]),
        "Values that belong to no class:",
        "\n".join(["| key | type | range |", "| --- | --- | --- |", *values]),
    ]
    targets = list_targets()
    for prefix, title in KINDS.items():
        parts.append(f"## {title}")
        for target in sorted(name for name in targets if name.startswith(prefix + ".")):
            parts += target_section(target, targets[target])
    return "\n\n".join(parts) + "\n"
