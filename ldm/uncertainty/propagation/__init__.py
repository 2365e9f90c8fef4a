"""Variance of samples from the variance of weights, along the sampler."""

from ldm.uncertainty.propagation.fresh import PredictiveDenoiser, VarianceStep, bayesdiff, beginning, path_integral
from ldm.uncertainty.propagation.persistent import Propagated, TangentDenoiser, all_directions, sampled, tangents

__all__ = [
    "PredictiveDenoiser",
    "Propagated",
    "TangentDenoiser",
    "VarianceStep",
    "all_directions",
    "bayesdiff",
    "beginning",
    "path_integral",
    "sampled",
    "tangents",
]
