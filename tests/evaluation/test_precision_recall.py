"""Precision, recall, density and coverage on sets built by hand, and against their definitions as loops."""

import pytest
import torch

from ldm.evaluation import precision_recall as module
from ldm.evaluation.precision_recall import ball_counts, density_coverage, precision_recall, squared_radii
from ldm.util import generator


def draw(*shape, key=0):
    return torch.randn(shape, generator=generator("precision", key), dtype=torch.float64)


def line(*places):
    return torch.tensor(places, dtype=torch.float64)[:, None]


def values(found):
    return found[0].estimate, found[1].estimate


def test_sets_on_a_line_can_be_counted():
    """Balls with k = 1 on 0, 1, 2, 10 have radii 1, 1, 1, 8. Of the samples 3, 30, 40: 3 lies in the balls of 2 and 10.

    Balls of the samples: 3 reaches to 30 (27), 30 and 40 to each other (10): the reference lies in that of 3.
    """
    reference, samples = line(0, 1, 2, 10), line(3, 30, 40)
    assert squared_radii(reference, 1).tolist() == [1, 1, 1, 64]
    assert values(precision_recall(reference, samples, k=1)) == pytest.approx((1 / 3, 1))
    assert values(density_coverage(reference, samples, k=1)) == pytest.approx((2 / 3, 2 / 4))
    assert squared_radii(reference, 2).tolist() == [4, 1, 4, 81]


def test_identical_disjoint_and_collapsed_sets():
    x = draw(50, 3)
    assert values(precision_recall(x, x)) == (1, 1)
    assert density_coverage(x, x).coverage.estimate == 1
    assert values(precision_recall(x, x + 100)) == (0, 0)
    assert values(density_coverage(x, x + 100)) == (0, 0)
    collapsed = x[:1].repeat(20, 1)  # one real image again and again: precise, without recall
    precision, recall = values(precision_recall(x, collapsed))
    assert precision == 1 and recall == pytest.approx(1 / 50)


def definition(reference, samples, k):
    """All four by loops over all pairs; radii leave the point itself out."""

    def radii(points):
        return [
            sorted(float((a - b).norm()) for j, b in enumerate(points) if j != i)[k - 1] for i, a in enumerate(points)
        ]

    def inside(points, centres):
        return torch.tensor(
            [[float((p - c).norm()) <= r for c, r in zip(centres, radii(centres), strict=True)] for p in points]
        )

    real, fake = inside(samples, reference), inside(reference, samples)
    return (
        float(real.any(1).double().mean()),
        float(fake.any(1).double().mean()),
        float(real.sum(1).double().mean() / k),
        float(real.any(0).double().mean()),
    )


def test_tiles_equal_the_definition(monkeypatch):
    monkeypatch.setattr(module, "TILE", 7)
    reference, samples = draw(23, 3, key=1), draw(17, 3, key=2) * 0.8 + 0.5
    found = (*values(precision_recall(reference, samples, k=3)), *values(density_coverage(reference, samples, k=3)))
    assert found == pytest.approx(definition(reference, samples, 3))


def test_density_of_equal_laws_is_one_in_expectation():
    """E density = M N / (k M) P(in ball) = 1 for k-NN balls up to 1/N; 40 draws of 60 images."""
    found = [
        density_coverage(draw(60, 2, key=10 + key), draw(60, 2, key=100 + key)).density.estimate for key in range(40)
    ]
    tensor = torch.tensor(found)
    assert float(tensor.mean()) == pytest.approx(1, abs=4 * float(tensor.std()) / 40**0.5 + 1 / 60)


def test_intervals_are_those_of_means():
    """Binomial: s.d. sqrt(p (1 - p) / n)."""
    reference, samples = draw(200, 2, key=3), draw(200, 2, key=4) * 1.5
    found = precision_recall(reference, samples, resamples=400, seed=2)
    spread = (found.precision.estimate * (1 - found.precision.estimate) / 200) ** 0.5
    assert found.precision.high - found.precision.low == pytest.approx(2 * 1.96 * spread, rel=0.2)
    assert found == precision_recall(reference, samples, resamples=400, seed=2)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        precision_recall(draw(3, 2), draw(9, 2))


def test_counts_of_balls_and_points_agree():
    points, centres = draw(9, 2, key=5), draw(6, 2, key=6)
    radii = squared_radii(centres, 2)
    balls, held = ball_counts(points, centres, radii)
    assert balls.sum() == held.sum() and balls.shape == (9,) and held.shape == (1, 6)
    masks = torch.arange(9) % 2 == torch.arange(2)[:, None]
    _, halves = ball_counts(points, centres, radii, masks=masks.double())
    alone = [ball_counts(points[mask], centres, radii)[1][0] for mask in masks]
    assert torch.equal(halves, torch.stack(alone)) and torch.equal(halves.sum(0), held[0])
