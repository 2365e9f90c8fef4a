"""The pages hold together: links and anchors lead somewhere, the nav has every page, figures say how they are made."""

import posixpath
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from ldm.commands.line import COMMANDS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))]
NOTEBOOKS = sorted(f"docs/notebooks/{path.name}" for path in (DOCS / "notebooks").glob("*.py"))
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(^|`| )(decu|python|bash) [\w./-]", re.MULTILINE)
# Made while the site is built.
MADE = {f"docs/reference/{name.split()[0]}.md" for name in COMMANDS}
MADE |= {f"docs/reference/{name}.md" for name in ("commands", "shared_options", "config")}


def slug(heading):
    """The anchor of a heading, as GitHub and the site make it."""
    text = re.sub(r"`|\*\*|\[([^\]]*)\]\([^)]*\)", lambda found: found[1] or "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def prose(page):
    """The text of a page without its code; of a notebook the cells of Markdown."""
    text = (ROOT / page).read_text()
    if page.endswith(".py"):
        cells = re.findall(r"^# %% \[markdown\]\n((?:#.*\n)*)", text, re.MULTILINE)
        return "\n".join(re.sub(r"^# ?", "", cell, flags=re.MULTILINE) for cell in cells)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE)


@cache
def anchors(page):
    """The anchors of a page; the second heading of a name has -1 after it."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        name = slug(heading)
        found.append(f"{name}-{count}" if (count := found.count(name)) else name)
    return set(found)


def check_link(page, link):
    """What is wrong with a link of a page, or an empty text."""
    path, _, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    if target in MADE:
        return ""
    if not (ROOT / target).exists():
        return f"{page}: {link} leads nowhere"
    if anchor and anchor not in anchors(target):
        return f"{page}: {target} has no heading #{anchor}"
    return ""


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS])
def test_links_and_anchors_lead_somewhere(page):
    links = [link for _, link in LINK.findall(prose(page)) if not link.startswith(("https://", "http://"))]
    assert not list(filter(None, (check_link(page, link) for link in links)))


def test_a_broken_link_and_a_broken_anchor_are_noticed():
    assert "leads nowhere" in check_link("docs/decu.md", "nothing.md")
    assert "has no heading" in check_link("docs/decu.md", "reading.md#nothing")
    assert not check_link("docs/decu.md", "reading.md#how-large-is-large")


def list_nav(node):
    """The pages of a nav of MkDocs."""
    for entry in node:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from list_nav(value) if isinstance(value, list) else [value]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_sections_are_there_once_and_tables_are_whole(page):
    headings = re.findall(r"^#+ .+$", prose(page), re.MULTILINE)
    assert headings and len(prose(page).split()) > 40, "a page without a text"
    assert sorted(headings) == sorted(set(headings))
    for table in re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row)) for row in table.splitlines()]
        assert len({len(row) for row in rows}) == 1, table
        assert set("".join(rows[1])) <= set(" -:"), table


def test_every_page_is_in_the_nav_once():
    text = re.sub(r"!!python\S+ \{.*?\}\}", "none", (ROOT / "mkdocs.yml").read_text())
    listed = [f"docs/{page}" for page in list_nav(yaml.safe_load(text)["nav"])]
    made = {
        "README.md": "docs/index.md",
        "CONTRIBUTING.md": "docs/contributing.md",
        "CHANGELOG.md": "docs/changelog.md",
    }
    pages = {made.get(page, page) for page in PAGES} | {page.replace(".py", ".md") for page in NOTEBOOKS} | MADE
    assert sorted(listed) == sorted(pages)


def test_pages_that_code_and_configs_name_exist():
    files = [
        *ROOT.glob("ldm/**/*.py"),
        *ROOT.glob("configs/**/*.yaml"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("*.py"),
    ]
    named = {(file, page) for file in files for page in re.findall(r"\bdocs/\w+\.md", file.read_text())}
    assert len(named) > 10
    assert not [f"{file.relative_to(ROOT)}: {page}" for file, page in sorted(named) if not (ROOT / page).exists()]


def sections(page):
    """The sections of a page: from a heading to the next one."""
    return re.split(r"^(?=#+ )", (ROOT / page).read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_figures_stand_beside_the_command_that_made_them(page):
    """In the section of a figure there is a command, or a link to the section that has it."""
    shown = [part for part in sections(page) if re.search(r"!\[[^\]]*\]\([^)]+\.png\)", part)]
    bare = [part.splitlines()[0] for part in shown if not COMMAND.search(part) and not re.search(r"\]\([\w./]*#", part)]
    assert not bare, f"{page}: no command beside the figures of {bare}"


def test_every_asset_is_shown_somewhere():
    texts = "".join((ROOT / page).read_text() for page in PAGES)
    assert not [picture.name for picture in (ROOT / "assets").iterdir() if f"assets/{picture.name}" not in texts]


CARD = [
    "python main.py --base configs/latent-diffusion/cin256-v2.yaml -t --gpus 0, --scale_lr False",
    "--scale_lr False --start_from_pretrained --logdir logs --seed 0 --component 0 --ensemble_name bootstrapped",
    "--ensemble_name bootstrapped --overwrite_data_root ./imagenet_data",
    "python save_ensemble.py --path logs --ensemble_name bootstrapped --ensemble_comps 5",
    "python sample_model.py --path",
    "python sample_model_rollout.py --path",
    "python get_unc_synsets.py --path",
    "python get_unc_pixels.py --path",
]


@pytest.mark.parametrize("line", CARD)
def test_lines_of_the_card_are_documented(line):
    assert line in " ".join((DOCS / "ensembles.md").read_text().replace("\\\n", " ").split())


@pytest.mark.parametrize("line", ["bash scripts/quickstart.sh", "bash scripts/test.sh"])
def test_the_two_commands_are_in_the_readme(line):
    assert line in (ROOT / "README.md").read_text()
