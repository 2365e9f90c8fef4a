"""Plain values: how samples are drawn, where members branch, how fast the network runs, what a training is.

A pipeline holds these values, and a command shows their fields as options: of the same names, unless `option` gives
the name that DECU's scripts had. Nothing here imports torch, so that a command's help answers at once.
"""

from ldm.settings.guidance import ClassifierGuidance, Guidance, Steering
from ldm.settings.names import SamplerName, Spacing
from ldm.settings.sampling import (
    Branching,
    FeatureReading,
    Precision,
    Sampling,
    Scaling,
    Speed,
    Variance,
)
from ldm.settings.training import KEPT_FIELDS, Training

__all__ = [
    "KEPT_FIELDS",
    "Branching",
    "ClassifierGuidance",
    "FeatureReading",
    "Guidance",
    "Precision",
    "SamplerName",
    "Sampling",
    "Scaling",
    "Spacing",
    "Speed",
    "Steering",
    "Training",
    "Variance",
]
