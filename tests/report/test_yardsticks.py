"""Benchmarks of flows against closed forms, dense derivatives and limits, on a tiny flow."""

import argparse

import pytest
import torch

from ldm.arguments import add_model_arguments, open_model
from ldm.experiments import low_data as low_data
from ldm.experiments import variance_benchmarks as benchmarks
from ldm.report.benchmark_table import benchmark_overview
from ldm.report.tables import read_csv
from ldm.uncertainty.aleatoric import data_covariance
from scripts import benchmark_bayesflow
from tests.posteriors import model_words, write_model

FLOW = {"parameterization": "velocity"}
FLOW["path_config"] = {"target": "ldm.diffusion.schedule.FlowSchedule", "params": {"time_scale": 1000.0}}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return [*model_words(write_model(tmp_path_factory.mktemp("flow"), **FLOW)), "--steps", "3"]


@pytest.fixture(scope="module")
def walks(words):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser, steps=10)
    pipeline = open_model(parser.parse_args(words))
    return low_data.fit_posterior(pipeline, benchmark_bayesflow.data_of(pipeline, "train", 40), draws=2)


def test_directions_agree_with_many_weights_where_the_posterior_is_narrow(walks):
    """Variances of tangents are the limit of those of weights: totals within the draws' error."""
    table = benchmarks.fidelity(benchmarks.at_steps(walks, 2), [0, 1], [0, 1], draws=64)
    rows = {row["method"]: row for row in table}
    found = rows["tangents, every direction"]
    assert found["total"] == pytest.approx(1, abs=0.15) and found["pixel"] > 0.9 and not found["published"]
    assert found["error"] < rows["tangents, K = 8"]["error"]
    fresh = rows["fresh weights, total variance, S = 10"]
    assert fresh["total"] < 0.8, "weights drawn anew lose the scale: about 1 / steps of it"
    assert [line["benchmark"][:2] for line in benchmark_overview({"fidelity": table})] == ["Y1"] * 3


def test_alignment_is_the_trace_of_the_dense_covariance(walks):
    """Without clamping at work: the ratio from the whole covariance matrix and the same noises."""
    pipeline, share = walks.pipeline, 0.5
    data = benchmark_bayesflow.data_of(pipeline, "validation")
    (row,) = benchmarks.error_alignment(pipeline, data, [share], count=3)
    positions = benchmarks.chosen_positions(len(data), 3, pipeline.sampling.seed)
    x0 = torch.stack([data[position]["image"] for position in positions]).permute(0, 3, 1, 2)
    cond = pipeline.labels([int(data[position]["class_label"]) for position in positions])
    denoiser, path = pipeline.model.denoiser(cond), pipeline.model.schedule
    x = (x0 + pipeline.noise(positions).initial(x0.shape)) / 2  # alpha = sigma = 1 / 2
    exact = data_covariance(denoiser, path, x, 0.5).diagonal(dim1=1, dim2=2)
    error = (denoiser(x, 0.5).x0 - x0).square().sum()
    assert row["ratio"] == pytest.approx(float(exact.clamp(min=0).sum() / error), rel=1e-3)
    assert row["negative"] == pytest.approx(float((exact < 0).double().mean()), abs=0.02)


def test_the_published_posterior_is_ridge_by_squared_gradients(walks):
    """Precision 1 + sum (2 r phi)^2 / 2 of every weight, whatever the evidence says."""
    pipeline = walks.pipeline
    data = benchmark_bayesflow.data_of(pipeline, "train", 12)
    laplace = low_data.new_posterior(pipeline, curvature="full", sigma_noise=0.3, prior_precision=7.0)
    batches = list(low_data.observations(pipeline.model, data))
    laplace.fit(batches, also=("ef",))
    published = benchmarks.published_posterior(laplace)
    squares = 0
    for batch in batches:
        phi = laplace.layer.patches(laplace.features(batch.x, batch.t, batch.cond)).double()  # [B, HW, K]
        outputs = laplace.layer.by_position(pipeline.model.network(batch.x, batch.t, batch.cond)).double()
        residuals = outputs - laplace.layer.by_position(batch.target)
        squares = squares + torch.einsum("bpk,bpc->bck", phi, residuals).square().sum(0)
    new = batches[0]
    features = laplace.features(new.x, new.t, new.cond)
    phi = laplace.layer.patches(features).double()
    exact = torch.einsum("bpk,ck->bcp", phi.square(), 1 / (1 + 2 * squares)).unflatten(2, features.shape[2:])
    torch.testing.assert_close(published.predict(features)[1].double(), exact, rtol=1e-3, atol=1e-8)


def test_renoised_variance_is_that_of_the_posterior_at_the_noised_latents(walks):
    """Term by term through `LastLayerLaplace.predict`; an image's own noise, whatever the batch."""
    pipeline = walks.pipeline
    x0 = torch.randn(2, *pipeline.model.latent_shape, generator=torch.Generator().manual_seed(0))
    found = low_data.renoised_variance(walks, x0, [3, 4], [0, 7])
    exact, noise = 0, walks.noise([0, 7])
    for number in range(9):
        u = (number + 1) / 10  # alpha = 1 - u, sigma = u: the noise share itself
        x = (1 - u) * x0 + u * noise(number, x0.shape)
        features = walks.laplace.features(x, torch.full((2,), 1000.0 * u), pipeline.labels([3, 4]))
        exact = exact + walks.laplace.predict(features)[1]
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(low_data.renoised_variance(walks, x0[1:], [4], [7]), found[1:], rtol=1e-4, atol=1e-9)


def test_slope_of_a_power():
    rows = [{"images": n, "variance": 3 * n**-1.2} for n in (50, 100, 400)]
    assert benchmarks.slope(rows) == pytest.approx(-1.2)


def test_detection_is_minus_the_control_and_its_interval_students():
    labels = [0, 0, 1, 1]
    rows = []
    for scores in ([3.0, 4, 1, 2], [3.0, 1, 2, 0]):  # AUROC 1 and 3 / 4; control 1 / 2
        pair = {"score": torch.tensor(scores)}, {"score": torch.tensor([1.0, 1, 1, 1])}
        rows += low_data.detection_rows(*(low_data.score_rows(each, labels, [0]) for each in pair))
    assert [row["difference"] for row in rows] == [0.5, 0.25]
    (found,) = low_data.summary(rows)
    half = 12.7062 * 0.125  # Student's t of one degree of freedom, standard error |.5 - .25| / 2
    assert found["difference"] == pytest.approx(0.375) and found["models"] == 2
    assert (found["low"], found["high"]) == pytest.approx((0.375 - half, 0.375 + half), abs=1e-3)


def test_one_command_from_a_flow_to_the_table(words, tmp_path):
    small = "--n 1 --truth 4 --images 30 --draws 2 --bootstraps 5 --tests 6 --probes 2 --grids 1 2 --steps 1"
    parts = ["consistency", "calibration", "alignment", "scaling", "cost"]
    told = [*words, *small.split(), "--out", str(tmp_path), "--only", *parts]
    benchmark_bayesflow.main(told)
    report = (tmp_path / "report.md").read_text()
    assert all(f"| Y{number}" in report for number in (2, 3, 6, 8, 9)) and "nan" not in report
    assert report.count("BayesFlow as published, S = 100") == 2
    kept = {part: (tmp_path / f"{part}.csv").stat().st_mtime_ns for part in parts}
    benchmark_bayesflow.main(told)
    assert kept == {part: (tmp_path / f"{part}.csv").stat().st_mtime_ns for part in parts}
    assert (tmp_path / "report.md").read_text() == report
    assert benchmark_overview({"unknown": []}) == []


def test_low_data_models_that_were_scored_are_not_trained_again(words, tmp_path):
    """Five tables of scores and the control's: a report, with nothing loaded or trained; a further seed adds to it."""
    told = [*words, "--out", str(tmp_path), "--only", "low_data", "--seeds"]
    work = benchmark_bayesflow.low_data_work(benchmark_bayesflow.get_parser().parse_args([*told, "0"]))
    labels, rising = list(range(10)), {"gamma^2 along": torch.arange(10.0), "BayesFlow": torch.ones(10)}
    rising |= {"gamma^2 of": rising["BayesFlow"], "tangents": rising["BayesFlow"], "distance": -rising["gamma^2 along"]}
    for seed in (0, 1):
        for rotation in ("control", *benchmark_bayesflow.ROTATIONS):
            few = [] if rotation == "control" else [8, 9]
            scores = {name: values * (rotation != "control") for name, values in rising.items()}
            rows = low_data.score_rows(scores, labels, few)
            work.save(f"scores_{rotation}_{seed}", {"rows": rows})
        benchmark_bayesflow.main([*told, *map(str, range(seed + 1))])
        table = read_csv(tmp_path / "low_data.csv")
        assert len(table) == 5 * 5 * (seed + 1) and {row["classes"] for row in table} == {"8 9"}
    differences = {row["score"]: row["difference"] for row in table}
    assert differences == {**dict.fromkeys(rising, 0), "gamma^2 along": 0.5, "distance": -0.5}
    assert "+0.500 [+0.500, +0.500] (1.000)" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match=r"results of other settings .*per_class: 24 -> 8"):
        benchmark_bayesflow.main([*told, "0", "--per_class", "8"])
