"""The site is built without a warning, needs nothing from elsewhere, and its reference says what the commands take."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.commands.line import COMMANDS

ROOT = Path(__file__).parent.parent
needs_docs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="needs the extra docs: pip install 'decu-uncertainty[docs]'",
)
# What a browser loads by itself, other than a link that is followed by hand.
LOADED = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=\"(https?:|//)|<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)[^>]*(https?:|//)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as scripts/docs.sh builds it."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@needs_docs
@pytest.mark.slow
def test_the_site_is_whole_and_needs_nothing_from_elsewhere(site):
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert {"index.html", "reading.html", "changelog.html", "notebooks/texts.html"} < set(pages)
    assert not [name for name, text in pages.items() if LOADED.search(text)]
    assert not [name for name, text in pages.items() if "search_from_file.js" not in text], "else there is no search"
    assert "From nothing to a page" in (site / "search/search_index.js").read_text(), "the search works from a file"


@needs_docs
@pytest.mark.slow
def test_the_reference_names_every_command_with_its_options(site):
    for name in COMMANDS:
        assert f"decu {name}" in (site / f"reference/{name.split()[0]}.html").read_text()
    text = (site / "reference/uncertainty.html").read_text()
    assert "<code>--ci_width</code> NATS" in text and "until its 95 % interval is this narrow" in text
    assert 'id="ldm.pipelines.load_ensemble"' in (site / "api.html").read_text()
    keys = (site / "reference/config.html").read_text()
    assert "<code>guidance_scale</code>" in keys and "ldm.data.folder.ImageFolder" in keys
