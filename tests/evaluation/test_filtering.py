"""Removal by a score beside chance: sizes, classes, and the distance from chance."""

from collections import Counter

import numpy as np
import pytest

from ldm.evaluation.filtering import (
    adjust_for_many,
    at_random,
    certain,
    comparison,
    count_kept,
    permutation_p,
    standing,
)

KINDS = np.array([0, 1, 1, 0, 2, 1, 0, 2, 1, 0, 2, 2])
GROUPS = [np.flatnonzero(label == KINDS) for label in range(3)]
EVERY = [np.arange(12)]


def test_the_rules():
    values = np.array([5, 1, 9, 2, 3, 3, 0, 8, 7, 4, 6, 3.5])
    np.testing.assert_array_equal(certain(values, EVERY, share=0.5), [1, 3, 4, 5, 6, 11])
    kept = certain(values, EVERY, "sigma")
    assert set(kept) == {place for place in range(12) if values[place] <= values.mean() + values.std()}
    kept = certain(values, GROUPS, share=0.5)
    assert Counter(KINDS[kept].tolist()) == {0: 2, 1: 2, 2: 2} and set(kept) >= {6, 3, 1, 5, 4, 11}
    np.testing.assert_array_equal(certain(np.ones(12), GROUPS, "sigma"), np.arange(12))
    with pytest.raises(ValueError, match="nothing stays"):
        certain(values, EVERY, share=0.01)
    with pytest.raises(ValueError, match="rule must be"):
        certain(values, EVERY, "median")


def test_random_removals_have_the_same_counts_and_every_image_the_same_chance():
    counts = (1, 3, 2)
    drawn = [at_random(counts, GROUPS, 0, number) for number in range(600)]
    assert all(count_kept(kept, GROUPS) == counts and len(set(kept)) == 6 for kept in drawn)
    share = np.bincount(np.concatenate(drawn), minlength=12) / 600
    expected = np.array([counts[label] / 4 for label in KINDS])
    assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / 600)
    np.testing.assert_array_equal(at_random((4,), EVERY, 1, 2), at_random((4,), EVERY, 1, 2))
    assert set(at_random((4,), EVERY, 1, 2)) < set(at_random((7,), EVERY, 1, 2))


def test_standing_counts_in_standard_deviations_and_is_empty_without_any():
    drawn = [3.0, 5.0, 4.0, 8.0]
    expected = (6.0 - np.mean(drawn)) / np.std(drawn, ddof=1)
    assert standing(6.0, drawn, "precision") == pytest.approx(expected)
    assert standing(6.0, drawn, "fid") == pytest.approx(-expected)
    assert standing(5.0, [5.0, 5.0, 5.0 + 1e-15], "fid") is None
    assert standing(5.0, [], "fid") is None and standing(5.0, [4.0], "fid") is None


def test_p_counts_the_random_removals_that_are_as_good():
    """Under the null law the value is one of 20 exchangeable ones: P(p <= k / 20) = k / 20."""
    drawn = [3.0, 5.0, 4.0, 8.0]
    assert permutation_p(6.0, drawn, "precision") == 2 / 5 and permutation_p(6.0, drawn, "fid") == 4 / 5
    assert permutation_p(9.0, drawn, "precision") == 1 / 5 and permutation_p(5.0, [5.0, 5.0], "fid") is None
    null = np.random.default_rng(0).normal(size=(4000, 20))
    found = [permutation_p(row[0], list(row[1:]), "fid") for row in null]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.012)
    rows = [{"p_fid": 0.01, "p_kid": 0.04}, {"p_fid": None, "p_kid": 0.03}]
    adjust_for_many(rows)
    assert [rows[0]["p_fid"], rows[0]["p_kid"], rows[1]["p_kid"]] == pytest.approx([0.03, 0.06, 0.06])


def test_each_score_stands_beside_the_removals_of_its_own_size():
    kept = {"none": np.arange(12), "a": np.arange(6), "b": np.arange(8), "c": np.arange(6, 12)}
    counts = {name: (len(positions),) for name, positions in kept.items()}
    values = {name: {"fid": value} for name, value in {"none": 1.0, "a": 2.0, "b": 3.0, "c": 4.0}.items()}
    drawn = {(6,): [{"fid": 1.0}, {"fid": 3.0}], (8,): [{"fid": 7.0}, {"fid": 7.0}]}
    rows = {row["removed by"]: row for row in comparison(kept, counts, values, drawn)}
    assert rows["none"]["z_fid"] is None and rows["b"]["z_fid"] is None
    assert rows["a"]["z_fid"] == pytest.approx(0) and rows["c"]["z_fid"] == pytest.approx(-2 / 2**0.5)
    assert (rows["random like a, c"]["fid"], rows["random like a, c"]["kept"]) == (2.0, 6)
    assert rows["random like b, s.d."]["fid"] == 0
