"""Variance of samples from the variance of weights, along the sampler."""

from ldm.uncertainty.propagation.decoded import decoded_draws, decoded_members, decoded_tangents
from ldm.uncertainty.propagation.fresh import (
    PredictiveDenoiser,
    bayesdiff,
    beginning,
    trajectory_integral,
    trajectory_steps,
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

__all__ = [
    "PredictiveDenoiser",
    "Propagated",
    "TangentDenoiser",
    "VarianceStep",
    "all_directions",
    "bayesdiff",
    "beginning",
    "decoded_draws",
    "decoded_members",
    "decoded_tangents",
    "sampled",
    "sampled_steps",
    "tangent_steps",
    "tangents",
    "trajectory_integral",
    "trajectory_steps",
]
