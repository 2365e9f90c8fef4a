"""Laplace posterior of a network's last layer, in closed form.

`LastLayerLaplace` is the posterior of a network, with the names of laplace-torch. Below it are
values and functions: a `LaplaceState` is fitted (`fit_state`, `merge_states`), factorised
(`make_covariance`), asked (`predict_output`, `sample_parameters`, `evidence`) and tuned
(`find_precision_by_evidence`, `find_precision_by_held_out`, `find_residual_sigma`,
`find_temperature`, taken up by `dataclasses.replace`).

    split = split_network(network)
    layer = LastLayer.from_module(split.layer)
    state = LaplaceState(split.name, layer.matrix(), layer.bias, sigma_noise=0.3)
    state = fit_state(state, split.features, layer, batches)
    state = replace(state, prior_precision=find_precision_by_evidence(state))
    law = predict_output(layer, make_covariance(state), split.features(x, t, cond))
"""

from ldm.laplace.covariance import Covariance, OutputLaw, predict_output, sample_parameters
from ldm.laplace.curvature import CURVATURES, data_gram, data_spectrum, empirical_fisher, make_covariance
from ldm.laplace.fit import Observation, fit_state, merge_states
from ldm.laplace.layer import LastLayer
from ldm.laplace.posterior import LastLayerLaplace
from ldm.laplace.refit import Refits, bootstrap_refits, cache_layer_inputs, hessian_free_covariance
from ldm.laplace.split import SplitNetwork, split_network
from ldm.laplace.state import LaplaceState, LaplaceSums
from ldm.laplace.storage import load_laplace, save_laplace
from ldm.laplace.tune import (
    TUNERS,
    evidence,
    find_precision_by_evidence,
    find_precision_by_held_out,
    find_residual_sigma,
    find_temperature,
    mean_variance,
)

__all__ = [
    "CURVATURES",
    "TUNERS",
    "Covariance",
    "LaplaceState",
    "LaplaceSums",
    "LastLayer",
    "LastLayerLaplace",
    "Observation",
    "OutputLaw",
    "Refits",
    "SplitNetwork",
    "bootstrap_refits",
    "cache_layer_inputs",
    "data_gram",
    "data_spectrum",
    "empirical_fisher",
    "evidence",
    "find_precision_by_evidence",
    "find_precision_by_held_out",
    "find_residual_sigma",
    "find_temperature",
    "fit_state",
    "hessian_free_covariance",
    "load_laplace",
    "make_covariance",
    "mean_variance",
    "merge_states",
    "predict_output",
    "sample_parameters",
    "save_laplace",
    "split_network",
]
