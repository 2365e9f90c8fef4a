"""Measures and the table, on scores whose answers are known."""

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from ldm.benchmark.cells import ORACLES, RETRAINED, OracleCell, ScoreCell
from ldm.benchmark.measures import (
    HALF,
    SeedScores,
    detect_over_control,
    draw_pictures,
    false_positives,
    make_benchmarks,
    map_errors,
    sparsification,
    step_growth,
    step_ranks,
    variance_ratio,
)
from ldm.benchmark.table import compare_methods, find_best, paired_p
from ldm.util import generator

LABELS = torch.arange(10).repeat_interleave(4)
EVERY = np.arange(len(LABELS))


def make_cell(name, kind, maps, steps=None):
    maps = torch.as_tensor(maps, dtype=torch.float32)
    return ScoreCell(name, kind, "variance", maps.double().sum(1), maps, {}, steps or {})


def make_seed(seed=0, few_labels=(0, 1, 2)):
    """The oracle's variances are larger for the few in one world; `knows` has them twice as large, `looks` does not."""
    is_few = np.isin(LABELS.numpy(), few_labels)
    cells, oracles = {}, {}
    for data in ("few", "all"):
        size = torch.where(torch.tensor(is_few & (data == "few")), 4.0, 1.0)[:, None]
        size = size * (1 + torch.rand(40, 6, generator=generator("size", seed)))
        pictures = size.sqrt() * torch.randn(30, 40, 6, generator=generator("pictures", seed, data))
        oracle = OracleCell(RETRAINED, pictures, pictures[0], {5: pictures[:, :10] / 2, 10: pictures[:, :10]})
        oracles[data] = dict.fromkeys(ORACLES, oracle)
        truth = pictures.double().var(0)
        few = truth[:10].sum(1)
        looks = torch.where(torch.tensor(is_few), 2.0, 1.0)[:, None] * torch.ones(40, 6)
        noise = torch.rand(40, 6, generator=generator("noise", seed, data))
        cells[data] = {
            "knows": make_cell("knows", "epistemic", 2 * truth, {5: few / 2, 10: few}),
            "nearest neighbour": make_cell("nearest neighbour", "control", noise),
            "looks": make_cell("looks", "control", looks + 0.01 * noise),
        }
    good = np.arange(40) % 5 > 0
    return SeedScores(cells, oracles, is_few, {"few": good, "all": good}, checked=np.arange(10), sampler_steps=20)


def test_what_looks_alone_finds_is_taken_away_by_the_control():
    seed = make_seed()
    assert detect_over_control(seed, "looks", EVERY) == pytest.approx(0)
    assert detect_over_control(seed, "knows", EVERY) > 0.3


def test_ratio_and_growth_are_held_to_the_oracle():
    seed = make_seed()
    assert variance_ratio("few", RETRAINED)(seed, "knows", EVERY) == pytest.approx(2)
    assert step_growth(seed, "knows", EVERY) == pytest.approx(1)


def test_ranks_over_steps_are_the_least_of_all_pairs():
    seed = make_seed()
    assert step_ranks(seed, "knows", EVERY) == pytest.approx(1)
    cell = seed.cells["few"]["knows"]
    seed.cells["few"]["turns"] = make_cell("turns", "control", cell.map, {**cell.steps, 10: -cell.steps[10]})
    assert step_ranks(seed, "turns", EVERY) == pytest.approx(-1)
    assert step_ranks(seed, "looks", EVERY) is None


def test_false_positives_at_the_value_that_most_positives_reach():
    values = np.array([0.0, 1, 2, 3, 10, 11, 12, 13])
    assert false_positives(values, values >= 10) == 0
    assert false_positives(-values, values >= 10) == 1


def test_sparsification_is_zero_for_the_errors_own_order_and_worst_for_its_reverse():
    errors = np.abs(np.random.default_rng(0).normal(size=(5, 50)))
    assert sparsification(errors, errors) == pytest.approx(np.zeros(5))
    shuffled = np.random.default_rng(1).random((5, 50))
    assert (sparsification(-errors, errors) > sparsification(shuffled, errors)).all()


def test_map_errors_ask_where_the_picture_lies_off_the_mean():
    seed = make_seed()
    oracle = seed.oracles["few"][RETRAINED]
    errors = (oracle.base - oracle.pictures.mean(0)).square()
    seed.cells["few"]["exact"] = make_cell("exact", "control", errors)
    assert map_errors(seed, "exact", EVERY) == pytest.approx(0, abs=1e-6)
    assert map_errors(seed, "nearest neighbour", EVERY) > 0.2


def test_p_of_a_mean_is_students():
    values = np.array([0.1, 0.3, 0.2, 0.5])
    assert paired_p(values) == pytest.approx(ttest_1samp(values, 0).pvalue)
    assert paired_p(values[:1]) == 1


def test_best_needs_its_interval():
    clear = {"a": np.array([1.0, 1.01, 0.99]), "b": np.array([0.1, 0.12, 0.09]), "c": np.array([0.2, 0.19, 0.22])}
    assert find_best(clear) == "a"
    assert find_best({**clear, "d": np.array([1.02, 0.97, 1.0])}) is None
    assert find_best({name: values[:1] for name, values in clear.items()}) is None


def test_table_names_losers_and_who_beats_the_neighbour():
    few = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (1, 2, 9), (2, 3, 4)]
    seeds = [make_seed(number, own) for number, own in enumerate(few)]
    results = compare_methods(make_benchmarks(ORACLES), seeds, LABELS, resamples=5)
    own = {one.method: one for one in results if one.benchmark == "few-image AUROC minus control"}
    assert own["knows"].beats_neighbour
    assert not own["looks"].beats_neighbour
    assert own["knows"].pictures.low <= own["knows"].value.estimate <= own["knows"].pictures.high
    without = [one for one in results if one.method == "looks" and one.benchmark == "few-image AUROC"]
    assert [one.value.estimate for one in without] == [1], "the same for all seeds and all pictures drawn again"
    assert not without[0].value.known and not without[0].pictures.known
    ranks = {one.method: one for one in results if one.benchmark == f"picture ranks: {RETRAINED}, few images"}
    assert ranks["knows"].value.estimate == pytest.approx(1)
    assert 0.5 < ranks[HALF].value.estimate < 1
    assert not any(one.best for one in results if one.kind == "oracle")
    ratios = [one for one in results if one.benchmark.startswith("ratio")]
    assert {one.method for one in ratios} >= {"knows", "looks", HALF}


def test_pictures_drawn_again_scatter_as_much_as_pictures():
    labels = torch.arange(3).repeat_interleave(2)
    values = np.array([1.0, 2.0, 0.0, 4.0, 7.0, 7.5])
    drawn = [draw_pictures(labels, generator("drawn", k)) for k in range(4000)]
    assert all((labels[torch.from_numpy(one)] == torch.arange(3)).all() for one in drawn[:10])
    means = [values[one].mean() for one in drawn]
    # The variance of a mean over three strata of two: sum of s^2 / 2, over 9.
    exact = values.reshape(3, 2).var(1, ddof=1).sum() / 2 / 9
    assert np.var(means) == pytest.approx(exact, rel=0.1), "with two draws a class it is half of that"
