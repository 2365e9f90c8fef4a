"""Controls of the uncertainty: known answers on made-up tables, baselines of a tiny ensemble computed again."""

import math

import numpy as np
import pytest
import torch

from ldm import Branching, Sampling, load_ensemble
from ldm.evaluation.recognition import PixelClassifier, nearest_distances
from ldm.experiments.controls import (
    class_controls,
    embedding_spread,
    members_study,
    over_runs,
    pooled_scores,
    same_class,
)
from ldm.experiments.cost import measure_ensemble_costs
from ldm.report.control_report import baseline_table, variant_table, write_control_report
from ldm.report.tables import read_csv
from tests.ensembles import SPREAD, TABLE, write_ensemble


def run_of(shift=0.0, order=(0, 1, 2, 3)):
    """A run in which class `order[k]` is in the k-th bin and its uncertainty falls with it."""
    bins = ("1", "10", "50", "all")
    return [{"class": label, "bin": bins[k], "mi_mean": 4.0 - k + shift} for k, label in enumerate(order)]


def test_the_same_class_with_different_numbers_of_images():
    runs = [run_of(order=np.roll(range(4), k)) for k in range(4)]
    runs[1] = [{**row, "mi_mean": 9.0} if row["class"] == 3 else row for row in runs[1]]  # 3 is in bin "1" there
    rows = same_class([row for run in runs for row in run])
    assert [row["class"] for row in rows] == [0, 1, 2, 3]
    assert rows[0] == {"class": 0, "at_1": 4.0, "at_10": 3.0, "at_50": 2.0, "at_all": 1.0, "spearman": -1.0,
                       "falls": True, "falls_at_every_step": True}  # fmt: skip
    assert rows[3]["at_1"] == 9.0
    (alone, *_) = same_class(run_of())
    assert (alone["spearman"], alone["falls"], alone["falls_at_every_step"]) == (None, False, False)
    upside_down = same_class([{**row, "mi_mean": -row["mi_mean"]} for row in run_of() + run_of(order=(1, 2, 3, 0))])
    assert not any(row["falls"] for row in upside_down) and upside_down[1]["spearman"] == pytest.approx(1)


def test_pooled_scores_turn_the_sign_and_average():
    best, worst = run_of(), [{**row, "mi_mean": -row["mi_mean"]} for row in run_of()]
    found = pooled_scores([best, best])
    assert (found["spearman"], found["auroc"], found["ratio"]) == pytest.approx((-1, 1, 1))
    assert found["auroc_low"] is None and found["spearman_high"] is None, "two runs that are alike have no width"
    assert pooled_scores([worst, worst], sign=-1.0)["auroc"] == 1
    mixed = pooled_scores([best, worst])
    assert (mixed["spearman"], mixed["auroc"]) == (0, 0.5)
    assert (mixed["auroc_worst"], mixed["spearman_worst"]) == (0, 1)
    assert (mixed["auroc_low"], mixed["auroc_high"]) == (0, 1)
    assert (mixed["spearman_low"], mixed["spearman_high"]) == (-1, 1)
    tied = [[{**row, "bin": "all" if row["bin"] == "50" else row["bin"]} for row in run] for run in (best, worst)]
    ceiling = pooled_scores([tied[0]] * 2)["spearman"]
    assert pooled_scores(tied)["spearman_low"] == pytest.approx(ceiling) and -1 < ceiling < -0.9
    assert pooled_scores([[{**row, "mi_mean": 1.0} for row in best]])["auroc"] is None


def test_an_interval_over_runs_ends_where_the_mean_does():
    """Three runs, 0.2, 0.9 and 1: their mean is 0.7, and Student's interval 0.7 -+ 4.303 0.4359 / sqrt(3)."""
    free, bound = over_runs([0.2, 0.9, 1.0]), over_runs([0.2, 0.9, 1.0], -1.0, 1.0)
    assert (free.low, free.high) == pytest.approx((-0.3828, 1.7828), abs=1e-3)
    assert (bound.low, bound.high) == (free.low, 1.0)


def test_number_of_members_with_known_information():
    """Far members give ln M for every M; with distance d between all, -ln(1/M + (1 - 1/M) e^-d)."""
    far, near = torch.full((4, 4, 3), 800.0), torch.full((4, 4, 3), 0.3)
    for matrix in (far, near):
        matrix.diagonal().zero_()
    distances = {0: far, 1: far, 2: near, 3: near}
    rows = members_study(distances, {0: 1, 1: 1, 2: math.inf, 3: math.inf})
    assert [(row["members"], row["groups"]) for row in rows] == [(2, 6), (3, 4), (4, 1)]
    for row in rows:
        count = row["members"]
        small = -math.log(1 / count + (1 - 1 / count) * math.exp(-0.3))
        assert row["mi"] == pytest.approx((math.log(count) + small) / 2)
        assert row["auroc"] == 1 and row["auroc_sd"] == 0
    many = members_study({0: torch.zeros(12, 12, 1), 1: torch.ones(12, 12, 1)}, {0: 1, 1: 2})
    assert max(row["groups"] for row in many) == 40


def test_baselines_of_a_tiny_ensemble(tmp_path):
    folder = write_ensemble(tmp_path)
    pipeline = load_ensemble(folder, Sampling(steps=2), Branching(at=0.0), device="cpu")
    images = torch.rand(20, 8, 8, 1, generator=torch.Generator().manual_seed(0)).numpy()
    classifier = PixelClassifier(images, np.arange(20) % 10)
    rows = class_controls(pipeline, [0, 2], 3, classifier, {0: images[:5], 2: images[5:9]})
    samples = pipeline.member_latents([2] * 3, range(3))[:, :, 0].double()
    gaps = [(samples[i] - samples[j]).flatten(1).norm(dim=1).mean() for i in range(3) for j in range(3) if i != j]
    assert rows[1]["l2"] == pytest.approx(float(torch.stack(gaps).mean()))
    assert rows[1]["member_variance"] == pytest.approx(float(samples.var(0, correction=0).mean()))
    assert rows[1]["seed_variance"] == pytest.approx(float(samples[0].var(0, correction=0).mean()))
    pictures = samples.clamp(-1, 1).flatten(0, 1).permute(0, 2, 3, 1).numpy()
    assert rows[1]["distance"] == pytest.approx(nearest_distances(pictures, images[5:9]).mean(), rel=1e-5)
    assert rows[1]["recognised"] == pytest.approx((classifier.predict(pictures) == 2).mean())
    # In every entry the members' rows spread by SPREAD (n - 1 of n in three draws) around the trunk's.
    table = pipeline.network.members.overrides[TABLE][:, 0]
    own = float(pipeline.model.get_parameter(TABLE)[0].std(correction=0))
    assert rows[0]["embedding_spread"] == pytest.approx(float(table.var(0, correction=0).mean() ** 0.5) / own, rel=1e-5)
    assert 0.3 * SPREAD[1] / own < embedding_spread(pipeline, 0) < 1.5 * SPREAD[1] / own


def test_a_score_that_is_quality_follows_quality():
    tables = {0: {0.0: run_of()}, 2: {0.0: run_of(shift=1.0)}}
    quality = {
        0: (0.1, 0.9),
        1: (0.2, 0.8),
        2: (0.3, 0.7),
        3: (0.4, 0.6),
    }  # recognised, distance: better with class_size
    controls = [
        {"rotation": rotation, "class": label, "l2": 1.0 + label, "member_variance": 4.0 - label, "seed_variance": 0.0,
         "embedding_spread": None, "recognised": quality[label][0], "distance": quality[label][1]}
        for rotation in (0, 2) for label in range(4)
    ]  # fmt: skip
    rows = {row["score"]: row for row in baseline_table(tables, controls)}
    assert "embedding_spread" not in rows
    assert rows["mi_at_0"]["auroc"] == rows["member_variance"]["auroc"] == 1 and rows["l2"]["auroc"] == 0
    assert rows["mi_at_0"]["rho_recognised"] == pytest.approx(-1) and rows["l2"]["rho_distance"] == pytest.approx(1)
    assert rows["seed_variance"]["auroc"] is None
    assert rows["recognised"]["auroc"] == 1 and rows["recognised"]["rho_recognised"] is None


def test_report_names_what_falls(tmp_path):
    tables = {"default": {k: {0.0: run_of(order=np.roll(range(4), k))} for k in range(4)}}
    report = write_control_report(tmp_path, tables, {}).read_text()
    assert "4 of 4 classes know less with fewest images than with most; 4 at every step" in report
    (row,) = read_csv(tmp_path / "variants.csv")
    assert row["variant"] == "default" and row["runs"] == 4 and row["auroc"] == 1
    assert variant_table(tables)[0]["mean_mi"] == 2.5
    assert (tmp_path / "same_class_0.png").stat().st_size > 1000


def test_costs_count_the_passes_of_a_branched_ensemble(tmp_path):
    folder = write_ensemble(tmp_path)
    pipeline = load_ensemble(folder, Sampling(steps=2), Branching(at=0.5), device="cpu")
    plain, one_step, whole = measure_ensemble_costs(pipeline, 2)
    assert plain["passes_an_image"] == 2
    assert one_step["passes_an_image"] == whole["passes_an_image"] == 1 + pipeline.members
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in (plain, one_step, whole))
