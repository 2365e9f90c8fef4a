"""Bands over trainings, against SciPy and against a law of trainings that is known."""

import math

import pytest
import torch
from scipy.stats import binomtest, t

from ldm.evaluation.extraction import FeatureSet
from ldm.evaluation.metrics import MetricRow, Options, Reference, measure
from ldm.evaluation.trainings import band_over_trainings, bands_over_trainings
from ldm.util import generator


def row(value, half=0.0, metric="fid", n=100):
    return MetricRow(metric, value, value - half, value + half, "", n, 50)


def test_intervals_are_students():
    values = [1.0, 2.0, 4.0, 5.0]
    band = band_over_trainings([row(value, 1.96) for value in values])
    mean = torch.tensor(values, dtype=torch.float64)
    low, high = t.interval(0.95, 3, loc=3.0, scale=float(mean.std()) / 2)
    assert (band.mean.low, band.mean.high) == pytest.approx((low, high))
    assert band.sample_sd == pytest.approx(1.0, rel=1e-4)
    assert band.ratio == pytest.approx(float(mean.std()), rel=1e-4)
    assert band.trained_sd == pytest.approx(math.sqrt(float(mean.var()) - 1), rel=1e-3)


def test_one_more_training_falls_into_its_band_as_often_as_said():
    """Trainings of sd 2 around 10: the band of one more holds 95 % of further ones, that of the mean far fewer."""
    drawn = 10 + 2 * torch.randn(400, 6, generator=generator("trainings"), dtype=torch.float64)
    inside = {"another": 0, "mean": 0}
    for *values, last in drawn.tolist():
        band = band_over_trainings([row(value) for value in values])
        for name in inside:
            inside[name] += getattr(band, name).low <= last <= getattr(band, name).high
    assert binomtest(inside["another"], 400, 0.95).pvalue > 0.01
    assert binomtest(inside["mean"], 400, 0.95).pvalue < 1e-6  # it answers another question


def test_what_does_not_compare_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        band_over_trainings([row(1.0)])
    with pytest.raises(ValueError, match="the same n, got 100, 200"):
        band_over_trainings([row(1.0), row(2.0, n=200)])


def test_metrics_that_one_training_lacks_are_left_out():
    found = bands_over_trainings([[row(1.0), row(3.0, metric="kid")], [row(2.0)]])
    assert [band.metric for band in found] == ["fid"] and found[0].values == (1.0, 2.0)
    assert math.isnan(band_over_trainings([row(1.0, math.nan), row(2.0, math.nan)]).sample_sd)


def test_the_spread_of_draws_is_no_deviation_over_samples():
    """The published KID of 100 draws of all samples is +- the deviation over draws, which shrinks with their size."""
    drawn = torch.randn(3, 60, 4, generator=generator("features"), dtype=torch.float64).numpy()
    reference, *samples = (FeatureSet(pooled=each) for each in drawn)
    rows = [measure(["kid"], Reference(reference), each, Options(kid_subset_size=30)) for each in samples]
    kid, subsets = bands_over_trainings(rows)
    assert (kid.metric, subsets.metric) == ("kid", "kid_subsets")
    assert kid.sample_sd > 0 and math.isnan(subsets.sample_sd) and math.isnan(subsets.ratio)
