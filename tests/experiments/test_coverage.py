"""How coverage is counted, on intervals that are made by hand; and that every interval has a row."""

import ast
import sys
from pathlib import Path

import pytest

import ldm
from benchmarks.coverage import mean_cases, metric_cases, picture_cases
from ldm.experiments.coverage import (
    class_cases,
    draw_scores,
    pair_cases,
    score_cases,
    share_cases,
    tabulate_coverage,
    tabulate_promise,
)
from ldm.stats import Interval

CASES = (mean_cases, class_cases, pair_cases, share_cases, picture_cases, score_cases, metric_cases)
# A mean and a standard deviation, which are printed as such; and the study's `skewed_mean_interval` under a name.
NO_ROW = {("ldm.evaluation.metrics", "_mean_and_spread"), ("ldm.uncertainty.results", "interval")}


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


@pytest.mark.slow
def test_every_function_that_makes_an_interval_is_simulated():
    """Each case of the study is drawn once; what the library annotates as an interval has been called by then."""
    called = set()

    def record(frame, event, _):
        if event == "call":
            called.add((frame.f_globals.get("__name__"), frame.f_code.co_name))

    sys.setprofile(record)
    try:
        for make in CASES:
            for _, measure, _ in make():
                measure(0)
    finally:
        sys.setprofile(None)
    assert sorted(find_interval_functions() - called - NO_ROW) == []


def find_interval_functions():
    """Return (module, name) of the functions of ldm that return an interval, but those of the study itself."""
    root = Path(ldm.__file__).parent
    found = set()
    for file in root.rglob("*.py"):
        module = ".".join(["ldm", *file.relative_to(root).with_suffix("").parts])
        if module == "ldm.experiments.coverage":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            returns = getattr(node, "returns", None)
            if returns is not None and "Interval" in ast.unparse(returns):
                found.add((module, node.name))
    return found
