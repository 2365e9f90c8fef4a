"""Removals from a last layer's regression, two ways, against the closed form of ridge regression."""

import pytest
import torch

from ldm.experiments.head_removals import HeadRemovals
from ldm.experiments.small_networks import SmallNetwork, draw_noised, read_digits
from ldm.laplace import LastLayerLaplace
from ldm.util import generator

DRAWS, QUERY_DRAWS = 3, 2


@pytest.fixture(scope="module")
def head():
    images, labels = read_digits("train")
    network = SmallNetwork(width=8).initialise(generator("one")).eval().requires_grad_(False)
    each, asked = torch.arange(60).repeat_interleave(DRAWS), torch.arange(60, 64).repeat_interleave(QUERY_DRAWS)
    seen = draw_noised(images[each], labels[each], generator("seen"))
    laplace = LastLayerLaplace(network, visits=5.0, prior_precision=2.0, prior_mean=0.1, sigma_noise=0.7)
    laplace.fit([seen], draws=DRAWS)
    queries = draw_noised(images[asked], labels[asked], generator("queries"))
    return HeadRemovals.of(laplace, seen, queries, QUERY_DRAWS), seen, queries


@pytest.mark.parametrize("removed", [[7], [3, 4, 5, 20], list(range(0, 60, 2))])
def test_both_ways_are_ridge_regression_without_the_images(head, removed):
    removals, seen, queries = head
    network = removals.refit.laplace

    def ridge(positions):
        rows = torch.tensor([place * DRAWS + draw for place in positions for draw in range(DRAWS)])
        a = network.features(seen.x[rows], seen.t[rows], seen.cond[rows]).double()
        a = torch.cat([a, torch.ones(len(a), 1).double()], 1)
        weight = 5.0 / DRAWS / 0.7**2
        precision = weight * a.T @ a + 2.0 * torch.eye(a.shape[1]).double()
        w = torch.linalg.solve(precision, weight * a.T @ seen.target[rows].double() + 2.0 * 0.1)
        q = network.features(queries.x, queries.t, queries.cond).double()
        q = torch.cat([q, torch.ones(len(q), 1).double()], 1)
        loss = (q @ w - queries.target).square().mean(1)
        variance = ((q @ torch.linalg.inv(precision)) * q).sum(1)
        return q @ w, loss.unflatten(0, (-1, QUERY_DRAWS)).mean(1), variance.unflatten(0, (-1, QUERY_DRAWS)).mean(1)

    before, after = ridge(range(60)), ridge([place for place in range(60) if place not in removed])
    moved = (after[0] - before[0]).square().mean(1).unflatten(0, (-1, QUERY_DRAWS)).mean(1)
    for found in (removals.remove(removed), removals.fit_without(removed)):
        torch.testing.assert_close(found.loss, after[1] - before[1], rtol=1e-5, atol=1e-10)
        torch.testing.assert_close(found.mean, moved, rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(found.certainty, after[2] - before[2], rtol=1e-5, atol=1e-12)
