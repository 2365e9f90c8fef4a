"""Intervals for the draw of samples: against closed forms, and against the spread of new draws."""

import math

import pytest
import torch
from scipy.stats import binomtest

from ldm.evaluation.cmmd import cubic_kernel, gram_within, mmd2
from ldm.evaluation.inception_score import inception_score, measure_inception_scores
from ldm.evaluation.precision_recall import density_coverage, precision_recall, recall_of_subsets
from ldm.evaluation.resampling import (
    HalfSampling,
    clustered_share_interval,
    draw_halves,
    jackknife_interval,
    share_interval,
)
from ldm.util import generator


def draw(count, seed, dimensions=6, shift=0.0):
    rows = torch.randn(count, dimensions, generator=generator("resampling", seed), dtype=torch.float64)
    return torch.relu(rows + 0.2) + shift


def predictions(count, seed, classes=10, certainty=4.0):
    source = generator("predictions", seed)
    logits = torch.randn(count, classes, generator=source, dtype=torch.float64)
    logits[torch.arange(count), torch.randint(classes, (count,), generator=source)] += certainty
    return logits.softmax(1)


def covered(intervals):
    """How many of the intervals hold the mean of their estimates."""
    mean = sum(found.estimate for found in intervals) / len(intervals)
    return sum(found.low <= mean <= found.high for found in intervals)


def test_halves_of_a_mean_give_its_standard_error():
    """Of a linear statistic L is all there is: its variance is the sample's over n, Q is 0."""
    values = torch.randn(200, generator=generator("mean", 0), dtype=torch.float64)
    halves = draw_halves(200, 2000, "mean") @ values / 100
    found = HalfSampling.from_halves(float(values.mean()), halves)
    assert found.deviation == pytest.approx(float(values.std()) / math.sqrt(200), rel=0.05)
    assert found.bias == pytest.approx(0, abs=1e-12)


def test_halves_of_a_squared_mean_at_zero_give_its_bias_and_not_a_bootstrap_s_spread():
    """T = (mean x)^2 of a centred sample is all Q: its bias is var / n, its variance 2 (var / n)^2.

    A bootstrap of it would have a variance of 6 (var / n)^2 on average over samples.
    """
    spreads, biases = [], []
    for seed in range(60):
        values = torch.randn(100, generator=generator("squared", seed), dtype=torch.float64)
        halves = (draw_halves(100, 200, seed) @ values / 50).square()
        found = HalfSampling.from_halves(float(values.mean() ** 2), halves)
        spreads.append(found.deviation**2)
        biases.append(found.bias)
    assert sum(biases) / 60 == pytest.approx(1 / 100, rel=0.1)
    assert 1.5e-4 < sum(spreads) / 60 < 3.5e-4


def test_kid_covers_near_equal_laws_and_far_ones():
    reference = draw(600, 0)
    sums = gram_within(cubic_kernel, reference)
    for shift in (0.0, 0.2):
        found = [
            mmd2(cubic_kernel, reference, draw(150, seed, shift=shift), resamples=60, seed=seed, reference_sums=sums)
            for seed in range(1, 41)
        ]
        assert 34 <= covered(found) <= 40


def test_recall_and_coverage_cover_new_draws_of_the_samples():
    reference = draw(500, 0)
    recalls = [precision_recall(reference, draw(150, seed), resamples=20, seed=seed).recall for seed in range(1, 31)]
    coverages = [density_coverage(reference, draw(150, seed), resamples=1).coverage for seed in range(1, 31)]
    assert covered(recalls) >= 26 and covered(coverages) >= 26
    spread = torch.tensor([found.estimate for found in recalls]).std()
    half = torch.tensor([found.high - found.low for found in recalls]).mean() / 4.2
    assert 0.6 < float(half / spread) < 2


def test_recall_of_a_subset_is_that_of_the_subset_alone():
    reference, samples = draw(80, 0), draw(60, 1)
    masks = draw_halves(60, 6, "subset").bool()
    found = recall_of_subsets(reference, samples, 3, masks)
    alone = [precision_recall(reference, samples[mask]).recall.estimate for mask in masks]
    assert found.tolist() == pytest.approx(alone)


def test_the_score_lies_in_its_interval_and_its_correction_is_right():
    truth = float(inception_score(predictions(60_000, 99)))
    found = [measure_inception_scores(predictions(300, seed), 60, seed) for seed in range(40)]
    assert all(one.published.low < one.published.estimate < one.published.high for one in found)
    assert covered([one.published for one in found]) >= 34
    means = [sum(getattr(one, name).estimate for one in found) / 40 for name in ("published", "corrected")]
    assert means[0] < 0.995 * truth and means[1] == pytest.approx(truth, rel=0.01)
    few = measure_inception_scores(predictions(100, 0, classes=60), 60)
    assert not few.corrected.known, "100 images say too little of 60 classes"


def test_a_share_of_all_keeps_a_width():
    found = share_interval(torch.ones(20, dtype=torch.bool))
    ends = binomtest(20, 20).proportion_ci(method="wilson")
    assert (found.estimate, found.low, found.high) == (1, ends.low, ends.high) and found.low < 0.9


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.rand(20, generator=generator("jackknife", 0), dtype=torch.float64)
    without = (values.sum() - values) / 19
    found = jackknife_interval(float(values.mean()), without)
    assert found.high - found.low == pytest.approx(2 * 2.093024 * float(values.std()) / math.sqrt(20), rel=1e-6)


def test_shares_of_members_lie_between_those_of_their_noises_and_of_all_samples():
    drawn = torch.rand(5, 4000, generator=generator("members"), dtype=torch.float64)
    apart = drawn < 0.8
    alike = apart[:1].expand(5, -1)
    # Wilson's, of as many samples as there are; 4,000 noises leave Student's and the normal quantile 0.1 % apart.
    for given, plain in ((apart, share_interval(apart.flatten())), (alike, share_interval(alike[0]))):
        found = clustered_share_interval(given)
        assert found.estimate == pytest.approx(plain.estimate) and found.width == pytest.approx(plain.width, rel=0.03)


def test_equal_samples_count_as_their_noises():
    found = clustered_share_interval(torch.ones(5, 8, dtype=torch.bool))
    assert found.estimate == found.high == 1 and found.low < share_interval(torch.ones(8)).low
    assert not clustered_share_interval(torch.ones(5, 1)).known


def test_shares_of_members_that_share_noises_are_covered():
    ends = []
    for seed in range(300):
        common, *own = torch.randn(6, 20, generator=generator("alike", seed), dtype=torch.float64)
        inside = 0.9**0.5 * common + 0.1**0.5 * torch.stack(own) < 0.5244005
        found, alone = clustered_share_interval(inside), share_interval(inside.flatten())
        ends.append((found.low <= 0.7 <= found.high, alone.low <= 0.7 <= alone.high))
    clustered, alone = torch.tensor(ends).double().mean(0).tolist()
    # The standard error of 95 % of 300 is 1.3 %.
    assert 0.91 < clustered <= 0.99 and alone < 0.8, "all samples counted as independent cover too seldom"
