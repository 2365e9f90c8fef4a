"""Feature extractors by name: published networks, the project's own classifier, or any dotted target."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ldm.evaluation.features import ClassifierFeatures, Extractor, TargetFeatures
from ldm.evaluation.pretrained import ClipFeatures, InceptionFeatures

EXTRACTORS = ("inception", "clip", "classifier")


def make_extractor(
    name: str,
    weights: str | os.PathLike | None = None,
    params: Mapping[str, Any] | None = None,
    channels: int = 3,
) -> Extractor:
    """The extractor of a name.

    Args:
        name: "inception", "clip", "classifier", or a dotted target.
        weights: its file or folder; for inception and clip, the library's own download where not given.
        params: keywords of `ClipFeatures` or of a dotted target.
        channels: for a dotted target, what images it wants.

    Raises:
        ValueError: for an unknown name, a missing library or missing weights, with what to do.
    """
    if params and name in ("classifier", "inception"):
        raise ValueError(f"--features_params are of clip and of dotted targets: {name} takes none, leave them out")
    if channels != 3 and name in EXTRACTORS:
        raise ValueError(f"--channels is of dotted targets: {name} knows what images it takes, leave it out")
    if name == "classifier":
        if weights is None:
            raise ValueError("features 'classifier' need --weights, a file that `decu evaluate classifier` wrote")
        return ClassifierFeatures(weights)
    if name == "inception":
        return InceptionFeatures(weights)
    if name == "clip":
        return ClipFeatures(weights, **(params or {}))
    if not all(part.isidentifier() for part in name.split(".")) or "." not in name:
        raise ValueError(
            f"unknown features '{name}': expected {', '.join(EXTRACTORS)}, or a dotted target; a file of weights goes "
            "to --weights"
        )
    return TargetFeatures(name, params, weights, channels)
