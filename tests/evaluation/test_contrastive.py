"""Alignment and uniformity against pair sums, closed forms, and the published value of random directions."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.evaluation.contrastive import alignment, class_pairs, uniformity
from ldm.util import generator


def directions(count, width, seed=0):
    return torch.randn(count, width, generator=generator("directions", seed))


def test_uniformity_is_the_sum_over_pairs_whatever_the_tiles():
    features = directions(37, 5).double()
    unit = features / features.norm(dim=1, keepdim=True)
    pairs = [(i, j) for i in range(37) for j in range(i)]
    potentials = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i, j in pairs]
    expected = math.log(sum(potentials) / len(pairs))
    for tile in (4, 10, 37, 2048):
        assert uniformity(features, tile=tile) == pytest.approx(expected, abs=1e-12)


def test_random_directions_in_256_dimensions():
    # E exp(-2 (2 - 2 c)) over the cosine c of independent directions: the series of exp(4 c) with
    # E c^2 = 1/d, E c^4 = 3/(d (d + 2)).
    d = 256
    expected = -4 + math.log(1 + 16 / 2 / d + 256 / 24 * 3 / (d * (d + 2)))
    assert expected == pytest.approx(-3.97, abs=0.005)
    assert uniformity(directions(3000, d)) == pytest.approx(expected, abs=0.003)


def test_limits():
    one = directions(1, 8)
    assert uniformity(one.expand(5, -1)) == pytest.approx(0.0, abs=1e-5)
    assert uniformity(torch.cat([one, -one])) == pytest.approx(-8.0, abs=1e-5)
    assert alignment(one, 3 * one) == pytest.approx(0.0, abs=1e-6)
    assert alignment(one, -one) == pytest.approx(4.0, abs=1e-5)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_simplex_has_the_least_uniformity(count, temperature):
    """Its corners, centred unit vectors, reach the bound, and nothing that a search finds lies below it."""
    bound = -2 * temperature * count / (count - 1)
    corners = torch.eye(count, dtype=torch.float64) - 1 / count
    assert uniformity(corners, temperature) == pytest.approx(bound, abs=1e-9)
    points = directions(count, count).double().requires_grad_()
    for _ in range(60):
        unit = torch.nn.functional.normalize(points, dim=1)
        loss = (-temperature * torch.pdist(unit).square()).exp().mean().log()
        (slope,) = torch.autograd.grad(loss, points)
        points = (points - 0.3 * slope).detach().requires_grad_()
    assert bound - 1e-9 <= uniformity(points.detach(), temperature) < 0


def test_alignment_is_two_minus_two_cosines():
    x, y = directions(50, 6).double(), directions(50, 6, 1).double()
    expected = (2 - 2 * torch.nn.functional.cosine_similarity(x, y)).mean()
    assert alignment(x, y) == pytest.approx(float(expected), abs=1e-12)


def test_class_pairs_join_different_images_of_one_class():
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3, 1])
    first, second = class_pairs(labels, generator("pairs"))
    assert torch.equal(labels[first], labels[second])
    assert bool((first != second).all())
    assert sorted(first.tolist()) == [0, 1, 2, 4, 5, 7]


def test_errors():
    with pytest.raises(ValueError, match="two images"):
        class_pairs(torch.tensor([0, 1, 2]), generator("pairs"))
    with pytest.raises(ValueError, match="pairs"):
        uniformity(torch.ones(1, 3))
    with pytest.raises(ValueError, match="zero length"):
        alignment(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="one shape"):
        alignment(torch.ones(2, 3), torch.ones(3, 3))
