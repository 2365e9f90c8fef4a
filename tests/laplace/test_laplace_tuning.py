"""Evidence, its tuning, streaming and saving of the last-layer posterior."""

import math

import pytest
import torch
import yaml
from torch.distributions import MultivariateNormal

from ldm.laplace import LastLayerLaplace, load_laplace, save_laplace, tune
from tests.laplace.laplace_cases import fitted, jacobian, make_batch, make_network

SIGMA, PRIOR = 0.6, 1.7


def at_optimum(prior_mean=0.0):
    """A network whose last layer is the ridge regression of the batch, by dense algebra; and the design, targets."""
    network = make_network("linear")
    batch = make_batch(network, 4)
    design = jacobian(network, *batch[:3]).flatten(2).flatten(0, 1)
    targets = batch.target.flatten()
    start = torch.full((design.shape[1],), float(prior_mean), dtype=torch.float64)
    normal = design.T @ design / SIGMA**2 + PRIOR * torch.eye(len(start)).double()
    best = torch.linalg.solve(normal, design.T @ targets / SIGMA**2 + PRIOR * start).reshape(3, -1)
    with torch.no_grad():
        network.out[1].weight.copy_(best[:, :-1])
        network.out[1].bias.copy_(best[:, -1])
    return network, batch, design, targets


@pytest.mark.parametrize("prior_mean", [0.0, 0.3])
def test_evidence_is_the_density_of_the_targets(prior_mean):
    network, batch, design, targets = at_optimum(prior_mean)
    laplace = fitted(network, batch, prior_precision=PRIOR, sigma_noise=SIGMA, prior_mean=prior_mean)
    start = torch.full((design.shape[1],), prior_mean, dtype=torch.float64)
    covariance = SIGMA**2 * torch.eye(len(targets)).double() + design @ design.T / PRIOR
    exact = MultivariateNormal(design @ start, covariance).log_prob(targets)
    assert laplace.log_marginal_likelihood() == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize("curvature", ["full", "diag", "kron", "lowrank", "ef", "sandwich"])
def test_evidence_of_every_curvature_by_determinants(curvature):
    """ln det of posterior over prior precision, from the covariance that predictions use (sandwich: its bread)."""
    network = make_network()
    batch = make_batch(network, 4)
    laplace = fitted(network, batch, curvature, also=["full"], rank=7, prior_precision=2.0, sigma_noise=0.8)
    source = laplace.with_curvature("full") if curvature == "sandwich" else laplace
    width = laplace.layer.width
    root = source.covariance().correlate(torch.eye(width).double()[:, None].expand(-1, 2, -1))
    log_det = -sum(torch.logdet(root[:, c].T @ root[:, c]) for c in range(2))
    residual = float((batch.target - network(*batch[:3]).detach()).square().sum())
    expected = -0.5 * residual / 0.64 - 0.5 * batch.target.numel() * math.log(2 * math.pi * 0.64)
    expected += -0.5 * 2.0 * laplace.mean.square().sum() - 0.5 * (log_det - 2 * width * math.log(2.0))
    assert laplace.log_marginal_likelihood() == pytest.approx(float(expected), rel=1e-10)
    assert laplace.log_marginal_likelihood(3.0, 0.5) != laplace.log_marginal_likelihood()
    assert laplace.prior_precision == 2.0


def test_marginal_likelihood_is_maximised():
    """At the optimum MacKay's fixed point holds: precision = effective parameters / |W|^2."""
    network = make_network()
    laplace = fitted(network, make_batch(network, 4), sigma_noise=0.5)
    best = laplace.optimize_prior_precision(method="marglik")
    assert laplace.prior_precision == best
    spectrum = laplace.spectrum()
    effective = (spectrum / (spectrum + best)).sum()
    assert best == pytest.approx(float(effective / laplace.mean.square().sum()), rel=1e-6)
    with pytest.raises(ValueError, match="equal to prior_mean"):
        fitted(network, make_batch(network, 4), prior_mean=laplace.mean).optimize_prior_precision()
    with pytest.raises(ValueError, match="holds no data"):
        fitted(network, make_batch(network, 4), "isotropic").optimize_prior_precision()
    with pytest.raises(ValueError, match="method must be"):
        laplace.optimize_prior_precision("guess")


def test_gridsearch_takes_the_best_held_out_density(monkeypatch, caplog):
    network = make_network()
    batch, held_out = make_batch(network, 1, noise=0.1), make_batch(network, 4, seed=5, noise=0.2)
    laplace = fitted(network, batch, sigma_noise=0.1)
    found = laplace.optimize_prior_precision("gridsearch", batches=[held_out], low=1e-3, high=1e3, steps=7)
    scores = []
    for precision in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0):
        mean, var = fitted(network, batch, sigma_noise=0.1, prior_precision=precision)(*held_out[:3])
        density = torch.distributions.Normal(mean, (var + 0.01).sqrt()).log_prob(held_out.target)
        scores.append((float(density.sum()), precision))
    assert found == pytest.approx(max(scores)[1])
    assert 1e-3 < found < 1e3, "the best must lie inside, or nothing is tested"
    monkeypatch.setattr(tune, "_HELD", 1)  # each batch a block of its own
    one_by_one = halves(held_out)
    assert found == laplace.optimize_prior_precision("gridsearch", batches=one_by_one, low=1e-3, high=1e3, steps=7)
    assert not caplog.text
    laplace.optimize_prior_precision("gridsearch", batches=one_by_one, low=100, high=1e3, steps=2)
    assert "end of the grid, prior precision 100" in caplog.text
    with pytest.raises(ValueError, match="held-out"):
        laplace.optimize_prior_precision("gridsearch", batches=[])


def test_sigma_is_that_of_the_residuals():
    network = make_network()
    batch = make_batch(network, 8)
    laplace = fitted(network, batch, time_edges=[500.0], also=["full"])
    residual = batch.target - network(*batch[:3])
    parts = [residual[batch.t <= 500], residual[batch.t > 500]]
    expected = torch.stack([part.square().mean().sqrt() for part in parts])
    torch.testing.assert_close(laplace.optimize_sigma_noise(), expected)
    one = fitted(network, batch, data_size=80)
    plain = one.optimize_sigma_noise()
    spectrum = one.spectrum()
    effective = float((spectrum / (spectrum + 1)).sum())
    unbiased = one.optimize_sigma_noise(degrees_of_freedom=True)
    assert float(unbiased / plain) == pytest.approx((1 - effective / (10 * residual.numel())) ** -0.5, rel=1e-9)
    with pytest.raises(ValueError, match="saw no data"):
        fitted(network, batch, time_edges=[2000.0]).optimize_sigma_noise()


def halves(batch):
    return [type(batch)(*[part[rows] for part in batch]) for rows in (slice(0, 2), slice(2, 6))]


@pytest.mark.parametrize("curvature", ["full", "diag", "ef", "sandwich", "isotropic"])
def test_streams_merges_and_additions_equal_one_fit(curvature):
    network = make_network()
    batch = make_batch(network, 6)
    parts = halves(batch)
    whole = fitted(network, batch, curvature, draws=2)
    streamed = LastLayerLaplace(network, curvature=curvature, chunk=1).fit(iter(parts), draws=2)
    merged = fitted(network, parts[0], curvature, draws=2).merge(fitted(network, parts[1], curvature, draws=2))
    added = fitted(network, parts[0], curvature, draws=2).fit([parts[1]], draws=2, override=False)
    again = fitted(network, parts[0], curvature, draws=2).fit([batch], draws=2)
    new = make_batch(network, 2, seed=3)[:3]
    for other in (streamed, merged, added, again):
        assert other.data_size == 3
        torch.testing.assert_close(other(*new), whole(*new), rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="other weights"):
        merged.merge(fitted(make_network(seed=9), batch, curvature, draws=2))


@pytest.mark.parametrize("curvature", ["full", "diag", "ef", "sandwich", "isotropic"])
def test_rescaling_equals_seeing_the_images_again(curvature):
    network = make_network()
    batch = make_batch(network, 4)
    thrice = type(batch)(*[part.repeat(3, *[1] * (part.ndim - 1)) for part in batch])
    scaled, repeated = fitted(network, batch, curvature, data_size=12), fitted(network, thrice, curvature)
    new = make_batch(network, 2, seed=3)[:3]
    torch.testing.assert_close(scaled(*new), repeated(*new), rtol=1e-10, atol=0)
    if curvature != "isotropic":
        assert scaled.log_marginal_likelihood() == pytest.approx(repeated.log_marginal_likelihood(), rel=1e-12)


def test_saved_posteriors_load_as_they_were(tmp_path):
    network = make_network()
    laplace = fitted(network, make_batch(network, 4), "sandwich", draws=2, data_size=50, also=["ef"], rank=9)
    laplace.prior_precision, laplace.sigma_noise, laplace.temperature = 0.1 + 0.2, 0.7, 1.3
    save_laplace(laplace, tmp_path / "posterior", {"checkpoint": "run"})
    assert yaml.safe_load((tmp_path / "posterior" / "laplace.yaml").read_text())["record"] == {"checkpoint": "run"}
    loaded = load_laplace(tmp_path / "posterior", network)
    new = make_batch(network, 2, seed=3)[:3]
    assert loaded.rank == 9 and loaded.data_size == 50 and loaded.prior_precision == 0.1 + 0.2
    assert all(torch.equal(a, b) for a, b in zip(loaded(*new), laplace(*new), strict=True))
    assert torch.equal(loaded.with_curvature("ef")(*new)[1], laplace.with_curvature("ef")(*new)[1])
    assert loaded.log_marginal_likelihood() == laplace.log_marginal_likelihood()
    with pytest.raises(FileExistsError, match="holds a posterior"):
        save_laplace(laplace, tmp_path / "posterior")
    with pytest.raises(ValueError, match="other weights"):
        load_laplace(tmp_path / "posterior", make_network(seed=4))
    with pytest.raises(ValueError, match=r"no laplace\.yaml"):
        load_laplace(tmp_path, network)
    with pytest.raises(ValueError, match="not fitted"):
        save_laplace(LastLayerLaplace(network), tmp_path / "empty")


def test_a_killed_overwrite_leaves_the_earlier_posterior_whole(tmp_path, monkeypatch):
    network = make_network()
    first, second = fitted(network, make_batch(network, 4), "diag"), fitted(network, make_batch(network, 3), "diag")
    folder = save_laplace(first, tmp_path / "posterior")
    new = make_batch(network, 2, seed=3)[:3]

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("yaml.safe_dump", killed)
        with pytest.raises(KeyboardInterrupt):
            save_laplace(second, folder, overwrite=True)
    assert torch.equal(load_laplace(folder, network)(*new)[1], first(*new)[1])
    save_laplace(second, folder, overwrite=True)
    assert torch.equal(load_laplace(folder, network)(*new)[1], second(*new)[1])
    (held,) = folder.glob("*.safetensors")
    held.write_bytes(held.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError, match="is not the file that"):
        load_laplace(folder, network)
