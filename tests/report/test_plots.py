"""Figures are drawn for awkward data and read back; tables survive the round trip."""

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import trapezoid

from ldm.report.plots import (
    COLOURS,
    Curve,
    _density,
    _spread,
    curve_plot,
    distribution_plot,
    per_bin_plot,
    wrap_text,
)
from ldm.report.tables import markdown_table, read_comments, read_csv, write_csv
from ldm.report.variance import choose_steps
from ldm.util import generator

# Bins of the digits: few classes, one bin with a single class, one with equal values.
AWKWARD = {"1": [1.1, 1.0, 0.9], "10": [0.5], "100": [0.3, 0.3], "1300": [0.0, 0.01, 0.2, 0.05]}
PLOTS = {
    "per_bin": lambda path, **rest: per_bin_plot(AWKWARD, path, "mutual information (nats)", **rest),
    "distribution": lambda path, **rest: distribution_plot(AWKWARD, path, "mutual information (nats)", **rest),
    "curve": lambda path, **rest: curve_plot(
        {"a": Curve([3, 2, 1], [0, math.nan, 2]), "b": Curve([3, 1], [1, 2], [0, 1], [2, 3])}, path, "t", "nats", **rest
    ),
}


def has_colour(path, name):
    """Whether opaque pixels of a '#RRGGBB' colour are in the picture."""
    colour = [int(name[i : i + 2], 16) for i in (1, 3, 5)]
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return bool((np.abs(pixels - colour).max(-1) <= 45).any())


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_draw_every_series_the_same_way_twice_and_replace_nothing(tmp_path, plot):
    for name in ("a.png", "b.png"):
        PLOTS[plot](tmp_path / name, title="title", note="Spearman -0.9")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert all(has_colour(tmp_path / "a.png", colour) for colour in COLOURS[: 2 if plot == "curve" else 4])
    with pytest.raises(FileExistsError):
        PLOTS[plot](tmp_path / "a.png")
    PLOTS[plot](tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_long_titles_stay_over_the_axes(tmp_path):
    """A note of a hundred letters leaves the picture as wide as it is without one, and all words are there."""
    note = "Spearman of MI and images per class -0.81 [-0.95, -0.33]; AUROC of classes with fewer images 0.93"
    sizes = []
    for name, text in (("short.png", "note"), ("long.png", note)):
        per_bin_plot({"1": [1.0, 2.0], "all": [0.1, 0.2]}, tmp_path / name, "nats", title="title", note=text)
        with Image.open(tmp_path / name) as picture:
            sizes.append(picture.size)
    assert sizes[1][0] <= 1.05 * sizes[0][0] and sizes[1][1] > sizes[0][1]
    assert " ".join(wrap_text(note, 200, 9)) == note and len(wrap_text(note, 200, 9)) > 2
    assert wrap_text("$z_{999}$ overlong", 1, 9) == ["$z_{999}$", "overlong"]


def test_a_near_ceiling_is_a_line_and_a_far_one_is_words(tmp_path):
    """The line is the only thing that runs over the whole width in near-black dashes."""

    def dashes(ceiling):
        path = tmp_path / f"{ceiling}.png"
        per_bin_plot(AWKWARD, path, "nats", ceiling=("ln M", ceiling))
        pixels = np.asarray(Image.open(path).convert("L"))
        # The left axis and the bottom axis are solid: look right of one and above the other.
        return ((pixels[: int(0.7 * len(pixels)), 150:] < 80).mean(axis=1) > 0.5).any()

    assert dashes(1.609)
    assert not dashes(16.0)


def texts_and_scale(monkeypatch, draw):
    """The words and the scale (x, y) of the axes of the one figure that `draw` saves."""
    figures = []
    monkeypatch.setattr("ldm.report.plots.save_figure", lambda figure, path, overwrite: figures.append(figure))
    draw()
    (axes,) = figures[0].axes
    return [text.get_text() for text in axes.texts], (axes.get_xscale(), axes.get_yscale())


def test_few_classes_are_named_beside_their_dots_and_many_are_not(monkeypatch):
    values = {"1": [1.0, 0.9], "all": [0.4, 0.5, 0.5]}
    names = {"1": ["ant", "a class with a rather long name"], "all": ["cat", "dog", "eel"]}
    found, _ = texts_and_scale(monkeypatch, lambda: per_bin_plot(values, "x.png", "nats", names=names))
    assert sorted(found) == ["a class with a ra…", "ant", "cat", "dog", "eel"]
    many = {"1": np.linspace(1, 2, 21)}
    found, _ = texts_and_scale(monkeypatch, lambda: per_bin_plot(many, "x.png", "nats", names={"1": ["a"] * 21}))
    assert found == []


@pytest.mark.parametrize(("least", "scale"), [(0.2, "linear"), (0.05, "log"), (0.0, "linear")])
def test_positive_values_over_more_than_a_decade_have_a_logarithmic_axis(monkeypatch, least, scale):
    values = {"1": [1.0, 0.9, 0.8], "all": [least, 0.3, 0.4]}
    _, found = texts_and_scale(monkeypatch, lambda: per_bin_plot(values, "x.png", "nats"))
    assert found == ("linear", scale)
    _, found = texts_and_scale(monkeypatch, lambda: distribution_plot(values, "x.png", "nats"))
    assert found == (scale, "linear")


def test_a_logarithmic_curve_always_shows_its_ceiling(tmp_path):
    """Curves of 1e-6 to 1e-3 under ln 5: on a linear axis the ceiling would be words."""
    curve = {"a": Curve([3, 2, 1], [0.0, 1e-6, 1e-3], [0.0, 0.0, 1e-4], [1e-7, 1e-5, 1e-2])}
    for log in (False, True):
        path = tmp_path / f"{log}.png"
        curve_plot(curve, path, "t", "nats", ceiling=("ln 5", 1.609), log=log, legend="images")
        pixels = np.asarray(Image.open(path).convert("L"))[:, 120:620]
        dashes = ((pixels < 80).mean(axis=1) > 0.4)[: len(pixels) // 3]
        assert dashes.any() == log


def test_density_keeps_its_mass_above_the_lower_end():
    """Reflected at 0, the part above 0 carries all mass: area * peak = 1, as found from the unreflected kernel."""
    values = torch.rand(200, generator=generator("plots", 1), dtype=torch.float64).numpy() ** 2
    grid = np.linspace(0, 3, 6001)
    whole = np.linspace(-3, 3, 12001)
    free = _density(values, whole, None)
    # Both curves are scaled to a peak of 1; far from the edge they must be proportional.
    ratio = _density(values, grid, 0.0)[3000:3200] / free[9000:9200]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    assert trapezoid(_density(values, grid, 0.0), grid) / ratio[0] == pytest.approx(trapezoid(free, whole), rel=1e-6)


def test_points_of_a_strip_stay_inside_it_and_apart():
    offsets = _spread(np.full(50, 2.0))
    assert abs(offsets).max() <= 0.16 and len(np.unique(offsets)) == 50
    assert _spread(np.array([1.0])).tolist() == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: per_bin_plot({}, path, "nats"), "got 0 bins"),
        (lambda path: per_bin_plot({"1": [], "2": [1]}, path, "nats"), r"broken: \['1'\]"),
        (lambda path: distribution_plot({"1": [math.nan]}, path, "nats"), r"broken: \['1'\]"),
        (lambda path: distribution_plot({"1": [-1.0]}, path, "nats"), "pass lower=None"),
        (lambda path: curve_plot({}, path, "t", "nats"), "at least one curve"),
        (lambda path: curve_plot({"a": Curve([1, 2], [1])}, path, "t", "nats"), r"\(2,\) and \(1,\)"),
    ],
)
def test_plot_errors_say_what_was_expected(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


ROWS = [
    {"class": 0, "synset": "n01440764", "name": 'tench, "Tinca"', "nats": 0.1 + 0.2, "seen": True, "code": "007"},
    {"class": 1, "synset": "n01443537", "name": "gold\nfish | x", "nats": 1e-300, "seen": False, "code": "1_0"},
    {"class": -2, "synset": "#", "name": None, "nats": math.inf, "seen": None, "code": "1e"},
]


def test_tables_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "table.csv"
    write_csv(path, ROWS, comments=["nats: mutual information", "seed 1\nrevision abc"])
    assert read_csv(path) == ROWS
    assert [type(value) for value in read_csv(path)[0].values()] == [int, str, str, float, bool, str]
    assert read_comments(path) == ["nats: mutual information", "seed 1", "revision abc"]
    with pytest.raises(FileExistsError):
        write_csv(path, ROWS)


def test_floats_of_every_kind_survive(tmp_path):
    values = torch.randn(200, generator=generator("tables", 1), dtype=torch.float64).exp().pow(30).tolist()
    values += [-math.inf, 5e-324, -1e22, 1.0, -0.0]
    write_csv(tmp_path / "t.csv", [{"x": np.float64(value)} for value in values])
    assert [row["x"] for row in read_csv(tmp_path / "t.csv")] == values
    assert all(isinstance(row["x"], float) for row in read_csv(tmp_path / "t.csv"))
    write_csv(tmp_path / "nan.csv", [{"x": math.nan}])
    assert math.isnan(read_csv(tmp_path / "nan.csv")[0]["x"])


def test_tables_are_plain_csv(tmp_path):
    write_csv(tmp_path / "t.csv", ROWS)
    with open(tmp_path / "t.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ['tench, "Tinca"', "gold\nfish | x", ""]


def test_markdown_table():
    assert markdown_table([{"bin": "a|b", "mean": 0.123456, "n": 3}, {"bin": "c", "mean": None, "n": 40000}]) == (
        "| bin | mean | n |\n| --- | ---: | ---: |\n| a\\|b | 0.1235 | 3 |\n| c |  | 40000 |"
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([{"a": 1}, {"b": 1}], "row 1 has columns"),
        ([{"a": torch.tensor(1.0)}], "use .item"),
    ],
)
def test_table_errors_say_what_was_expected(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        write_csv(tmp_path / "t.csv", rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        (list(range(981, 0, -20)), [981, 781, 581, 401, 201, 1]),
        ([750, 500, 250, 2, 1], [750, 500, 250, 1]),
        ([1.0, 0.5, 0.0], [1.0, 0.5, 0.0]),
        ([1], [1]),
    ],
)
def test_steps_are_shown_evenly_without_the_same_again(times, shown):
    assert [times[place] for place in choose_steps(times, 6)] == shown
