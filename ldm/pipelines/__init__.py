"""Pipelines: what is loaded from files, with the values that say how it is sampled."""

from ldm.pipelines.base import Defaults
from ldm.pipelines.building import build_model, load_weights
from ldm.pipelines.ensemble import EnsemblePipeline
from ldm.pipelines.information import InformationPlan
from ldm.pipelines.laplace import chosen_positions, new_posterior, observations
from ldm.pipelines.loading import load_ensemble, load_model, load_posterior
from ldm.pipelines.model import ModelPipeline
from ldm.pipelines.posterior import METHODS, SAMPLED, PosteriorPipeline

__all__ = [
    "METHODS",
    "SAMPLED",
    "Defaults",
    "EnsemblePipeline",
    "InformationPlan",
    "ModelPipeline",
    "PosteriorPipeline",
    "build_model",
    "chosen_positions",
    "load_ensemble",
    "load_model",
    "load_posterior",
    "load_weights",
    "new_posterior",
    "observations",
]
