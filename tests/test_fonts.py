"""Letters that a figure's font lacks are another font's, or are said to be missing, once."""

import logging
import warnings
from functools import partial

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from ldm.fonts import find_families, save_with_letters

NOWHERE = "\U0010fff0"  # a letter for private use that no font draws


def draw(words, family):
    figure = Figure(figsize=(1, 1))
    return figure, figure.text(0, 0.5, words, fontfamily=family)


def test_letters_of_another_font_are_taken(tmp_path):
    figure, text = draw("a é", "cmr10")  # Computer Modern as TeX orders it has no accented letters
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_with_letters(figure, lambda: figure.savefig(tmp_path / "a.png"))
    family = text.get_fontfamily()[-1]
    assert family != "cmr10" and ord("é") in get_font(findfont(FontProperties(family=family))).get_charmap()


def test_letters_that_no_font_has_are_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a", "b"):
            save = partial(draw(NOWHERE, "DejaVu Sans")[0].savefig, tmp_path / f"{name}.png")
            save_with_letters(save.func.__self__, save)
    assert len([one for one in caplog.records if "no installed font" in one.message]) == 1
    assert (tmp_path / "b.png").exists() and find_families({NOWHERE}) == ()
