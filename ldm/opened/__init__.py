"""Models and ensembles opened for a script: weights, samples, and the walk to the branch."""

from ldm.opened.ensemble import OpenEnsemble, open_ensemble
from ldm.opened.model import OpenModel, build_model, load_weights, open_model

__all__ = ["OpenEnsemble", "OpenModel", "build_model", "load_weights", "open_ensemble", "open_model"]
