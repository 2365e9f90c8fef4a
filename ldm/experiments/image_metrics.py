"""Features of images that are compared: the network that gives them, the reference, metrics under distortion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.evaluation.distortions import Distortion, distort
from ldm.evaluation.extraction import FeatureSet, ImageSet, extract, is_feature_folder, open_features
from ldm.evaluation.extractors import make_extractor
from ldm.evaluation.features import Extractor
from ldm.evaluation.metrics import METRICS, MetricRow, Options, Reference, measure, obstacle
from ldm.evaluation.statistics import load_statistics
from ldm.jobs import shard_from_environment
from ldm.pipelines.images import load_images
from ldm.util import ImageSize


@dataclass(frozen=True)
class Extraction:
    """How the features of images are extracted: by which network, where, and how many images at once.

    `seed` is that of the distortions.
    """

    extractor: Extractor
    device: torch.device
    batch_size: int = 100
    seed: int = 0

    def read(self, images: ImageSet, folder: Path, distortion: Distortion | None = None) -> FeatureSet | None:
        """Return the features of images, distorted first where asked; what `folder` holds already is not made again.

        Processes of one job share the images: None where others still work.
        """
        more: dict[str, Any] = {}
        if distortion is not None:
            more["change"] = partial(distort, name=distortion.name, strength=distortion.strength, seed=self.seed)
            more["change_settings"] = {
                "distortion": distortion.name,
                "strength": distortion.strength,
                "seed": self.seed,
            }
        with tqdm(total=len(images), desc=str(folder), unit="image") as bar:
            return extract(
                images,
                self.extractor.to(self.device),
                folder,
                batch_size=self.batch_size,
                device=self.device,
                shard=shard_from_environment(),
                progress=bar.update,
                **more,
            )


def read_reference_features(path: str | Path) -> dict[str, Any]:
    """Return how the features of a reference folder were made, for `choose_extractor`; {} for anything else.

    Raises:
        ValueError: if it names a network that is not known (`ldm.trust`).
    """
    if not Path(path).exists():
        raise ValueError(f"there is no reference {path}: check the path, or make it by `decu evaluate reference`")
    return dict(open_features(path).settings["features"]) if is_feature_folder(path) else {}


def choose_extractor(
    features: str | None,
    weights: str | None = None,
    params: Mapping[str, Any] | None = None,
    channels: int = 3,
    made: Mapping[str, Any] | None = None,
) -> Extractor:
    """Make the extractor that is named, else the one that the reference was made with.

    Args:
        features: inception, clip, classifier or a dotted target.
        weights: its weights.
        params: its keywords.
        channels: of the images that a dotted target takes.
        made: from `read_reference_features`.

    Raises:
        ValueError: if neither names one, or it is not the one that the reference was made with.
    """
    if features is None and not made:
        raise ValueError(
            "--features is needed, since the reference is no folder of `decu evaluate reference`, which names them: "
            "inception, clip, classifier or a dotted target"
        )
    if features is None:
        assert made is not None
        extractor = make_extractor(
            made["extractor"],
            weights or made.get("weights"),
            made.get("params"),
            made.get("channels", channels),
        )
    else:
        extractor = make_extractor(features, weights, params, channels)
    found = extractor.describe()
    if made and found["sha256"] != made["sha256"]:
        raise ValueError(
            f"the reference was made with {made['extractor']} {made.get('weights')}, this is {found['extractor']} "
            f"{found.get('weights')} with other weights: values of different features cannot be compared"
        )
    return extractor


def load_reference(
    path: str,
    extraction: Extraction,
    folder: Path,
    metrics: Sequence[str] = (),
    image_size: ImageSize | None = None,
) -> FeatureSet | None:
    """Load the reference: a folder of features, published statistics with or without images, or images.

    Args:
        path: the folder, or the file.
        folder: where the features of images go.
        metrics: those that are asked for; where statistics are all they need, no image is read.
        image_size: see `load_images`.
    """
    if is_feature_folder(path):
        return open_features(path)
    given = load_statistics(path) if path.endswith(".npz") else {}
    if given and metrics and all(METRICS[name].reference != "features" for name in metrics):
        return FeatureSet(given=given)
    try:
        images = load_images(path, extraction.extractor.channels, image_size)
    except ValueError:
        if not given:
            raise
        return FeatureSet(given=given)
    found = extraction.read(images, folder)
    if found is None or not given:
        return found
    return FeatureSet(found.pooled, found.logits, found.spatial, {**found.given, **given}, found.settings)


def find_obstacles(
    reference: FeatureSet, samples: FeatureSet, options: Options, names: Iterable[str] = tuple(METRICS)
) -> dict[str, str]:
    """Return {metric: why it cannot be computed of these features}."""
    reasons = {name: obstacle(name, reference, samples, options) for name in names}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def measure_metrics(
    names: Iterable[str], reference: Reference, samples: FeatureSet, options: Options
) -> list[MetricRow]:
    """Compute the metrics one after the other, under a bar that names each."""
    rows = []
    for name in (bar := tqdm(list(names), unit="metric")):
        bar.set_description(name)
        rows += measure([name], reference, samples, options)
    return rows


@dataclass(frozen=True)
class DistortedRow:
    """A metric of images under a distortion."""

    distortion: Distortion
    row: MetricRow

    def columns(self) -> dict[str, Any]:
        """Return the line of a table."""
        return {"distortion": self.distortion.name, "strength": self.distortion.strength, **asdict(self.row)}


def measure_distortions(
    images: ImageSet,
    extraction: Extraction,
    distortions: Iterable[Distortion],
    folder: Path,
    metrics: Sequence[str],
    reference: Reference,
    options: Options,
) -> list[DistortedRow] | None:
    """Compute metrics of images under each distortion; None where other processes still extract.

    Args:
        folder: the features of each distortion go below it.
    """
    rows = []
    for distortion in distortions:
        own = folder / f"{distortion.name}_{distortion.strength:g}"
        samples = extraction.read(images, own, distortion)
        if samples is None:
            return None
        rows += [DistortedRow(distortion, row) for row in measure(metrics, reference, samples, options)]
    return rows
