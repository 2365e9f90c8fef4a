"""Where does a diffusion model not know? The door to models, ensembles and posteriors.

    from ldm import load_ensemble, Branching, Sampling

    ensemble = load_ensemble("logs/bootstrapped_digits_5", Sampling(steps=50))
    info = ensemble.information(classes=[3, 8], n=16, branching=Branching(at=0.0))
    print(info.mean)                                       # nats, one number a class

Three loaders (`load_model`, `load_ensemble`, `load_posterior`) give three pipelines (`ModelPipeline`,
`EnsemblePipeline`, `PosteriorPipeline`), and four values (`Sampling`, `Branching`, `Speed`, `Training`) say how they
are used. Importing this package imports neither torch nor a pipeline before one is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ldm.settings import Branching, Sampling, Speed, Training

if TYPE_CHECKING:
    from ldm.pipelines import EnsemblePipeline as EnsemblePipeline
    from ldm.pipelines import ModelPipeline as ModelPipeline
    from ldm.pipelines import PosteriorPipeline as PosteriorPipeline
    from ldm.pipelines import load_ensemble as load_ensemble
    from ldm.pipelines import load_model as load_model
    from ldm.pipelines import load_posterior as load_posterior
    from ldm.stats import Interval as Interval
    from ldm.uncertainty.results import Information as Information

# Imported when they are asked for, since they import torch.
_LAZY = {
    "EnsemblePipeline": "ldm.pipelines",
    "Information": "ldm.uncertainty.results",
    "Interval": "ldm.stats",
    "ModelPipeline": "ldm.pipelines",
    "PosteriorPipeline": "ldm.pipelines",
    "load_ensemble": "ldm.pipelines",
    "load_model": "ldm.pipelines",
    "load_posterior": "ldm.pipelines",
}

__all__ = ["Branching", "Sampling", "Speed", "Training", *sorted(_LAZY)]

# The one place of the version: pyproject.toml reads it here.
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ldm' has no attribute '{name}'; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
