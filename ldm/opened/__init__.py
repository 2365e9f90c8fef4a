"""Models and ensembles opened for a script: weights, samples, and the walk to the branch."""

from ldm.opened.ensemble import OpenEnsemble, open_ensemble
from ldm.opened.laplace import chosen_positions, new_posterior, observations, open_posterior
from ldm.opened.model import OpenModel, build_model, load_weights, open_model
from ldm.opened.variance import METHODS, SAMPLED, OpenPosterior, describe_walks, open_walks

__all__ = [
    "METHODS",
    "SAMPLED",
    "OpenEnsemble",
    "OpenModel",
    "OpenPosterior",
    "build_model",
    "chosen_positions",
    "describe_walks",
    "load_weights",
    "new_posterior",
    "observations",
    "open_ensemble",
    "open_model",
    "open_posterior",
    "open_walks",
]
