"""Hessian-free Laplace against the dense posterior, against the published algorithm by autograd, and its own limits."""

import pytest
import torch
from torch.func import functional_call

from ldm.laplace import LastLayerLaplace, cache_layer_inputs, data_gram, hessian_free_covariance
from tests.laplace.laplace_cases import LAYERS, fitted, jacobian, make_batch, make_network, precision

PRIOR, SIGMA = 1.3, 0.7


def setting(kind="convolution"):
    network = make_network(kind)
    batch, new = make_batch(network, 6), make_batch(network, 2, seed=2)
    laplace = fitted(network, batch, prior_precision=PRIOR, sigma_noise=SIGMA)
    with torch.no_grad():
        return network, batch, new, laplace, cache_layer_inputs(laplace, [batch]), laplace.features(*new[:3])


def pixel(shape, position):
    one = torch.zeros(1, *shape, dtype=torch.float64)
    one.flatten()[position] = 1
    return one


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_exact_laplace_variance_for_every_strength(kind, strength):
    _, _, new, laplace, data, features = setting(kind)
    mean, var = laplace(*new[:3])
    found = hessian_free_covariance(laplace, data, features, pixel(mean.shape[1:], 4), strength=strength)
    torch.testing.assert_close(found[0].flatten(1)[:, 4], var.flatten(1)[:, 4], rtol=1e-9, atol=0)


def test_a_sum_gives_covariances_with_it():
    network, batch, new, laplace, data, features = setting()
    mean, _ = laplace(*new[:3])
    found = hessian_free_covariance(laplace, data, features, torch.ones(1, *mean.shape[1:], dtype=torch.float64))
    covariance = precision(jacobian(network, *batch[:3]), SIGMA, PRIOR).inverse()
    own = jacobian(network, *new[:3]).flatten(2)
    expected = torch.einsum("bpk,kl,bql->bpq", own, covariance, own).sum(-1)
    torch.testing.assert_close(found[0].flatten(1), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_the_published_algorithm_arrives_there():
    """Gradient ascent of log posterior + strength f(x) from the trained weights, autograd's gradients (McInerney)."""
    network, batch, new, laplace, data, features = setting("strided")
    mean, _ = laplace(*new[:3])
    target, position, strength = network(*batch[:3]).detach(), 3, 0.5
    own = {"out.1.weight": network.out[1].weight.detach().clone().requires_grad_()}
    start = own["out.1.weight"].detach().clone()

    def objective():
        misfit = (functional_call(network, own, batch[:3]) - target).square().sum() / (2 * SIGMA**2)
        prior = PRIOR / 2 * (own["out.1.weight"] - start).square().sum()
        return -misfit - prior + strength * functional_call(network, own, new[:3])[0].flatten()[position]

    largest = float(data_gram(laplace.state).norm()) + PRIOR
    for _ in range(4000):
        (gradient,) = torch.autograd.grad(objective(), [own["out.1.weight"]])
        with torch.no_grad():
            own["out.1.weight"] += gradient / largest
    moved = functional_call(network, own, new[:3])[0].flatten()[position] - mean[0].flatten()[position]
    found = hessian_free_covariance(laplace, data, features, pixel(mean.shape[1:], position))
    torch.testing.assert_close((moved / strength).detach(), found[0, 0].flatten()[position], rtol=1e-6, atol=0)


def test_data_sizes_and_noise_levels_count():
    network = make_network()
    batch, new = make_batch(network, 6), make_batch(network, 2, seed=2)
    options = {"prior_precision": PRIOR, "sigma_noise": [0.5, 0.9], "time_edges": [500.0]}
    laplace = LastLayerLaplace(network, "out.1", **options).fit([batch], draws=2, data_size=30)
    features = laplace.features(*new[:3]).detach()
    mean, var = laplace(*new[:3])
    data, one = cache_layer_inputs(laplace, [batch]), pixel(mean.shape[1:], 7)
    found = hessian_free_covariance(laplace, data, features, one)
    torch.testing.assert_close(found[0].flatten(1)[:, 7], var.flatten(1)[:, 7], rtol=1e-9, atol=0)
    torch.testing.assert_close(hessian_free_covariance(laplace, data, features, one, data_size=30), found)


def test_errors_say_what_is_wrong():
    _, _, new, laplace, data, features = setting()
    one = pixel(laplace(*new[:3])[0].shape[1:], 0)
    with pytest.raises(ValueError, match="above 0"):
        hessian_free_covariance(laplace, data, features, one, strength=0)
    with pytest.raises(ValueError, match="not converged"):
        hessian_free_covariance(laplace, data, features, one, steps=2)
