"""Benchmarks of flows against closed forms, dense derivatives and limits, on a tiny flow."""

import pytest
import torch

from ldm import Sampling
from ldm.experiments import low_data
from ldm.experiments import variance_benchmarks as benchmarks
from ldm.report.benchmark_table import benchmark_overview
from ldm.uncertainty.aleatoric import data_covariance
from tests.posteriors import write_model

FLOW = {"parameterization": "velocity"}
FLOW["path_config"] = {"target": "ldm.diffusion.schedule.FlowSchedule", "params": {"time_scale": 1000.0}}


@pytest.fixture(scope="module")
def posterior(tmp_path_factory):
    source = write_model(tmp_path_factory.mktemp("flow"), **FLOW)
    pipeline = source.load(Sampling(steps=3), device="cpu")
    return low_data.fit_posterior(pipeline, low_data.load_own_data(pipeline, "train", 40), draws=2)


@pytest.mark.slow
def test_directions_agree_with_many_weights_where_the_posterior_is_narrow(posterior):
    """Variances of tangents are the limit of those of weights: totals within the draws' error."""
    table = benchmarks.fidelity(benchmarks.at_steps(posterior, 2), [0, 1], [0, 1], draws=64)
    rows = {row["method"]: row for row in table}
    found = rows["tangents, every direction"]
    assert found["total"] == pytest.approx(1, abs=0.15) and found["pixel"] > 0.9 and not found["published"]
    assert found["error"] < rows["tangents, K = 8"]["error"]
    fresh = rows["fresh weights, total variance, S = 10"]
    assert fresh["total"] < 0.8, "weights drawn anew lose the scale: about 1 / steps of it"
    assert [line["benchmark"][:2] for line in benchmark_overview({"fidelity": table})] == ["Y1"] * 3


def test_alignment_is_the_trace_of_the_dense_covariance(posterior):
    """Without clamping at work: the ratio from the whole covariance matrix and the same noises."""
    pipeline, share = posterior.pipeline, 0.5
    data = low_data.load_own_data(pipeline, "validation")
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


def test_the_published_posterior_is_ridge_by_squared_gradients(posterior):
    """Precision 1 + sum (2 r phi)^2 / 2 of every weight, whatever the evidence says."""
    pipeline = posterior.pipeline
    data = low_data.load_own_data(pipeline, "train", 12)
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


def test_renoised_variance_is_that_of_the_posterior_at_the_noised_latents(posterior):
    """Term by term through `LastLayerLaplace.predict`; an image's own noise, whatever the batch."""
    pipeline = posterior.pipeline
    x0 = torch.randn(2, *pipeline.model.latent_shape, generator=torch.Generator().manual_seed(0))
    found = low_data.renoised_variance(posterior, x0, [3, 4], [0, 7])
    exact, noise = 0, posterior.noise([0, 7])
    for number in range(9):
        u = (number + 1) / 10  # alpha = 1 - u, sigma = u: the noise share itself
        x = (1 - u) * x0 + u * noise(number, x0.shape)
        features = posterior.laplace.features(x, torch.full((2,), 1000.0 * u), pipeline.labels([3, 4]))
        exact = exact + posterior.laplace.predict(features)[1]
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(low_data.renoised_variance(posterior, x0[1:], [4], [7]), found[1:], rtol=1e-4, atol=1e-9)


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
