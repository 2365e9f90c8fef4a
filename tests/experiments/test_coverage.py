"""How coverage is counted, on intervals that are made by hand."""

import pytest

from ldm.experiments.coverage import draw_scores, share_cases, tabulate_coverage, tabulate_promise
from ldm.stats import Interval


def test_intervals_that_hold_the_truth_are_counted_among_those_with_ends():
    found = [Interval(0.0, -1, 1), Interval(2.0, 1, 3), Interval(0.0), Interval(4.0, 3, 5)]
    row = tabulate_coverage("by hand", found.__getitem__, 0.5, 4)
    assert row["covers"] == pytest.approx(1 / 3, abs=1e-3) and row["with an interval"] == "3 of 4"
    # Half widths are 1, and 0, 2, 0, 4 have a standard deviation of 1.915.
    assert row["half width / true s.d."] == pytest.approx(0.52)
    assert tabulate_coverage("of their mean", found.__getitem__, None, 4)["covers"] == pytest.approx(1 / 3, abs=1e-3)


def test_promises_that_are_not_made_are_left_out():
    row = tabulate_promise("by hand", 0.9, [True, None, False, True].__getitem__, 4)
    assert row["covers"] == pytest.approx(0.667) and row["nominal"] == 0.9 and row["with an interval"] == "3 of 4"


def test_cases_are_what_their_names_say():
    low, *_, high = list(share_cases())
    assert low[0] == "recognised, share 0.7, 8 noises, correlation 0.0" and (low[2], high[2]) == (0.7, 0.95)
    found = [high[1](seed) for seed in range(200)]
    assert sum(one.estimate for one in found) / 200 == pytest.approx(0.95, abs=0.01) and found[0].n == 20
    assert draw_scores(0, 1.0)[:3].mean() - draw_scores(0, 0.0)[:3].mean() == pytest.approx(3)
