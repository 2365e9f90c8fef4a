"""CHANGELOG.md: new names of its tables exist, old ones do not, and its last version is that of the package."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from ldm import __version__
from ldm.commands import COMMANDS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CHANGELOG.md").read_text()


def rows(section):
    """[(old, new)] of the table below a heading; what is in round brackets, or after a semicolon, is left out."""
    _, _, text = TEXT.partition(f"### {section}\n")
    body = re.split(r"^##", text, maxsplit=1, flags=re.MULTILINE)[0]
    cells = re.findall(r"^\| (.+?) \| (.+?) \|$", body, re.MULTILINE)[2:]
    assert len(cells) > 3, section
    return [tuple(re.split(r"[(;]", cell.replace("`", ""))[0].strip() for cell in row) for row in cells]


def file_of(module):
    """The file of a module, or None."""
    path = ROOT / module.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@cache
def names_in(module):
    """What a module of the library defines at its top level; a package has what it imports, too."""
    file = file_of(module)
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ImportFrom) and file.name == "__init__.py":
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def exists(name):
    module, _, last = name.rpartition(".")
    return file_of(module) is not None and last in names_in(module)


def test_modules_are_where_it_says():
    table = rows("Modules")
    assert not [new for _, new in table if file_of(new) is None]
    assert not [old for old, _ in table if file_of(old) is not None]


def test_names_are_where_it_says():
    table = rows("Names")
    assert not [new for _, new in table if not exists(new)]
    assert not [old for old, _ in table if exists(old)]


def test_commands_are_called_what_it_says():
    table = rows("Commands")
    assert {"get_unc_synsets.py", "scripts/sample_diffusion.py"} <= {old for old, _ in table}
    for _, new in table:
        assert new.removeprefix("decu ") in COMMANDS or (ROOT / new).is_file(), new


def test_the_last_version_is_this_one():
    assert re.search(r"^## (\S+)$", TEXT, re.MULTILINE)[1] == __version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in citation
    assert "2406.18580" in citation


@pytest.mark.parametrize(
    "name", ["ldm.pipelines.NoSuchName", "ldm.nowhere.Schedule", "ldm.diffusion.times.VPSchedule2"]
)
def test_a_name_that_does_not_exist_is_found_out(name):
    assert not exists(name)
