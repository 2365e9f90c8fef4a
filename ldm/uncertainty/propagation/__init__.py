"""Variance of samples from the variance of weights, along the sampler."""

from ldm.uncertainty.propagation.persistent import Propagated, TangentDenoiser, all_directions, sampled, tangents

__all__ = ["Propagated", "TangentDenoiser", "all_directions", "sampled", "tangents"]
