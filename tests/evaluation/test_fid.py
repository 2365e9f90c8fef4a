"""Moments and Frechet distances against closed forms, NumPy, SciPy and torchmetrics."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import t
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.evaluation.fid import extrapolated, fid, frechet_distance, square_root
from ldm.evaluation.resampling import draw_halves
from ldm.evaluation.statistics import (
    FeatureMoments,
    FeatureStatistics,
    blocks,
    load_statistics,
    moments,
    save_statistics,
)
from ldm.util import generator


def draw(*shape, key=0):
    return torch.randn(shape, generator=generator("fid", key), dtype=torch.float64)


def gaussian(mean, covariance):
    return FeatureStatistics(
        torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(covariance, dtype=torch.float64)
    )


def random_covariance(size, key, rank=None):
    factor = draw(size, rank or size, key=key)
    return factor @ factor.T


def test_commuting_gaussians_have_the_textbook_distance():
    """|mu|^2 + sum (s_a - s_b)^2 = (9 + 16) + (1 - 2)^2 + (3 - 1)^2 = 30."""
    a, b = gaussian([0, 0], np.diag([1.0, 9.0])), gaussian([3, 4], np.diag([4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(30, abs=1e-12)
    assert frechet_distance(b, a) == pytest.approx(30, abs=1e-12)


def test_distance_equals_the_matrix_square_root_of_scipy():
    a, b = (gaussian(draw(12, key=key), random_covariance(12, key)) for key in (1, 2))
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("rank", [3, 40])
def test_distance_to_itself_is_zero_within_rounding_also_where_the_covariance_is_singular(rank):
    covariance = random_covariance(40, 3, rank)
    same = gaussian(draw(40), covariance)
    assert abs(frechet_distance(same, same)) < 1e-11 * float(covariance.trace())


def test_orthogonal_subspaces_share_nothing():
    """Singular covariances on different axes: the traces add up."""
    a, b = gaussian([0, 0, 0], np.diag([2.0, 0, 0])), gaussian([0, 0, 0], np.diag([0, 3.0, 0]))
    assert frechet_distance(a, b) == pytest.approx(5, abs=1e-12)


def test_square_root_gives_the_covariance_and_refuses_others():
    covariance = random_covariance(6, 4)
    root = square_root(covariance)
    torch.testing.assert_close(root.T @ root, covariance)
    with pytest.raises(ValueError, match="symmetric"):
        square_root(draw(6, 6))
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        frechet_distance(gaussian([0, 0], np.eye(2)), gaussian([0, 0, 0], np.eye(3)))


def test_moments_are_numpys_whatever_the_blocks_and_the_order_of_merging():
    features = draw(2500, 7) * 3 + 100  # three blocks, a mean far from 0
    found = moments(features.float().numpy()).statistics()
    exact = features.float().double().numpy()
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(exact.T), rtol=1e-9, atol=1e-9)
    assert found.count == 2500
    parts = [FeatureMoments.of(features[start : start + 700].float()) for start in range(0, 2500, 700)]
    merged = parts[2].merge(parts[0]).merge(parts[3].merge(parts[1])).statistics()
    torch.testing.assert_close(merged.covariance, found.covariance, rtol=1e-9, atol=1e-9)


def test_weights_repeat_rows():
    rows, weights = draw(5, 3), torch.tensor([2, 0, 1, 3, 1.0])
    repeated = rows.repeat_interleave(weights.long(), dim=0)
    torch.testing.assert_close(moments(rows, weights).statistics().covariance, torch.cov(repeated.T))


def test_broken_features_are_named():
    features = draw(1500, 2)
    features[1234, 1] = torch.inf
    with pytest.raises(ValueError, match="row 1234"):
        list(blocks(features))
    with pytest.raises(ValueError, match="at least 2"):
        moments(draw(1, 3)).statistics()


def test_fid_of_samples_is_torchmetrics(two_sets):
    reference, samples = two_sets
    metric = FrechetInceptionDistance(feature=Identity())
    metric.update(reference, real=True)
    metric.update(samples, real=False)
    found = fid(moments(reference).statistics(), samples).estimate
    assert found == pytest.approx(float(metric.compute()), rel=1e-4)


class Identity(torch.nn.Module):
    num_features = 16

    def forward(self, x):
        return x


@pytest.fixture
def two_sets():
    return draw(400, 16, key=5), draw(300, 16, key=6) * 1.2 + 0.3


@pytest.mark.parametrize("count", [300, 10])  # 10: fewer rows than dimensions, singular covariances
def test_interval_is_that_of_distances_of_halves_of_the_rows(two_sets, count):
    reference, samples = moments(two_sets[0]).statistics(), two_sets[1][:count]
    found = fid(reference, samples, resamples=12, seed=3)
    masks = draw_halves(count, 12, "fid", 3).bool()
    assert torch.equal(masks[::2], ~masks[1::2]) and (masks[::2].sum(1) == count // 2).all()
    values = [frechet_distance(reference, moments(samples[mask]).statistics()) for mask in masks]
    first, second = torch.tensor(values, dtype=torch.float64).view(-1, 2).T
    quadratic = ((first + second) / 2).var()
    variance = max(((first - second) / 2).square().mean() - quadratic, quadratic)
    reach = t.ppf(0.975, 6) * float(variance) ** 0.5
    assert (found.estimate - found.low, found.high - found.estimate) == pytest.approx((reach, reach), rel=1e-6)


def test_interval_covers_the_spread_of_new_samples():
    """Its width against the spread over 40 fresh sets; the standard deviation of a s.d. from 40 draws is 11 %."""
    reference = gaussian(np.zeros(4), np.eye(4))
    found = fid(reference, draw(200, 4, key=10) + 0.5, resamples=40, seed=1)
    fresh = torch.tensor([fid(reference, draw(200, 4, key=100 + key) + 0.5).estimate for key in range(40)])
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(float(fresh.std()), rel=0.5)
    assert found.low < found.estimate < found.high
    assert found == fid(reference, draw(200, 4, key=10) + 0.5, resamples=40, seed=1)
    assert found != fid(reference, draw(200, 4, key=10) + 0.5, resamples=40, seed=2)


def test_bias_falls_as_one_over_n_and_is_extrapolated_away():
    """Samples of the reference's own law: the exact distance is 0, and every value above it is bias."""
    reference = gaussian(np.zeros(4), np.eye(4))
    counts = torch.tensor([50, 100, 400] * 20)
    values = torch.tensor(
        [fid(reference, draw(int(n), 4, key=1000 + i)).estimate for i, n in enumerate(counts)], dtype=torch.float64
    )
    means = [float(values[counts == n].mean()) for n in (50, 100, 400)]
    assert means[0] / means[1] == pytest.approx(2, rel=0.3) and means[1] / means[2] == pytest.approx(4, rel=0.3)
    assert extrapolated(counts, values)[0] == pytest.approx(0, abs=0.15 * means[1])
    assert extrapolated(torch.tensor([10, 20]), torch.tensor([3.0, 2.5])) == pytest.approx((2, 10))
    with pytest.raises(ValueError, match="two sample sizes"):
        extrapolated(torch.tensor([10, 10]), torch.tensor([3.0, 2.5]))


def test_published_statistics_are_read_and_written(tmp_path):
    a = gaussian(draw(3), random_covariance(3, 1))
    np.savez(tmp_path / "other.npz", mu=a.mean.numpy(), sigma=a.covariance.numpy().astype(np.float32))
    assert set(load_statistics(tmp_path / "other.npz")) == {"pooled"}
    save_statistics({"pooled": a, "spatial": a}, tmp_path / "own.npz")
    found = load_statistics(tmp_path / "own.npz")
    assert set(found) == {"pooled", "spatial"} and torch.equal(found["spatial"].covariance, a.covariance)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8))
    assert load_statistics(tmp_path / "images.npz") == {}
    np.savez(tmp_path / "broken.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match="mu"):
        load_statistics(tmp_path / "broken.npz")
    with pytest.raises(FileNotFoundError):
        load_statistics(tmp_path / "none.npz")
