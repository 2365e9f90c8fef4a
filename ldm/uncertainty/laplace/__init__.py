"""Laplace posterior of a network's last layer, in closed form."""

from ldm.uncertainty.laplace.bootstrap import Refits, bootstrap
from ldm.uncertainty.laplace.hessian_free import cached_features, hessian_free_covariance
from ldm.uncertainty.laplace.posterior import LastLayerLaplace
from ldm.uncertainty.laplace.statistics import Observation, Statistics
from ldm.uncertainty.laplace.storage import load_laplace, save_laplace

__all__ = [
    "LastLayerLaplace",
    "Observation",
    "Refits",
    "Statistics",
    "bootstrap",
    "cached_features",
    "hessian_free_covariance",
    "load_laplace",
    "save_laplace",
]
