"""Detection of what was left out and of other data, on scores whose answers are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.benchmark.cells import ScoreCell
from ldm.benchmark.detections import make_detections
from ldm.benchmark.images import KNOWN_CLASSES, LEFT_OUT_CLASS
from tests.benchmark.test_measures import EVERY, make_seed

SETS = np.repeat([KNOWN_CLASSES, LEFT_OUT_CLASS, "turned"], 10)


def make_real_seed(without, control):
    """Scores of real images where a class was left out, and where none was."""
    seed = make_seed()
    cells = dict(seed.cells)
    for data, reals in (("out", without), ("all", control)):
        values = torch.arange(40.0)
        own = ScoreCell("asked", "epistemic", "", values, None, {}, {}, torch.as_tensor(reals, dtype=torch.float64))
        cells[data] = {**cells.get(data, {}), "asked": own}
    is_out = np.arange(40) >= 36
    return replace(seed, cells=cells, is_out=is_out, real_sets=SETS)


def measure(seed, name):
    own = next(one for one in make_detections(["turned"]) if one.name == name)
    return own.measure(seed, "asked", EVERY)


def test_a_score_that_rises_with_the_class_left_out_alone_finds_it_over_its_control():
    flat = np.tile(np.arange(10.0), 3)
    seed = make_real_seed(flat + 100 * (SETS == LEFT_OUT_CLASS), flat + 100 * (SETS == "turned"))
    assert measure(seed, "left-out class, real images: AUROC") == 1
    assert measure(seed, "left-out class, real images: AUROC minus control") == pytest.approx(0.5)
    assert measure(seed, "left-out class, real images: FPR95") == 0
    assert measure(seed, "other data, turned: AUROC") == 1
    assert measure(seed, "other data, mean: FPR95") == 0


def test_looks_of_the_class_are_taken_away_by_the_control():
    looks = np.tile(np.arange(10.0), 3) + 100 * (SETS == LEFT_OUT_CLASS)
    seed = make_real_seed(looks, looks)
    assert measure(seed, "left-out class, real images: AUROC minus control") == 0
    assert measure(seed, "left-out class, pictures: AUROC minus control") == 0


def test_methods_without_such_scores_have_no_number():
    seed = make_seed()
    for one in make_detections(["turned"]):
        assert one.measure(seed, "knows", EVERY) is None
