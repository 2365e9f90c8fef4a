"""The closed forms against laplace-torch (extra `laplace`), which differentiates the last convolution as a network."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ldm.laplace import empirical_fisher
from tests.laplace.laplace_cases import fitted, make_batch, make_network

library = pytest.importorskip("laplace", reason="laplace-torch is not installed: see the extra `laplace` in pyproject")
curvature = pytest.importorskip("laplace.curvature")
CLOSE = {"rtol": 1e-10, "atol": 0}
PRIOR, SIGMA = 1.75, 0.625  # exact in float32, which the library keeps them in


def theirs(laplace, batch, structure, backend="BackPackGGN"):
    """laplace-torch's posterior of the last layer on our features, as a network of its own.

    The curvature is BackPACK's: curvlinops' (3.0.1, the library's default) is right to 3e-8 only.
    """
    network = nn.Sequential(laplace.layer.layer, nn.Flatten())
    features = laplace.features(*batch[:3]).detach()
    data = DataLoader(TensorDataset(features, batch.target.flatten(1)), batch_size=4)
    posterior = library.Laplace(
        network,
        "regression",
        subset_of_weights="all",
        hessian_structure=structure,
        prior_precision=PRIOR,
        sigma_noise=SIGMA,
        backend=getattr(curvature, backend),
    )
    posterior.fit(data)
    return posterior


def case(structure):
    network = make_network()
    batch, new = make_batch(network, 6), make_batch(network, 3, seed=2)
    laplace = fitted(network, batch, structure, prior_precision=PRIOR, sigma_noise=SIGMA)
    return laplace, batch, new


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_predictive_law_and_evidence(structure):
    laplace, batch, new = case(structure)
    other = theirs(laplace, batch, structure)
    features = laplace.features(*new[:3]).detach()
    mean, covariance = other(features, pred_type="glm")
    ours, variance = laplace(*new[:3])
    torch.testing.assert_close(ours.flatten(1), mean, **CLOSE)
    torch.testing.assert_close(variance.flatten(1), covariance.diagonal(dim1=1, dim2=2), **CLOSE)
    found = laplace.log_marginal_likelihood()
    torch.testing.assert_close(found, float(other.log_marginal_likelihood()), rtol=1e-10, atol=0)


def test_the_published_fisher_is_backpacks():
    """BayesDiff's curvature: twice the sum of squared gradients, whatever sigma is."""
    laplace, batch, _ = case("ef")
    laplace.published_ef = True
    other = theirs(laplace, batch, "diag", "BackPackEF")
    ours = empirical_fisher(laplace.state) * SIGMA**2  # [C, K (+ 1)]
    flat = torch.cat([ours[:, :-1].flatten(), ours[:, -1]])
    torch.testing.assert_close(flat, other.H, **CLOSE)


def test_draws_have_the_librarys_covariance():
    laplace, batch, _ = case("full")
    other = theirs(laplace, batch, "full")
    units = torch.eye(laplace.layer.outputs * laplace.layer.width, dtype=torch.float64)
    root = laplace.covariance().correlate(units.unflatten(1, (laplace.layer.outputs, -1)))  # [C K, C, K]
    ordered = torch.cat([root[..., :-1].flatten(1), root[..., -1]], 1)
    torch.testing.assert_close(ordered.T @ ordered, other.posterior_covariance, rtol=1e-10, atol=1e-13)
