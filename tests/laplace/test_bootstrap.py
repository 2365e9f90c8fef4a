"""Refits of the last layer against ridge regression on the drawn images, and their spread against the sandwich."""

import pytest
import torch

from ldm.laplace import LastLayerLaplace, bootstrap_refits
from tests.laplace.laplace_cases import LAYERS, fitted, make_batch, make_network

PRIOR, SIGMA, DRAWS, IMAGES = 0.8, 0.6, 2, 9


def ridge(laplace, batch, weights):
    """argmin sum w |target - W a|^2 / sigma^2 + prior |W|^2 by stacking weighted rows."""
    layer = laplace.layer
    with torch.no_grad():
        rows = weights.repeat_interleave(DRAWS).sqrt()[:, None, None] / SIGMA
        patches = (layer.patches(laplace.features(*batch[:3])) * rows).flatten(0, 1)
        targets = (layer.by_position(batch.target) * rows).flatten(0, 1)
    left = torch.cat([patches, PRIOR**0.5 * torch.eye(layer.width).double()])
    right = torch.cat([targets, torch.zeros(layer.width, targets.shape[1]).double()])
    return torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize("kind", LAYERS)
def test_refits_are_weighted_ridge_regressions(kind):
    network = make_network(kind)
    batch = make_batch(network, DRAWS * IMAGES)
    laplace = LastLayerLaplace(network, "out.1", prior_precision=PRIOR, sigma_noise=SIGMA, visits=DRAWS)
    parts = [type(batch)(*[part[rows] for part in batch]) for rows in (slice(0, 8), slice(8, None))]
    refits = bootstrap_refits(
        laplace, parts, images=IMAGES, draws=DRAWS, count=3, source=torch.Generator().manual_seed(4)
    )
    drawn = torch.randint(IMAGES, (3, IMAGES), generator=torch.Generator().manual_seed(4))
    for chosen, matrix in zip(drawn, refits.matrices, strict=True):
        expected = ridge(laplace, batch, chosen.bincount(minlength=IMAGES).double())
        torch.testing.assert_close(matrix, expected, rtol=1e-8, atol=1e-10)
    new = make_batch(network, 3, seed=2)
    features = laplace.features(*new[:3]).detach()
    outputs = torch.stack([laplace.layer.apply(matrix, features) for matrix in refits.matrices])
    torch.testing.assert_close(refits.variance(features), outputs.var(0))
    member = {name.removeprefix("out.1."): value for name, value in refits.members().overrides.items()}
    assert member["weight"].shape[0] == 3


@pytest.mark.parametrize("size", [300, 1200])
def test_the_spread_of_many_refits_is_the_sandwich(size):
    """To first order in 1 / images, at the regression's optimum, with hardly any prior, for any size of the data set.

    A bootstrap draws as many images as the data set has of those seen.
    """
    network = make_network("strided")
    batch = make_batch(network, 2 * 300)
    first = LastLayerLaplace(network, "out.1", prior_precision=1e-6, sigma_noise=SIGMA)
    optimum = ridge_of_all(first, batch)
    with torch.no_grad():
        network.out[1].weight.copy_(optimum.reshape(network.out[1].weight.shape))
    options = {"prior_precision": 1e-6, "sigma_noise": SIGMA, "visits": 2}
    sandwich = fitted(network, batch, "sandwich", draws=2, data_size=size, **options)
    source = torch.Generator().manual_seed(0)
    refits = bootstrap_refits(sandwich, [batch], images=300, draws=2, count=400, source=source)
    new = make_batch(network, 5, seed=2)
    ratio = refits.variance(sandwich.features(*new[:3]).detach()) / sandwich(*new[:3])[1]
    assert float((ratio.mean() - 1).abs()) < 0.1  # relative error sqrt(2 / 400) = 0.07 a value, and 1 / images


def ridge_of_all(laplace, batch):
    with torch.no_grad():
        patches = laplace.layer.patches(laplace.features(*batch[:3])).flatten(0, 1)
        return torch.linalg.lstsq(patches, laplace.layer.by_position(batch.target).flatten(0, 1)).solution.T


def test_errors_say_what_is_wrong():
    network = make_network()
    laplace, batch = LastLayerLaplace(network, "out.1"), make_batch(network, 4)
    source = torch.Generator()
    for images, message in ((1, "more images"), (3, "the batches hold 2")):
        with pytest.raises(ValueError, match=message):
            bootstrap_refits(laplace, [batch], images=images, draws=2, source=source)
    with pytest.raises(ValueError, match="at least two"):
        bootstrap_refits(laplace, [batch], images=2, draws=2, count=1, source=source)
