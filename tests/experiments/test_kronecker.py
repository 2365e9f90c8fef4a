"""Kronecker factors against the Hessian by automatic differentiation, where they are exact."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from ldm.experiments.kronecker import DAMPING, gather_factors, influence, layer_gradients
from ldm.experiments.small_networks import SmallNetwork
from ldm.laplace import Observation
from ldm.util import generator


class Linears(nn.Module):
    """Outputs are linear in every layer, so that with squared errors the blocks of its Hessian are Gauss-Newton's."""

    def __init__(self):
        super().__init__()
        self.first, self.labels, self.out = nn.Linear(5, 4), nn.Embedding(3, 4), nn.Linear(4, 6, bias=False)

    def forward(self, x, t, cond):
        return self.out(self.first(x) + self.labels(cond)) + t[:, None]


def draw(parameters, source):
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=source, dtype=torch.float64))


def make_rows(count, inputs, outputs, classes, key):
    source = generator("rows", key)
    x, target = (torch.randn(count, size, generator=source, dtype=torch.float64) for size in (inputs, outputs))
    return Observation(
        x,
        torch.rand(count, generator=source, dtype=torch.float64),
        torch.randint(classes, (count,), generator=source),
        target,
    )


def gradients_of(network, rows):
    """{parameter: [N, ...]} of the loss of every row."""

    def loss(own, *row):
        x, t, cond, target = (part[None] for part in row)
        return (functional_call(network, own, (x, t, cond)) - target).square().mean()

    return vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(dict(network.named_parameters()), *rows)


def hessian_of(network, name, rows):
    """The Hessian of the mean loss in a layer's [weight, bias], a matrix over its O (K + 1) entries, row by row."""
    layer = network.get_submodule(name)
    embedding = isinstance(layer, nn.Embedding)
    start = layer.weight.mT if embedding else layer.weight
    if getattr(layer, "bias", None) is not None:
        start = torch.cat([start, layer.bias[:, None]], 1)

    def loss(matrix):
        matrix = matrix.unflatten(0, start.shape)
        own = {f"{name}.weight": matrix.mT if embedding else matrix[:, : layer.weight.shape[1]]}
        if matrix.shape != own[f"{name}.weight"].shape and not embedding:
            own[f"{name}.bias"] = matrix[:, -1]
        return (functional_call(network, own, rows[:3]) - rows.target).square().mean()

    return torch.autograd.functional.hessian(loss, start.detach().flatten())


@pytest.mark.parametrize("name", ["first", "labels", "out"])
def test_factors_of_a_linear_network_are_its_hessian(name):
    network = Linears().double()
    draw(network.parameters(), generator("linears"))
    rows = make_rows(40, 5, 6, 3, 0)
    found = gather_factors(network, [Observation(*(part[:25] for part in rows)), Observation(*(p[25:] for p in rows))])
    expected = hessian_of(network, name, rows)
    torch.testing.assert_close(torch.kron(found[name].outputs, found[name].inputs), expected)


def test_the_last_layer_of_a_curved_network_is_exact_and_the_others_are_not():
    network = SmallNetwork(width=6, pixels=4).double()
    draw(network.parameters(), generator("curved"))
    rows = make_rows(30, 4, 4, 10, 1)
    found = gather_factors(network, [rows])
    assert set(found) == {"labels", "times", "first", "blocks.0", "blocks.1", "conditions.0", "conditions.1", "out.1"}
    last = torch.kron(found["out.1"].outputs, found["out.1"].inputs)
    torch.testing.assert_close(last, hessian_of(network, "out.1", rows))
    block = torch.kron(found["blocks.0"].outputs, found["blocks.0"].inputs)
    assert not torch.allclose(block, hessian_of(network, "blocks.0", rows), rtol=0.1)


def test_influence_is_that_of_the_dense_damped_hessian():
    network = Linears().double()
    draw(network.parameters(), generator("linears"))
    rows, queries = make_rows(12, 5, 6, 3, 2), make_rows(4, 5, 6, 3, 3)
    factors = gather_factors(network, [rows])
    own, asked = (layer_gradients(network, gradients_of(network, part)) for part in (rows, queries))
    total = 0
    for name in ("first", "labels", "out"):
        hessian = hessian_of(network, name, rows)
        damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
        each = own[name].flatten(1) @ torch.linalg.solve(damped, asked[name].flatten(1).T) / 12
        torch.testing.assert_close(influence(factors, own, asked, [name]), each)
        total = total + each
    torch.testing.assert_close(influence(factors, own, asked), total)


def test_a_layer_of_several_positions_and_no_batch_are_refused():
    network = nn.Sequential(nn.Linear(3, 3))
    network.forward = lambda x, t, cond: network[0](x)
    with pytest.raises(ValueError, match="one vector a row"):
        gather_factors(network, [Observation(torch.zeros(2, 4, 3), torch.zeros(2), None, torch.zeros(2, 4, 3))])
    with pytest.raises(ValueError, match="no batch"):
        gather_factors(network, [])
