"""MMD against explicit sums over pairs, an expectation in closed form, and torchmetrics."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from ldm.evaluation import cmmd as module
from ldm.evaluation.cmmd import (
    cmmd,
    cubic_kernel,
    gaussian_kernel,
    gram_between,
    gram_within,
    kid_subsets,
    mmd2,
    squared_distances,
)
from ldm.util import generator


def draw(*shape, key=0):
    return torch.randn(shape, generator=generator("cmmd", key), dtype=torch.float64)


def explicit(kernel, x, y, biased=False):
    """MMD^2 as three loops over pairs."""
    n, m = len(x), len(y)
    within = [
        sum(kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if biased or i != j)
        / (len(z) ** 2 if biased else len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    return sum(within) - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def gaussian_of_pair(a, b, sigma=2.0):
    return math.exp(-float((a - b) @ (a - b)) / (2 * sigma**2))


def cubic_of_pair(a, b):
    return float(a @ b / len(a) + 1) ** 3


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("kernel", "of_pair"), [(partial(gaussian_kernel, sigma=2.0), gaussian_of_pair), (cubic_kernel, cubic_of_pair)]
)
def test_mmd_equals_explicit_sums_over_pairs(monkeypatch, kernel, of_pair, biased):
    monkeypatch.setattr(module, "TILE", 5)  # several tiles, the last one smaller
    x, y = draw(13, 3, key=1), draw(11, 3, key=2) + 0.4
    expected = explicit(of_pair, x, y, biased)
    assert mmd2(kernel, y, x, biased).estimate == pytest.approx(expected, rel=1e-9)
    assert mmd2(kernel, y.numpy(), x.numpy(), biased).estimate == pytest.approx(expected, rel=1e-9)


def test_cmmd_is_its_published_scaling_of_the_mmd():
    x, y = draw(20, 4, key=1), draw(15, 4, key=2)
    assert cmmd(y, x).estimate == pytest.approx(1000 * explicit(partial(gaussian_of_pair, sigma=10.0), x, y), rel=1e-6)
    assert cmmd(y, x, biased=True).estimate > cmmd(y, x).estimate


def test_biased_estimate_of_a_set_with_itself_is_zero_and_the_unbiased_one_is_negative():
    x = draw(30, 4)
    assert cmmd(x, x, biased=True).estimate == pytest.approx(0, abs=1e-9)
    assert cmmd(x, x).estimate < 0


def test_expectation_of_gaussians_in_closed_form():
    """MMD^2 of N(0, 1) and N(d, 1) is 2 s (1 - exp(-d^2 / (2 (k^2 + 2)))) with s = k / sqrt(k^2 + 2), kernel width k.

    The biased estimate lies higher by (1/n + 1/m)(k(x, x) - E k) = (1/n + 1/m)(1 - s).
    """
    sigma, shift = 1.0, 1.0
    scale = sigma / math.sqrt(sigma**2 + 2)
    exact = 2 * scale * (1 - math.exp(-(shift**2) / (2 * (sigma**2 + 2))))
    kernel = partial(gaussian_kernel, sigma=sigma)
    sets = [(draw(100, 1, key=key), draw(50, 1, key=key + 500) + shift) for key in range(40)]
    values = np.array([mmd2(kernel, y, x).estimate for x, y in sets])
    assert values.mean() == pytest.approx(exact, abs=4 * values.std() / math.sqrt(40))
    above = np.mean([mmd2(kernel, y, x, biased=True).estimate for x, y in sets]) - values.mean()
    assert above == pytest.approx((1 / 100 + 1 / 50) * (1 - scale), rel=0.05)


def test_shares_of_the_tiles_add_up(monkeypatch):
    monkeypatch.setattr(module, "TILE", 4)
    x, y = draw(18, 3, key=3), draw(9, 3, key=4)
    shares = [gram_within(cubic_kernel, x, shard=(rank, 3)) for rank in range(3)]
    total, whole = shares[0] + shares[1] + shares[2], gram_within(cubic_kernel, x)
    torch.testing.assert_close(total.pairs, whole.pairs)
    torch.testing.assert_close(total.diagonal, whole.diagonal)
    between = sum(gram_between(cubic_kernel, x, y, shard=(rank, 2)) for rank in range(2))
    torch.testing.assert_close(between, gram_between(cubic_kernel, x, y))


def test_bootstrap_is_the_mmd_of_the_resampled_rows_without_pairs_of_one_image():
    x, y = draw(8, 2, key=5), draw(7, 2, key=6)
    weights = torch.tensor([[2, 0, 1, 1, 0, 3, 1, 0.0]])
    within = gram_within(cubic_kernel, x, weights)
    repeated = x.repeat_interleave(weights[0].long(), dim=0)
    owners = torch.arange(8).repeat_interleave(weights[0].long())
    pairs = [(i, j) for i in range(8) for j in range(8) if owners[i] != owners[j]]
    expected = sum(cubic_of_pair(repeated[i], repeated[j]) for i, j in pairs) / len(pairs)
    theirs = gram_within(cubic_kernel, y)
    between = gram_between(cubic_kernel, x, y, weights)
    found = module.combine_sums(within, theirs, between, weights, 7, False)
    rest = explicit(cubic_of_pair, y, y) + 2 * sum(cubic_of_pair(a, b) for a in y for b in y) / 49
    rest -= sum(cubic_of_pair(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
    cross = sum(cubic_of_pair(a, b) for a in repeated for b in y) / 56
    assert found.item() == pytest.approx(expected + rest - 2 * cross, rel=1e-9)


def test_interval_covers_the_value_and_follows_the_seed():
    x, y = draw(80, 3, key=7) + 0.5, draw(90, 3, key=8)
    found = mmd2(cubic_kernel, y, x, resamples=100, seed=1)
    assert found.low < found.estimate < found.high
    assert found.estimate == pytest.approx(mmd2(cubic_kernel, y, x).estimate, rel=1e-12)
    assert found == mmd2(cubic_kernel, y, x, resamples=100, seed=1)
    assert found != mmd2(cubic_kernel, y, x, resamples=100, seed=2)
    biased = mmd2(cubic_kernel, y, x, True, resamples=100, seed=1)
    assert biased.low < biased.estimate < biased.high


def test_kid_is_torchmetrics():
    """One subset of all images: its order does not matter."""
    reference, samples = draw(60, 16, key=9), draw(60, 16, key=10) * 1.1 + 0.2
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=60)
    metric.update(reference, real=True)
    metric.update(samples, real=False)
    expected = float(metric.compute()[0])
    assert kid_subsets(reference, samples, subsets=1, subset_size=60).item() == pytest.approx(expected, rel=1e-4)
    assert mmd2(cubic_kernel, reference, samples).estimate == pytest.approx(expected, rel=1e-4)


def test_kid_of_subsets_scatters_around_that_of_all_pairs():
    reference, samples = draw(200, 4, key=11), draw(200, 4, key=12) + 0.5
    values = kid_subsets(reference.numpy(), samples.numpy(), subsets=60, subset_size=50, seed=3)
    error = float(values.std()) / math.sqrt(60)
    assert float(values.mean()) == pytest.approx(mmd2(cubic_kernel, reference, samples).estimate, abs=4 * error)
    assert torch.equal(values, kid_subsets(reference, samples, subsets=60, subset_size=50, seed=3))
    with pytest.raises(ValueError, match=r"2\.\.200"):
        kid_subsets(reference, samples)


def test_distances_and_what_does_not_fit():
    a, b = draw(5, 3, key=1), draw(4, 3, key=2)
    torch.testing.assert_close(squared_distances(a, b), torch.cdist(a, b).square())
    with pytest.raises(ValueError, match="3 and 2 dimensions"):
        mmd2(cubic_kernel, a, b[:, :2])
    with pytest.raises(ValueError, match="at least 2 rows"):
        mmd2(cubic_kernel, a, b[:1])
