"""What the site takes from outside docs/: pictures, the changelog, tutorials; and links that lead there.

A hook of MkDocs (mkdocs.yml). The Markdown files keep the links that act where the repository is read; here each is
written anew from the place of its page on the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()(?!https?://|#)([^)\s#]+)")
# What Material loads from elsewhere for the search of pages that are opened as files, and what does it here.
ELSEWHERE = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
# How much more than others a page counts in the search.
WEIGHTS = {"reading.md": 4, "ensembles.md": 3, "files.md": 3, "own_pictures.md": 3, "clusters.md": 3, "start.md": 2}
CODE = re.compile(r"(^```.*?^```|^(?: {4}|\t).*?$)", re.M | re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures, the pages of the repository's root, and the tutorials."""
    for picture in sorted((ROOT / "assets").iterdir()):
        files.append(File.generated(config, f"assets/{picture.name}", abs_src_path=str(picture)))
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for notebook in sorted((ROOT / "docs/notebooks").glob("*.py")):
        text = notebook_page(notebook.read_text(), notebook.name)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links to what lies elsewhere on the site than in the repository; code stays as it is.

    The search finds pages that answer questions before those that list names.
    """
    source = page.file.src_uri
    listing = source.startswith("reference/") or source == "api.md"
    page.meta.setdefault("search", {"boost": 0.2 if listing else WEIGHTS.get(source, 1)})
    root_pages = {place: name for name, place in PAGES.items()}
    home = root_pages.get(source, f"docs/{source}")
    pieces = CODE.split(markdown)
    return "".join(
        piece if index % 2 else LINK.sub(lambda link: relink(link[1], home, source), piece)
        for index, piece in enumerate(pieces)
    )


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Put the project's own script in the place of the one that a page would fetch from elsewhere."""
    return replace_script(output, posixpath.dirname(page.url))


def on_post_template(output_content: str, **_: object) -> str:
    """Do the same in the page of addresses that do not exist."""
    return replace_script(output_content, "")


def replace_script(output: str, folder: str) -> str:
    """Return a page of a folder of the site with the project's own script for its search."""
    script = posixpath.relpath("javascripts/search_from_file.js", folder or ".")
    return output.replace(ELSEWHERE, f'<script src="{script}"></script>')


def relink(link: str, home: str, source: str) -> str:
    """Return a link of a file of the repository as one of its page on the site.

    Args:
        link: relative to the file, without an anchor.
        home: the file in the repository.
        source: the place of its page on the site.
    """
    target = posixpath.normpath(posixpath.join(posixpath.dirname(home), link))
    place = PAGES.get(target, target.removeprefix("docs/"))
    if place == "README.md":
        place = "index.md"
    if place.startswith("notebooks/") and place.endswith((".py", ".ipynb")):
        place = posixpath.splitext(place)[0] + ".md"
    return posixpath.relpath(place, posixpath.dirname(source) or ".")


def notebook_page(text: str, name: str) -> str:
    """Return a notebook in percent format as a page: cells of Markdown as text, the others as code."""
    cells = re.split(r"^# %%", text, flags=re.MULTILINE)[1:]
    stem = name.removesuffix(".py")
    parts = []
    for cell in cells:
        head, _, body = cell.partition("\n")
        if "[markdown]" in head:
            parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        elif body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    files = f"The files are `docs/notebooks/{name}` and `docs/notebooks/{stem}.ipynb`, which hold the same cells."
    return "\n\n".join([parts[0], files, *parts[1:]]) + "\n"
