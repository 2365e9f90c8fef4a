"""Variance of samples from the variance of weights, along the sampler."""

from ldm.uncertainty.propagation.decoded import decoded_draws, decoded_members, decoded_tangents
from ldm.uncertainty.propagation.fresh import (
    PredictiveDenoiser,
    bayesdiff,
    beginning,
)
from ldm.uncertainty.propagation.persistent import (
    Propagated,
    TangentDenoiser,
    VarianceStep,
    all_directions,
    sampled,
    sampled_steps,
    tangent_steps,
    tangents,
)
from ldm.uncertainty.propagation.redrawn import RedrawnDenoiser, redrawn_steps
from ldm.uncertainty.propagation.trajectory import path_weight, trajectory_integral, trajectory_steps

__all__ = [
    "PredictiveDenoiser",
    "Propagated",
    "RedrawnDenoiser",
    "TangentDenoiser",
    "VarianceStep",
    "all_directions",
    "bayesdiff",
    "beginning",
    "decoded_draws",
    "decoded_members",
    "decoded_tangents",
    "path_weight",
    "redrawn_steps",
    "sampled",
    "sampled_steps",
    "tangent_steps",
    "tangents",
    "trajectory_integral",
    "trajectory_steps",
]
