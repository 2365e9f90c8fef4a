"""Posteriors beyond the last layer, against dense derivatives."""

import pytest
import torch
from torch.func import functional_call, jacrev

from ldm.benchmark.whole_network import find_evidence_precision, find_kronecker_factors, subset_fisher
from ldm.experiments.small_networks import SmallNetwork
from ldm.laplace import Observation
from ldm.util import generator


def make_rows(count, source):
    x = torch.randn(count, 1, 8, 8, generator=source)
    t = torch.rand(count, generator=source)
    return Observation(x, t, torch.arange(count) % 10, torch.randn(count, 1, 8, 8, generator=source))


def test_fisher_of_some_parameters_is_that_of_the_jacobian():
    network = SmallNetwork(width=4).initialise(generator("one")).requires_grad_(False)
    parameters = dict(network.named_parameters())
    chosen = torch.arange(0, 400, 40)
    row = make_rows(3, generator("rows"))
    many = [Observation(*(part.repeat_interleave(2000, 0) for part in row))]
    found = subset_fisher(network, parameters, chosen, iter(many), generator("z"))

    def outputs(own):
        return functional_call(network, own, tuple(row[:3])).flatten(1)

    jacobian = torch.cat([value.flatten(2) for value in jacrev(outputs)(parameters).values()], 2)[..., chosen].double()
    exact = torch.einsum("bop,boq->pq", jacobian, jacobian) / 3
    assert float((found - exact).norm() / exact.norm()) < 0.06


def test_precision_is_where_the_evidence_is_highest():
    values = torch.tensor([100.0, 10.0, 1.0, 0.01], dtype=torch.float64)
    found = find_evidence_precision(values, 2.0)
    grid = torch.logspace(-3, 3, 4001, dtype=torch.float64)
    evidence = 0.5 * (len(values) * grid.log() - 2.0 * grid - (values[:, None] + grid).log().sum(0))
    assert found == pytest.approx(float(grid[evidence.argmax()]), rel=0.01)


def test_kronecker_factors_have_the_trace_of_the_jacobian():
    pytest.importorskip("curvlinops", reason="the extra laplace is not installed")
    network = SmallNetwork(width=4).initialise(generator("one")).requires_grad_(False)
    row = make_rows(3, generator("rows"))
    many = [Observation(*(part.repeat_interleave(500, 0) for part in row))]
    factors = find_kronecker_factors(network, iter(many))

    def outputs(own):
        return functional_call(network, own, tuple(row[:3])).flatten(1)

    jacobian = jacrev(outputs)({name: network.get_parameter(name) for name in factors.values})
    for name, values in factors.values.items():
        exact = float(jacobian[name].double().square().sum()) / 3
        assert float(values.sum()) == pytest.approx(exact, rel=0.15, abs=1e-4), name
