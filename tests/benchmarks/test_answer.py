"""What an answer costs: counts by hand, draws of values whose order is known."""

import numpy as np
import pytest

from benchmarks import answer
from benchmarks.answer import AnswerStudy
from ldm.commands.shared import Placement
from ldm.experiments.ranking_draws import compare_draws, count_noises_of_interval, draw_adaptive, draw_equal
from ldm.util import generator
from tests.ensembles import write_ensemble


def make_values(classes: int, noises: int, spread: float) -> np.ndarray:
    source = np.random.default_rng(3)
    return np.arange(classes)[:, None] + spread * source.standard_normal((classes, noises))


@pytest.mark.slow
def test_a_study_counts_what_it_asks(tmp_path, monkeypatch):
    monkeypatch.setattr(answer, "REFERENCE", ("DDIM", 8))
    path = str(write_ensemble(tmp_path))
    place = Placement("cpu")
    study = AnswerStudy(path, samplers=("Heun",), step_counts=(4,), n=3, counts=(1, 3), resamples=5, place=place)
    published, *rest = study.run()
    of = {(one["way"]["sampler"], one["how"]): one for one in rest}
    assert published["evaluations"] == 10 * 10 * (4 + 3), "half of the eight steps, and one pass of each member"
    heun = of["Heun", "equal"]
    assert heun["evaluations"] == heun["noises"] * 10 * (2 * 2 + 2 * 3), "Heun evaluates twice a step"
    for counts in ((4,), (1, 2)):
        with pytest.raises(ValueError, match="from --n 3 noises, and one of them is 3 or more"):
            AnswerStudy(path, n=3, counts=counts, place=place).run()


@pytest.mark.parametrize("draw", [draw_equal, draw_adaptive])
def test_values_without_noise_keep_their_means(draw):
    values = make_values(5, 8, 0.0)
    assert draw(values, 4, generator("draws", 0)) == pytest.approx(np.arange(5.0))


def test_close_classes_get_the_noises():
    """Two of the six classes are close: their means must be nearer to the truth than by equal shares."""
    values = make_values(6, 400, 1.0) * 10
    values[1] = values[0] + np.random.default_rng(5).standard_normal(400)
    truth = values.mean(1)
    source = generator("draws", 1)
    errors = {
        draw: np.mean([(draw(values, 8, source)[:2] - truth[:2]) ** 2 for _ in range(300)])
        for draw in (draw_equal, draw_adaptive)
    }
    assert errors[draw_adaptive] < 0.8 * errors[draw_equal]


def test_far_classes_are_ranked_by_one_noise_and_equal_ones_are_not():
    far, alike = make_values(6, 20, 0.01), make_values(6, 20, 50.0)
    reference = make_values(6, 20, 0.0)
    assert compare_draws(far, reference, 1, "equal", 50, 0) == (1, 1, 1)
    assert compare_draws(alike, reference, 1, "equal", 200, 0)[1] < 0.5


def test_noises_of_an_interval_are_those_of_its_width():
    """Student's interval shrinks with the root of the noises: four times as many halve it."""
    found = 10 + make_values(1, 400, 1.0)
    assert count_noises_of_interval(found, 0.05) == pytest.approx(4 * count_noises_of_interval(found, 0.1), rel=1e-6)
