"""Figures of metrics: every value is drawn, files are stable, empty input is refused."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from ldm.evaluation.sample_sizes import SizedRow, summarise_sizes
from ldm.report import evaluation
from ldm.report.evaluation import distortion_plot, sample_size_plot

ROWS = [SizedRow("fid", size, repeat, 100 / size + repeat) for size in (10, 20, 50) for repeat in (0, 1)]
ROWS += [SizedRow("kid", size, repeat, repeat - 0.5) for size in (10, 20, 50) for repeat in (0, 1)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, on top of saving them."""
    figures: list[Figure] = []
    save = evaluation.save_figure
    monkeypatch.setattr(evaluation, "save_figure", lambda figure, *rest: (figures.append(figure), save(figure, *rest)))
    return figures


def test_sizes_are_drawn_absolute_and_relative(tmp_path, drawn):
    sample_size_plot(summarise_sizes(ROWS), tmp_path / "a.png", unbiased_fid=0.4)
    fid, kid, relative = drawn[0].axes
    np.testing.assert_allclose(fid.lines[0].get_ydata(orig=False), [10.5, 5.5, 2.5])
    np.testing.assert_allclose(kid.lines[0].get_ydata(orig=False), [0, 0, 0])
    np.testing.assert_allclose(relative.lines[0].get_ydata(orig=False), [420, 220, 100])
    assert np.isnan(relative.lines[1].get_ydata(orig=False)).all(), "no percentage of zero"
    assert [0.4, 0.4] in [list(line.get_ydata()) for line in fid.lines]
    sample_size_plot(summarise_sizes(ROWS), tmp_path / "b.png", unbiased_fid=0.4)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(FileExistsError):
        sample_size_plot(summarise_sizes(ROWS), tmp_path / "a.png")


def test_distortions_are_drawn_in_the_order_of_their_strength(tmp_path, drawn):
    points = [(1.0, 9.0, 8.0, 10.0), (0.0, 1.0, 0.5, 1.5), (0.5, 4.0, 3.0, 5.0)]
    distortion_plot({"fid": {"blur": points}, "cmmd": {"blur": points, "noise": points[:2]}}, tmp_path / "a.png")
    first, second = drawn[0].axes
    np.testing.assert_allclose(first.lines[0].get_data(orig=False), [[0, 0.5, 1], [1, 4, 9]])
    assert len(second.lines) == 2 and (first.get_ylabel(), second.get_ylabel()) == ("FID", "CMMD")


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no values"):
        sample_size_plot([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="no values"):
        distortion_plot({}, tmp_path / "a.png")
