"""The last-layer posterior equals Bayesian linear regression by dense algebra on Jacobians of automatic
differentiation, for every layer and curvature, to 1e-10 in float64.
"""

import math

import pytest
import torch
from torch import nn

from ldm.diffusion.denoiser import NetworkDenoiser, Target, guided
from ldm.diffusion.schedule import FlowSchedule
from ldm.ensembles.members import MemberNetwork
from ldm.laplace import LastLayerLaplace, Observation
from ldm.laplace.split import split_network
from tests.conftest import tiny_model
from tests.laplace.laplace_cases import (
    LAYERS,
    dense_variance,
    fitted,
    jacobian,
    make_batch,
    make_network,
    precision,
)

CLOSE = {"rtol": 1e-10, "atol": 0}
SIGMA, PRIOR = 0.6, 1.7


def case(kind="convolution", rows=6):
    network = make_network(kind)
    return network, make_batch(network, rows), make_batch(network, 3, seed=2)


def check(laplace, new, covariance):
    mean, var = laplace(*new[:3])
    network = Halves(laplace)
    assert torch.equal(mean, network(*new[:3]))
    torch.testing.assert_close(var, dense_variance(jacobian(network, *new[:3]), covariance, mean.shape), **CLOSE)


class Halves(nn.Module):
    """The network behind a posterior, from its two halves."""

    def __init__(self, laplace):
        super().__init__()
        self.laplace = [laplace]
        self.out = nn.Sequential(nn.Identity(), laplace.layer.layer)

    def forward(self, x, t, cond):
        return self.out(self.laplace[0].features(x, t, cond))


@pytest.mark.parametrize("kind", LAYERS)
def test_full_is_bayesian_linear_regression(kind):
    network, batch, new = case(kind)
    laplace = fitted(network, batch, prior_precision=PRIOR, sigma_noise=SIGMA)
    check(laplace, new, precision(jacobian(network, *batch[:3]), SIGMA, PRIOR).inverse())


@pytest.mark.parametrize("kind", LAYERS)
def test_diagonal_is_the_diagonal_of_the_dense_ggn(kind):
    network, batch, new = case(kind)
    laplace = fitted(network, batch, "diag", prior_precision=PRIOR, sigma_noise=SIGMA)
    check(laplace, new, (1 / precision(jacobian(network, *batch[:3]), SIGMA, PRIOR).diagonal()).diag())


def test_kron_drops_what_couples_weights_and_biases():
    network, batch, new = case()
    laplace = fitted(network, batch, "kron", prior_precision=PRIOR, sigma_noise=SIGMA)
    dense = precision(jacobian(network, *batch[:3]), SIGMA, PRIOR)
    is_bias = torch.arange(len(dense)) % laplace.layer.width == laplace.layer.width - 1
    check(laplace, new, dense.where(is_bias[:, None] == is_bias, 0).inverse())
    plain = fitted(make_network("strided"), make_batch(make_network("strided"), 4), "kron", also=["full"])
    torch.testing.assert_close(plain(*batch[:3]), plain.with_curvature("full")(*batch[:3]))


@pytest.mark.parametrize("rank", [5, 1000])
def test_lowrank_knows_the_leading_eigenvectors(rank):
    network, batch, new = case()
    laplace = fitted(network, batch, "lowrank", rank=rank, prior_precision=PRIOR, sigma_noise=SIGMA)
    data = precision(jacobian(network, *batch[:3]), SIGMA, 0.0)[: laplace.layer.width, : laplace.layer.width]
    values, vectors = torch.linalg.eigh(data)
    values[: max(0, len(values) - rank)] = 0
    known = torch.kron(torch.eye(2).double(), (vectors * values) @ vectors.T)
    dense = (known + PRIOR * torch.eye(len(known)).double()).inverse()
    check(laplace, new, dense)
    full = fitted(network, batch, prior_precision=PRIOR, sigma_noise=SIGMA)(*new[:3])[1]
    assert (laplace(*new[:3])[1] >= (1 - 1e-12) * full).all(), "what is not known must not narrow the posterior"
    noise = torch.eye(laplace.layer.width).double()[:, None].expand(-1, 2, -1)
    root = laplace.covariance().correlate(noise)[:, 0]
    torch.testing.assert_close(root.T @ root, dense[: len(root), : len(root)], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("published", [False, True])
def test_empirical_fisher_is_the_sum_of_squared_gradients(published):
    network, batch, new = case()
    laplace = fitted(network, batch, "ef", prior_precision=PRIOR, sigma_noise=SIGMA, published_ef=published)
    squares = sum(gradient.square() for gradient in gradients(network, batch))
    data = 2 * squares / SIGMA**2 if published else squares / SIGMA**4
    check(laplace, new, (1 / (data.flatten() + PRIOR)).diag())


def gradients(network, batch):
    """Gradient [C, K] of |target - output|^2 / -2 for each row, by backward passes."""
    layer = network.out[1]
    for row in range(len(batch.x)):
        one = [part[row : row + 1] for part in batch]
        loss = -0.5 * (one[3] - network(*one[:3])).square().sum()
        parts = torch.autograd.grad(loss, [layer.weight, layer.bias])
        yield torch.cat([parts[0].flatten(1), parts[1][:, None]], 1)


def test_isotropic_counts_draws_and_nothing_else():
    network, batch, new = case()
    laplace = fitted(network, batch, "isotropic", prior_precision=PRIOR, sigma_noise=SIGMA)
    size = 2 * laplace.layer.width
    check(laplace, new, torch.eye(size).double() / (PRIOR * (6 / SIGMA**2 + 1)))


def test_sandwich_clusters_gradients_by_image():
    network, batch, new = case()
    laplace = fitted(network, batch, "sandwich", draws=3, prior_precision=PRIOR, sigma_noise=SIGMA, visits=3)
    rows = torch.stack(list(gradients(network, batch)))
    images = rows.unflatten(0, (2, 3)).sum(1)
    bread = precision(jacobian(network, *batch[:3]), SIGMA, PRIOR).inverse()
    meat = torch.block_diag(*[images[:, c].T @ images[:, c] / SIGMA**4 for c in range(2)])
    check(laplace, new, bread @ meat @ bread)


def test_sandwich_is_the_spread_of_refits_on_other_images():
    """Draws of an image share a part of their noise: the sandwich gives the variance of least-squares fits over data
    sets, the posterior that counts draws as independent does not."""
    network, source = make_network(), torch.Generator().manual_seed(8)
    batches = []
    for seed in range(80):
        shared = make_batch(network, 4, seed=100 + seed)
        one = Observation(*[part.repeat_interleave(4, 0) for part in shared])
        own = torch.randn(one.target.shape, generator=source, dtype=torch.float64)
        batches.append(one._replace(target=one.target + 0.3 * own))
    laplace = LastLayerLaplace(network, curvature="sandwich", prior_precision=1e-6, visits=4)
    laplace.fit(batches, draws=4, also=["full"])
    optima = []
    for part in range(0, 80, 4):  # twenty data sets, refitted in closed form from their sums
        own = LastLayerLaplace(network, prior_precision=1e-6).fit(batches[part : part + 4], draws=4).fitted()
        optima.append(torch.linalg.solve(own.gram[0], own.cross[0].T))
    spread = torch.stack(optima).var(0).mean() / 20  # mean variance of a parameter, with 20 times the data
    full = laplace.with_curvature("full")
    full.optimize_sigma_noise()
    ratios = [float(each.covariance().root.square().sum(-1).mean() / spread) for each in (laplace, full)]
    # 20 refits of 56 correlated parameters: relative standard error near 0.1.
    assert 0.7 < ratios[0] < 1.4 and ratios[1] < 0.6, ratios


def test_draws_have_the_posterior_covariance():
    network, batch, _ = case()
    laplace = fitted(network, batch, prior_precision=PRIOR, sigma_noise=SIGMA)
    dense = precision(jacobian(network, *batch[:3]), SIGMA, PRIOR).inverse()
    noise = torch.eye(2 * laplace.layer.width).double().unflatten(1, (2, -1))
    root = laplace.covariance().correlate(noise).flatten(1)
    torch.testing.assert_close(root.T @ root, dense, rtol=1e-9, atol=1e-13)
    members = laplace.sample(4000, torch.Generator().manual_seed(3))
    assert set(members.overrides) == {"out.1.weight", "out.1.bias"}
    rows = torch.cat([members.overrides["out.1.weight"].flatten(2), members.overrides["out.1.bias"][..., None]], 2)
    assert torch.allclose(rows.flatten(1).var(0), dense.diagonal(), rtol=0.12)  # five standard errors of 4000 draws
    pairs = laplace.sample(6, torch.Generator().manual_seed(3), antithetic=True)
    torch.testing.assert_close(pairs.overrides["out.1.weight"].mean(0), network.out[1].weight.detach())
    with pytest.raises(ValueError, match="even number"):
        laplace.sample(3, torch.Generator(), antithetic=True)


def test_variance_is_that_of_sampled_weights_under_guidance():
    """Guided features give J = J_null + s (J_cond - J_null): one weight matrix serves both halves."""
    network, batch, new = case()
    laplace = fitted(network, batch, prior_precision=PRIOR, sigma_noise=SIGMA)
    null, scale = torch.full_like(new.cond, 3), 4.0
    mean, var = laplace(*new[:3], null=null, scale=scale)
    halves = [jacobian(network, new.x, new.t, cond) for cond in (null, new.cond)]
    covariance = precision(jacobian(network, *batch[:3]), SIGMA, PRIOR).inverse()
    torch.testing.assert_close(var, dense_variance(torch.lerp(*halves, scale), covariance, var.shape), **CLOSE)
    schedule, flow = FlowSchedule(), Target("velocity")
    u = new.t / 1000
    rescaled = [NetworkDenoiser(lambda x, t, c: network(x, 1000 * t, c), schedule, flow, new.cond), null]
    prediction = guided(*rescaled, scale)(new.x, u)
    # The denoiser gives the network float32 times.
    torch.testing.assert_close(mean, prediction.eps - prediction.x0, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="null condition"):
        laplace(*new[:3], scale=2.0)


def test_temperature_divides_the_precision_of_the_likelihood():
    network, batch, new = case()
    laplace = fitted(network, batch, prior_precision=PRIOR, sigma_noise=SIGMA, temperature=4.0)
    check(laplace, new, precision(jacobian(network, *batch[:3]), 2 * SIGMA, PRIOR).inverse())


def test_noise_levels_weigh_their_own_data():
    network, batch, new = case()
    sigmas = torch.tensor([0.3, 2.0], dtype=torch.float64)
    laplace = fitted(network, batch, time_edges=[500.0], sigma_noise=sigmas, prior_precision=PRIOR)
    level = (batch.t > 500).long()
    assert 0 < level.sum() < 6
    rows = jacobian(network, *batch[:3]) / sigmas[level][:, None, None, None]
    check(laplace, new, precision(rows, 1.0, PRIOR).inverse())
    assert laplace.state.noise_variance(batch.t).tolist() == sigmas[level].square().tolist()
    with pytest.raises(ValueError, match="time_edges"):
        laplace.with_curvature("sandwich")
    with pytest.raises(ValueError, match="time_edges"):
        laplace.fit([batch], also=["sandwich"])


def test_a_network_that_learns_its_variance_regresses_half_of_its_channels():
    network, batch, new = case()
    batch = batch._replace(target=batch.target[:, :1])
    laplace = fitted(network, batch, outputs=1, prior_precision=PRIOR)
    mean, var = laplace(*new[:3])
    both = fitted(network, make_batch(network, 6), prior_precision=PRIOR)(*new[:3])
    torch.testing.assert_close((mean, var), (both[0][:, :1], both[1][:, :1]))
    weights = laplace.sample(2, torch.Generator().manual_seed(0)).overrides["out.1.weight"]
    assert torch.equal(weights[0, 1], network.out[1].weight[1]) and not torch.equal(weights[0, 0], weights[1, 0])


def test_a_latent_diffusion_network_splits_and_takes_the_draws():
    network = tiny_model().double().network
    features, layer, name, _ = split_network(network)
    assert name == "model.diffusion_model.out.2"
    source = torch.Generator().manual_seed(1)
    x, t, labels = torch.randn(4, 1, 8, 8, generator=source).double(), torch.rand(4).double(), torch.arange(4)
    assert torch.equal(layer(features(x, t, labels)), network(x, t, labels))
    laplace = LastLayerLaplace(network, prior_precision=10.0)
    with torch.no_grad():
        laplace.fit([Observation(x, t, labels, network(x, t, labels))])
        members = MemberNetwork(network, laplace.sample(300, torch.Generator().manual_seed(2)))
        sampled = members(x[:1], t[:1], labels[:1]).var(0)
    ratio = sampled / laplace(x[:1], t[:1], labels[:1])[1]
    # Relative standard error of one pixel 0.08, of the mean of 64 correlated ones less.
    assert ratio.min() > 0.6 and ratio.max() < 1.5 and 0.8 < ratio.mean() < 1.2
    with pytest.raises(ValueError, match=r"last layer of ConditionedNetwork is 'model.diffusion_model.out.2'"):
        split_network(network, "model.diffusion_model.out.0")


def test_float32_variances_are_float64_ones_rounded():
    network, batch, new = case()
    exact = fitted(network, batch)(*new[:3])[1]
    single = [part.float() if part.is_floating_point() else part for part in batch]
    laplace = LastLayerLaplace(network.float()).fit([type(batch)(*single)])
    rounded = laplace(new.x.float(), new.t.float(), new.cond)[1]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["prior_precision", "sigma_noise", "temperature"])
def test_values_without_a_posterior_are_refused_with_the_reason(name, value):
    network = make_network()
    with pytest.raises(ValueError, match=f"{name} must be finite and above 0"):
        LastLayerLaplace(network, **{name: value})
    laplace = LastLayerLaplace(network)
    with pytest.raises(ValueError, match=r"improper|infinite|likelihood"):
        setattr(laplace, name, value)


def test_errors_say_what_is_wrong():
    network, batch, new = case()
    with pytest.raises(ValueError, match="curvature must be one of"):
        LastLayerLaplace(network, curvature="dense")
    with pytest.raises(ValueError, match="not fitted"):
        LastLayerLaplace(network)(*new[:3])
    with pytest.raises(ValueError, match="did not gather"):
        fitted(network, batch, "diag").with_curvature("full")(*new[:3])
    with pytest.raises(ValueError, match="part of an image"):
        fitted(network, batch, draws=4)
    with pytest.raises(ValueError, match="no batch"):
        LastLayerLaplace(network).fit([])
    with pytest.raises(ValueError, match="targets are"):
        LastLayerLaplace(network).fit([batch._replace(target=batch.target[:, :1])])
    with pytest.raises(ValueError, match="one group"):
        LastLayerLaplace(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)))
    with pytest.raises(ValueError, match="prior_mean must be"):
        LastLayerLaplace(network, prior_mean=torch.zeros(3))
    with pytest.raises(ValueError, match="must ascend"):
        LastLayerLaplace(network, time_edges=[3.0, 1.0])
