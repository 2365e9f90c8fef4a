"""Pages: what was measured is in them, words of others do not act in them, and a browser has nothing to complain of."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from ldm.commands.report import WritePage
from ldm.report.page import PageTable, Picture, ResultPage, Section, Text, make_cell
from ldm.report.pages import make_page
from ldm.report.tables import write_csv

NAMES = ["ant", "bee & <b>wasp</b>", "cat"]


@pytest.fixture
def results(tmp_path):
    """What `decu uncertainty classes` and `pixels` write, of three classes."""
    folder = tmp_path / "bootstrapped_my_5"
    branch = folder / "samps_uncs_branch0"
    branch.mkdir(parents=True)
    rows = [
        {
            "class": place,
            "name": name,
            "bin": str(images),
            "n": 4,
            "mi_mean": mi,
            "mi_low": 0.9 * mi,
            "mi_high": 1.2 * mi,
        }
        for place, (name, images, mi) in enumerate(zip(NAMES, (50, 5, 20), (0.1, 0.4, 0.2), strict=True))
    ]
    write_csv(branch / "uncertainty.csv", rows, ["mi: in nats"])
    summary = {"spearman": {"estimate": -1.0, "low": None, "high": None}, "bins": []}
    (branch / "summary.json").write_text(json.dumps(summary))
    Image.new("RGB", (20, 10)).save(branch / "uncertainty.png")
    (branch / "rollout_sample").mkdir()
    Image.new("RGB", (2000, 10)).save(branch / "rollout_sample" / "rollout_bin5_1_bee.png")
    record = {
        "command": ["decu", "uncertainty", "classes"],
        "revision": "abc",
        "versions": {"torch": "2"},
        "time": "2026",
    }
    (branch / "record.json").write_text(json.dumps({**record, "options": {"n": 4}}))
    (folder / "pixel_unc").mkdir()
    images, maps = np.zeros((3, 1, 1, 8, 8)), np.ones((3, 1, 8, 8))
    np.savez(folder / "pixel_unc" / "pixel_unc_branch0.npz", images=images, mi=maps, classes=np.arange(3))
    return folder


def test_the_page_of_an_ensemble_ranks_its_classes_and_stands_alone(results):
    (page,) = WritePage((str(results),)).run()
    text = page.read_text()
    assert "disagree most about bee &amp; &lt;b&gt;wasp&lt;/b&gt; (0.4 [0.36, 0.48] nats, 5 training images)" in text
    order = [text.index(f"<td>{name}</td>") for name in ("bee &amp; &lt;b&gt;wasp&lt;/b&gt;", "cat", "ant")]
    assert order == sorted(order), "the most uncertain class comes first"
    assert not re.search(r'(src|href)="(?!data:|#)', text), "nothing is loaded from elsewhere"
    assert text.count("<figure>") == 1 + 1 + 3, "the plot, a rollout, and a map of each class"
    assert "decu uncertainty classes" in text and "in nats" in text and "abc" in text


def test_any_results_have_a_page_and_none_have_not(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        make_page(tmp_path)
    write_csv(tmp_path / "metrics.csv", [{"metric": "fid", "value": 1.25}])
    page = make_page(tmp_path)
    assert [section.title for section in page.sections] == [
        "Table: metrics.csv",
        "How to read this",
        "How this was made",
    ]


def test_cells_are_sorted_by_numbers_and_show_four_digits():
    assert make_cell(0.123456).text == "0.1235" and make_cell(0.123456).number == 0.123456
    assert make_cell(12345).text == "12,345" and make_cell(None).text == "" == make_cell(float("nan")).text
    assert make_cell("a").number is None and make_cell(True).text == "yes"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at pages with")
def test_a_browser_shows_it_on_a_narrow_screen_without_overflow_or_error(tmp_path):
    wide = {f"a rather long column {place}": place / 7 for place in range(12)}
    Image.new("RGB", (1500, 300)).save(tmp_path / "wide.png")
    blocks = [Text("word " * 80), PageTable(list(wide), [wide] * 3), Picture(tmp_path / "wide.png", "a wide one")]
    path = ResultPage("A title", ["A sentence."], [Section("Results", blocks)]).write(tmp_path / "page.html")
    # What the page measures of itself goes into its title, which the browser prints with the document.
    probe = "<script>document.title = [document.documentElement.scrollWidth, innerWidth, "
    probe += "document.querySelectorAll('th button').length].join(' ');</script></body>"
    path.write_text(path.read_text().replace("</body>", probe))
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
    words += ["--enable-logging=stderr", "--v=0", path.as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=120)
    width, window, heads = map(int, re.search(r"<title>(\d+) (\d+) (\d+)</title>", shown.stdout).groups())
    assert width <= window and heads == 12
    assert "CONSOLE" not in shown.stderr
