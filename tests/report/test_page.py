"""Pages: what was measured is in them, words of others do not act in them, and a browser has nothing to complain of."""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from ldm.commands.report import WritePage
from ldm.report.page import PageTable, Picture, ResultPage, Section, Text, make_cell
from ldm.report.pages import make_page
from ldm.report.reading import how_to_read
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
    assert text.count("<figure") == 1 + 1 + 3, "the plot, a rollout, and a map of each class"
    assert text.count('<figure class="wide"') == 1, "the rollout, which a narrow screen moves across"
    assert "decu uncertainty classes" in text and "in nats" in text and "abc" in text


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ({"meaning": 3}, "meaning must be a word, got 3"),
        ({"silent": None}, "silent must be a word, got null"),
        ({"spearman": "-0.7"}, "spearman must be a mapping of keys, got the word '-0.7'"),
        ({"spearman": {"estimate": "-0.7"}}, "spearman.estimate must be a number or null, got the word '-0.7'"),
        ({"bins": [3]}, "bins must be a list, each a mapping of keys, got [3]"),
        (
            {"standing_out": {"rate": 0.1, "classes": "bee"}},
            "standing_out.classes must be a list, each a word, got the word",
        ),
        ({"standing_out": {"rate": 0.1, "classes": [1]}}, "standing_out.classes must be a list, each a word, got [1]"),
    ],
)
def test_a_summary_of_other_types_is_refused(results, summary, words):
    (results / "samps_uncs_branch0" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        make_page(results).write(results / "page.html")
    assert "summary.json is damaged, or is not a summary of classes" in str(refusal.value)


def test_cards_say_what_samples_are_taken_for(results):
    rows = [
        {"class": place, "name": name, "samples": 10, "recognised": right, "taken_for": "ant", "taken": 10 - right}
        for place, (name, right) in enumerate(zip(NAMES, (10, 2, 7), strict=True))
    ]
    write_csv(results / "mistakes" / "mistakes.csv", [{**row, "real": 4, "real_recognised": 3} for row in rows])
    Image.new("RGB", (30, 20)).save(results / "mistakes" / "nearest_2.png")
    text = make_page(results).write(results / "page.html").read_text()
    assert "takes 63% of 30 samples for their class (of 12 real pictures that it was not trained on: 75%)" in text
    assert "the fewest of bee &amp; &lt;b&gt;wasp&lt;/b&gt;: 2 of 10 are recognised, 8 are taken for ant" in text
    assert "Of its samples 7 of 10 are recognised, 3 are taken for ant; of its real pictures 3 of 4." in text
    assert text.count("<figcaption>a sample of each member, and the training picture nearest to it") == 1
    assert "Table: mistakes" not in text


def test_what_has_no_interval_is_said_without_one(tmp_path):
    """Four classes, one noise each: neither their information nor its correlation with recognition has an interval."""
    numbers = {"mi_mean": 0.25, "mi_low": math.nan, "mi_high": math.nan}
    rows = [{"class": place, "name": f"c{place}", "bin": "4", **numbers} for place in range(4)]
    write_csv(tmp_path / "uncertainty.csv", [{**row, "mi_mean": 2.0 ** -row["class"]} for row in rows])
    own = {"samples": 10, "taken_for": "c0", "taken": 1, "real": 4, "real_recognised": 3}
    write_csv(
        tmp_path / "mistakes" / "mistakes.csv",
        [{"class": place, "name": f"c{place}", "recognised": 2 * place, **own} for place in range(4)],
    )
    said = " ".join(make_page(tmp_path).summary)
    assert "most about c0 (1 nats, 4 training images) and least about c3 (0.125 nats" in said
    assert "the share of samples that are recognised: -1.00 over 4 classes" in said and "nan" not in said


def test_one_class_is_not_ranked(tmp_path):
    write_csv(tmp_path / "uncertainty.csv", [{"class": 0, "name": "pictures", "bin": "50", "mi_mean": 0.5}])
    assert make_page(tmp_path).summary == [
        "There is one class, pictures, and nothing to rank: 0.5 nats, 50 training images."
    ]


def test_large_pictures_are_small_in_a_page_and_look_alike(tmp_path):
    across, down = np.meshgrid(np.linspace(0, 9, 700), np.linspace(0, 9, 500))
    waves = np.stack([np.sin(across * down), np.cos(across), np.sin(down)], axis=2)
    pixels = (127 * (1 + waves)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    kind, content = Picture(tmp_path / "large.png", "waves").source.split(";base64,")
    content = base64.b64decode(content)
    assert kind == "data:image/webp" and len(content) < 0.3 * (tmp_path / "large.png").stat().st_size
    with Image.open(io.BytesIO(content)) as shown:
        assert np.abs(np.asarray(shown.convert("RGB")).astype(int) - pixels).mean() < 4


def test_any_results_have_a_page_and_none_have_not(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        make_page(tmp_path)
    write_csv(tmp_path / "metrics.csv", [{"metric": "fid", "value": 1.25}], ["of 500 samples", "value: 0 is best"])
    page = make_page(tmp_path)
    assert [section.title for section in page.sections] == [
        "Table: metrics.csv",
        "How to read this",
        "How this was made",
    ]
    _, said, unfolded = page.sections[0].blocks
    assert said == Text("of 500 samples") and unfolded.text == "of 500 samples\nvalue: 0 is best"
    write_csv(tmp_path / "metrics.csv", [{"metric": "fid", "value": 1.25}], ["long " * 100], overwrite=True)
    assert len(make_page(tmp_path).sections[0].blocks) == 2


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("__main__.py laplace filter --samples a --risk 0.05", "A promise holds"),
        ("decu attribute --run a", "Certainty is how much"),
        ("decu value --run a", "The fall is how much"),
        ("python -m ldm sample restore --run a", "Any map keeps that"),
        ("decu uncertainty ood --run a", "AUROC is the probability"),
        ("decu evaluate trainings --runs a b", "one more training"),
    ],
)
def test_results_that_one_acts_on_say_what_they_mean(line, word):
    text = " ".join(block.text for block in how_to_read([line]).blocks)
    assert word in text and "comments of each table" not in text


def test_cells_are_sorted_by_numbers_and_show_four_digits():
    assert make_cell(0.123456).text == "0.1235" and make_cell(0.123456).number == 0.123456
    assert make_cell(12345).text == "12,345" and make_cell(None).text == "" == make_cell(float("nan")).text
    assert make_cell("a").number is None and make_cell(True).text == "yes"


def test_classes_that_are_numbers_are_called_classes(results):
    table = next(results.rglob("uncertainty.csv"))
    rows = [{"class": place, "name": name, "bin": 5, "n": 4, "mi_mean": 1 + place} for place, name in enumerate("407")]
    write_csv(table, rows, overwrite=True)
    page = make_page(results)
    assert "disagree most about class 7 (3 nats, 5 training images) and least about class 4" in page.summary[0]


@pytest.mark.parametrize(("width", "least"), [(700, 34), (1500, 46), (4000, 62)])
def test_a_wide_picture_is_not_made_smaller_than_half_its_pixels(width, least, tmp_path):
    Image.new("RGB", (width, 30)).save(tmp_path / "wide.png")
    sections = [Section("Results", [Picture(tmp_path / "wide.png", "wide")])]
    path = ResultPage("A title", [], sections).write(tmp_path / "page.html")
    assert f'class="wide" tabindex="0" style="--least: {least}rem; --own: {width}px"' in path.read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at pages with")
def test_a_browser_shows_it_on_a_narrow_screen_without_overflow_or_error(tmp_path):
    """A window of Chromium has 500 pixels at least, so that a screen of 400 is a frame."""
    wide: dict = {f"a rather long column {place}": place / 7 for place in range(12)}
    wide["in words"] = "a sentence of several words in a cell"
    Image.new("RGB", (1500, 300)).save(tmp_path / "wide.png")
    blocks = [Text("word " * 80), PageTable(list(wide), [wide] * 3), Picture(tmp_path / "wide.png", "a wide one")]
    path = ResultPage("A title", ["A sentence."], [Section("Results", blocks)]).write(tmp_path / "page.html")
    # What the page measures of itself goes into the title around it, which the browser prints with the document.
    probe = "<script>parent.document.title = [document.documentElement.scrollWidth, innerWidth, document"
    probe += ".querySelectorAll('th button').length, document.querySelector('td.long').offsetWidth, "
    probe += "document.querySelector('img').offsetWidth].join(' ');</script></body>"
    framed = html.escape(path.read_text().replace("</body>", probe))
    style = "width: 400px; height: 900px; border: 0"
    path.write_text(f'<title></title><iframe style="{style}" srcdoc="{framed}"></iframe>')
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
    words += ["--enable-logging=stderr", "--v=0", path.as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=120)
    width, window, heads, cell, picture = map(int, re.search(r"<title>([\d ]+)</title>", shown.stdout)[1].split())
    assert width <= window == 400 and heads == 13
    assert cell >= 15 * 16, "words are not set one below the other"
    assert picture == 46 * 16, "half a screen's pixel to a pixel, to be moved"
    assert "CONSOLE" not in shown.stderr
