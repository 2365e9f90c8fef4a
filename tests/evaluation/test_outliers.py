"""Classes that stand out: each held against a line through the others, fitted again; and the rate of false ones."""

import numpy as np
import pytest
from scipy.stats import t

from ldm.evaluation.outliers import find_outstanding


def refitted_p(scores, images, place):
    """Student's one-sided p of a class against the line that numpy fits to the others."""
    x, y = np.log(images), np.log(scores)
    rest = np.arange(len(x)) != place
    (slope, start), _ = np.polyfit(x[rest], y[rest], 1, cov=True)
    free = rest.sum() - 2
    sigma2 = np.sum((y[rest] - start - slope * x[rest]) ** 2) / free
    spread = 1 + 1 / rest.sum() + (x[place] - x[rest].mean()) ** 2 / np.sum((x[rest] - x[rest].mean()) ** 2)
    return t.sf((y[place] - start - slope * x[place]) / np.sqrt(sigma2 * spread), free)


def test_each_class_is_held_against_the_line_through_the_others():
    source = np.random.default_rng(3)
    images = source.integers(1, 90, 9)
    scores = images**-0.5 * np.exp(0.3 * source.normal(size=9))
    found = find_outstanding(scores, images)
    expected = [refitted_p(scores, images, place) for place in range(9)]
    np.testing.assert_allclose(found.p, expected, rtol=1e-9)
    slope, start = np.polyfit(np.log(images), np.log(scores), 1)
    np.testing.assert_allclose(found.expected, np.exp(start) * images**slope, rtol=1e-9)


def test_a_class_four_times_above_the_line_is_found_and_few_others_are():
    false, true = 0, 0
    for seed in range(200):
        source = np.random.default_rng(seed)
        images = source.integers(5, 80, 12)
        scores = images**-0.6 * np.exp(0.2 * source.normal(size=12))
        false += bool(find_outstanding(scores, images).chosen)
        scores[4] *= 4
        true += 4 in find_outstanding(scores, images).chosen
    # With nothing to find, any find is false: 10 % of data sets, 20 of 200, within three deviations of 4.2.
    assert 8 <= false <= 33 and true >= 190


@pytest.mark.parametrize(
    ("scores", "images"),
    [([1.0] * 5, [1, 2, 3, 4, 5]), ([1.0, 2.0] * 4, [7] * 8), ([0.0] + [1.0] * 7, list(range(1, 9)))],
)
def test_too_few_classes_one_number_of_images_or_no_information_say_nothing(scores, images):
    assert find_outstanding(scores, images) is None
