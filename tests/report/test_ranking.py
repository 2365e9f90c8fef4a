"""Rankings by name: who is named, and that names do not cover each other."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from ldm.report.names import ALL_NAMED, LONGEST_NAME, cut_name, shorten_names, write_names
from ldm.report.natural import rank_natural
from ldm.report.ranking import RankedClass, _choose_named, images_plot, ranked_plot


def test_few_classes_are_all_named_and_of_many_those_that_stand_out():
    scores = np.arange(30.0)
    assert _choose_named(scores[:ALL_NAMED], [3]) == list(range(ALL_NAMED))[::-1]
    assert _choose_named(scores, [3, 9]) == [9, 3] and _choose_named(scores, []) == [29, 28, 27]


def test_names_of_points_in_one_place_stand_below_each_other():
    axes = Figure(figsize=(6, 4)).add_subplot()
    axes.loglog([1, 1000], [1, 1000], "o")
    at = np.full(4, 10.0)
    write_names(axes, ["ant", "bee", "cat", "dog"], at, at)
    figure = axes.get_figure()
    figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 2 for below, above in pairwise(boxes))


def test_names_of_points_at_the_foot_stand_above_it():
    axes = Figure(figsize=(6, 4)).add_subplot()
    heights = np.array([90.0, *np.linspace(3, 6, 10)])
    axes.plot(np.full(11, 5.0), heights, "o")
    axes.set_ylim(0, 100)
    write_names(axes, [f"name {place}" for place in range(11)], np.full(11, 5.0), heights, left=True)
    axes.get_figure().draw_without_rendering()
    texts = sorted(axes.texts, key=lambda text: Text.get_window_extent(text).y0)
    boxes = [Text.get_window_extent(text) for text in texts]
    assert boxes[0].y0 >= axes.bbox.y0 - 2
    assert all(below.y1 <= above.y0 + 2 for below, above in pairwise(boxes))
    assert [text.get_text() for text in texts] == [f"name {place}" for place in (*range(1, 11), 0)]


def test_names_at_the_right_end_inside_the_axes():
    axes = Figure(figsize=(6, 4)).add_subplot()
    axes.loglog([1, 1000], [1, 1000], "o")
    write_names(axes, ["a class with a rather long name"], np.array([900.0]), np.array([30.0]))
    axes.get_figure().draw_without_rendering()
    assert Text.get_window_extent(axes.texts[0]).x1 <= axes.bbox.x1


def test_long_names_are_cut_with_an_ellipsis():
    assert cut_name("truck") == "truck"
    assert (
        cut_name("African hunting dog, hyena dog") == "African hunting d…" and len(cut_name("x" * 99)) == LONGEST_NAME
    )


def test_words_that_all_names_begin_with_go_where_one_is_long():
    groups = {"seen": ["a handwritten seven", "a handwritten two"], "hidden": ["a handwritten six"]}
    assert shorten_names(groups) == {"seen": ["… seven", "… two"], "hidden": ["… six"]}
    assert shorten_names({"all": ["a cat", "a dog"]}) == {"all": ["a cat", "a dog"]}
    assert shorten_names({"all": ["x" * 20, "y"]}) == {"all": ["x" * 17 + "…", "y"]}


@pytest.mark.parametrize("count", [1, 70, 300])
def test_any_number_of_classes_is_drawn(count, tmp_path):
    classes = [RankedClass(f"class {k}", k + 1, 1 / (k + 1), 0.9 / (k + 1), 1.1 / (k + 1)) for k in range(count)]
    ranked_plot(classes, tmp_path / "ranked.png", "nats")
    images_plot(classes, tmp_path / "images.png", "nats", named=[0])
    assert (tmp_path / "ranked.png").stat().st_size > 0 and (tmp_path / "images.png").stat().st_size > 0


def test_numbers_of_images_that_do_not_differ_have_no_picture(tmp_path):
    rows = [
        {"name": name, "bin": 4, "mi_mean": mi, "mi_low": mi, "mi_high": mi} for name, mi in (("a", 0.1), ("b", 0.2))
    ]
    for folder, bins, drawn in (("same", (4, 4), False), ("other", (4, 9), True)):
        (tmp_path / folder).mkdir()
        table, report = rank_natural([{**row, "bin": size} for row, size in zip(rows, bins, strict=True)])
        report.draw(tmp_path / folder, table, "")
        assert (tmp_path / folder / "uncertainty.png").exists()
        assert (tmp_path / folder / "by_images.png").exists() == drawn
