"""Laplace posterior of a network's last layer, in closed form."""

from ldm.laplace.bootstrap import Refits, bootstrap
from ldm.laplace.hessian_free import cached_features, hessian_free_covariance
from ldm.laplace.posterior import LastLayerLaplace
from ldm.laplace.statistics import Observation, Statistics
from ldm.laplace.storage import load_laplace, save_laplace

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
