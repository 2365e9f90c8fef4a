"""The functions on values give what the class gives, states are values, and any module splits at its last layer."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

from ldm.laplace import (
    CURVATURES,
    LaplaceState,
    LastLayer,
    LastLayerLaplace,
    evidence,
    find_precision_by_evidence,
    find_precision_by_held_out,
    find_residual_sigma,
    fit_state,
    make_covariance,
    merge_states,
    predict_output,
    sample_parameters,
    split_network,
)
from ldm.laplace.state import CURVATURE_SUMS
from ldm.modules.low_rank import add_factors
from tests.laplace.laplace_cases import LAYERS, fitted, make_batch, make_network


def make_state(network, **values):
    """An unfitted state of the network, with its two pieces."""
    split = split_network(network, "out.1")
    layer = LastLayer.from_module(split.layer)
    return LaplaceState(split.name, layer.matrix(), layer.bias, **values), split.features, layer


@pytest.mark.parametrize("curvature", CURVATURES)
def test_functions_give_what_the_class_gives(curvature):
    network = make_network()
    batch, new = make_batch(network, 6), make_batch(network, 3, seed=2)
    own = {"prior_precision": 1.7, "sigma_noise": 0.6, "rank": 7}
    laplace = fitted(network, batch, curvature, draws=2, data_size=9, **own)
    state, features, layer = make_state(network, curvature=curvature, **own)
    state = fit_state(state, features, layer, [batch], draws=2, data_size=9)
    covariance = make_covariance(state)
    with torch.no_grad():
        law = predict_output(layer, covariance, features(*new[:3]))
    assert torch.equal(law.mean, laplace(*new[:3]).mean)
    assert torch.equal(law.variance, laplace(*new[:3]).variance)
    source = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = laplace.members(sample_parameters(state.mean, covariance, 4, source[0]))
    for name, value in laplace.sample(4, source[1]).overrides.items():
        assert torch.equal(drawn.overrides[name], value)
    assert torch.equal(find_residual_sigma(state), laplace.optimize_sigma_noise())
    state = replace(state, sigma_noise=find_residual_sigma(state))
    held_out = {"low": 1e-2, "high": 1e3, "steps": 6}
    found = find_precision_by_held_out(state, features, layer, [new], **held_out)
    assert found == laplace.optimize_prior_precision("gridsearch", batches=[new], **held_out)
    if curvature != "isotropic":
        assert find_precision_by_evidence(state) == laplace.optimize_prior_precision()
        precisions = torch.tensor([0.3, 3.0], dtype=torch.float64)
        expected = [laplace.log_marginal_likelihood(each) for each in precisions.tolist()]
        assert evidence(state, precisions).tolist() == expected


def test_states_are_values():
    """Nothing changes a state: fits, merges and other hyperparameters are new ones that share what stays."""
    network = make_network()
    batch = make_batch(network, 4)
    empty, features, layer = make_state(network)
    state = fit_state(empty, features, layer, [batch])
    assert empty.sums is None and state.sums is not None
    before = {name: value.clone() for name, value in state.tensors().items()}
    other = replace(state, prior_precision=3.0)
    assert other.sums is state.sums and other.prior_precision == 3.0 and state.prior_precision == 1.0
    both = merge_states(state, other)
    assert int(both.fitted().images) == 8 and both.data_size == 8
    for name, value in state.tensors().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(FrozenInstanceError):
        state.prior_precision = 2.0
    with pytest.raises(ValueError, match="prior_precision must be finite and above 0"):
        replace(state, prior_precision=0.0)
    with pytest.raises(ValueError, match="curvature must be one of"):
        replace(state, curvature="dense")
    with pytest.raises(ValueError, match="one for each of 2 levels"):
        replace(empty, time_edges=(500.0,), sigma_noise=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="fit again with other time_edges"):
        replace(state, time_edges=(500.0,))
    with pytest.raises(ValueError, match="not fitted"):
        make_covariance(empty)


def test_a_covariance_is_factorised_once_for_a_state():
    network = make_network()
    laplace = fitted(network, make_batch(network, 4))
    first = laplace.covariance()
    assert laplace.covariance() is first
    for name in ("prior_precision", "sigma_noise", "temperature"):
        setattr(laplace, name, 2.0)
        assert laplace.covariance() is not first, name
        first = laplace.covariance()
    assert laplace.with_curvature("full").covariance() is not first, "another state"
    assert laplace.covariance() is first


def test_every_curvature_says_what_its_fit_gathers():
    assert set(CURVATURES) == set(CURVATURE_SUMS)
    names = set().union(*CURVATURE_SUMS.values())
    network = make_network()
    assert names <= set(fitted(network, make_batch(network, 2), "sandwich").fitted().tensors())


class Plain(nn.Module):
    """A network that names none of its parts: its last layer is registered first."""

    def __init__(self, inner, after=None):
        super().__init__()
        self.final, self.inner, self.after = inner.out[1], inner, after

    def forward(self, x, t, cond):
        output = self.final(torch.tanh(self.inner.backbone(x, t, cond)))
        return output if self.after is None else self.after(output)


@pytest.mark.parametrize("kind", LAYERS)
def test_any_module_splits_at_its_last_layer(kind):
    network = make_network(kind)
    batch, new = make_batch(network, 4), make_batch(network, 3, seed=2)
    plain = Plain(network)
    features, layer, name, _ = split_network(plain, "final")
    assert name == "final" and torch.equal(layer(features(*new[:3])), plain(*new[:3]))
    assert not layer._forward_hooks, "hooks are there during a call only"
    own, known = LastLayerLaplace(plain, "final").fit([batch]), fitted(network, batch)
    assert torch.equal(own(*new[:3]).variance, known(*new[:3]).variance)
    assert set(own.sample(2, torch.Generator().manual_seed(0)).overrides) <= {"final.weight", "final.bias"}


def test_what_is_no_last_layer_is_refused():
    network = make_network()
    arguments = make_batch(network, 2)[:3]
    with pytest.raises(ValueError, match="not the last layer of Plain: it ran 1 times"):
        split_network(Plain(network), "inner.first").features(*arguments)
    with pytest.raises(ValueError, match="not the last layer of Plain"):
        split_network(Plain(network, torch.tanh), "final").features(*arguments)
    with pytest.raises(ValueError, match="not the last layer of Plain"):
        split_network(Plain(network, lambda output: {"sample": output}), "final").features(*arguments)
    with pytest.raises(ValueError, match="has no layer 'head'"):
        split_network(Plain(network), "head")
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        split_network(nn.Embedding(3, 3))
    adapted = nn.Sequential(nn.Linear(3, 2))
    add_factors(adapted, ["0"], 1)
    with pytest.raises(ValueError, match="low-rank factors beside its weight"):
        LastLayer.from_module(adapted[0])
    with pytest.raises(ValueError, match="must be Conv2d or Linear, got Embedding"):
        LastLayer.from_module(nn.Embedding(3, 3))
