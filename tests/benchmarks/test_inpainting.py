"""The study of inpainted digits: its figures on maps and fillings that are known."""

import pytest
import torch

from benchmarks.inpainting import Filled, cut_digits


def test_figures_of_known_maps_and_fillings(tmp_path):
    given = cut_digits(4, 0.5)
    hole = given.masks[:, 0] > 0
    assert hole.sum((1, 2)).tolist() == [16] * 4, "4x4 of 8x8"
    rank = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = torch.where(hole, 2 + rank, 1.0)
    error = torch.where(hole, 0.1 * rank, 0.0)
    images = torch.stack([given.pictures + error[:, None], given.pictures + error[:, None]], 1)
    filled = Filled(given, maps, images)
    found = filled.describe()
    assert found["ratio"] == pytest.approx(float(2 + rank[hole].mean()), rel=1e-5)
    assert found["error outside"] == 0
    assert found["rank correlation of MI with the error, pixels of holes"] == pytest.approx(1)
    filled.draw(tmp_path / "picture.png", 3, overwrite=False)
    assert (tmp_path / "picture.png").stat().st_size > 1000
