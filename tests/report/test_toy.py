"""The toy's picture for few maps and awkward values."""

import numpy as np
import pytest
from PIL import Image

from ldm.report.plots import Curve
from ldm.report.toy import Growth, PlaneMap, Scatter, toy_figure

RAMP = np.linspace(0.01, 1, 30).reshape(5, 6)
MAP = PlaneMap("none", RAMP, 0 * RAMP, (0, 1, 0, 1), np.zeros((0, 2)), (0.5, 0.5), 0.4)
CURVES = {"truth": Curve([0, 1, 2], [1, 0.5, 0.2]), "plain": Curve([0, 1, 2], [np.nan, 0, 0.3])}
GROWTHS = {"0": Growth([2, 5], [0.4, 0.8], 1.0)}
SCATTER = Scatter([0.1, 0.2, 1], [0, 0.3, 1], [10, 1, 0], "Spearman 1")


def test_draws_zeros_gaps_and_a_map_without_points(tmp_path):
    for name in ("a.png", "b.png"):
        toy_figure([MAP], CURVES, GROWTHS, SCATTER, tmp_path / name, 5, "PaiDE\nbootstrap")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).std() > 10
    with pytest.raises(FileExistsError):
        toy_figure([MAP], CURVES, GROWTHS, SCATTER, tmp_path / "a.png", 5, "PaiDE")


@pytest.mark.parametrize(
    ("maps", "message"), [([], "got 0, 2, 1"), ([MAP._replace(truth=0 * RAMP)], "nowhere above 0")]
)
def test_errors_say_what_was_expected(tmp_path, maps, message):
    with pytest.raises(ValueError, match=message):
        toy_figure(maps, CURVES, GROWTHS, SCATTER, tmp_path / "out.png", 5, "PaiDE")
