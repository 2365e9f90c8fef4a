"""Models and ensembles, loaded: weights, samples, and the walk to the branch."""

from ldm.pipelines.ensemble import EnsemblePipeline, open_ensemble
from ldm.pipelines.laplace import chosen_positions, new_posterior, observations, open_posterior
from ldm.pipelines.model import ModelPipeline, build_model, load_weights, open_model
from ldm.pipelines.posterior import METHODS, SAMPLED, PosteriorPipeline, describe_walks, open_walks

__all__ = [
    "METHODS",
    "SAMPLED",
    "EnsemblePipeline",
    "ModelPipeline",
    "PosteriorPipeline",
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
