"""Samples with their uncertainty: what is measured of a batch, and of many in parts that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import Step, make_sampler
from ldm.evaluation.features import Extractor
from ldm.files import read_arrays, write_arrays
from ldm.images import to_uint8
from ldm.jobs import WorkList
from ldm.pipelines import PosteriorPipeline
from ldm.uncertainty import control_maps as control_maps
from ldm.uncertainty.propagation import VarianceStep
from ldm.uncertainty.scores import SCORES, Mask, feature_entropy, score_table, total
from ldm.util import derive_seed

CONTROL_MAPS = ("energy", "edges", "differences", "seeds")


@dataclass(frozen=True)
class Measures:
    """What is measured of every image besides its map.

    Attributes:
        masks: {name: mask} of segmentation scores.
        extractor: network for the entropy of features over members; none where None.
        control_maps: of `CONTROL_MAPS`, scored by their sum.
        share, parts: of the percentile and of the patches.
        seeds: noises of the control map `seeds`, drawn from the middle of the trajectory on.
        step_maps: keep the map of every step.
    """

    masks: Mapping[str, Mask] = field(default_factory=dict)
    extractor: Extractor | None = None
    control_maps: Sequence[str] = ()
    share: float = 95.0
    parts: int = 4
    seeds: int = 8
    step_maps: bool = False


def score_names(masks: Sequence[str], controls: Sequence[str] = (), features: bool = False) -> list[str]:
    """Names of the scores that `measure_batch` gives for these masks and control maps, `features` with an extractor."""
    segmented = [f"segmentation_{name}" for name in masks]
    return [*SCORES, *segmented, *["feature_entropy"] * features, *(f"control_map_{name}" for name in controls)]


@torch.no_grad()
def measure_batch(
    posterior: PosteriorPipeline, method: str, labels: Sequence[int] | None, images: Sequence[int], measures: Measures
) -> dict[str, NDArray]:
    """Samples and their uncertainty by one of `METHODS`.

    Returns:
        images uint8 [B, H, W, C]; latents and their variance [B, c, h, w]; map [B, H, W], the pixels' variance with
        channels averaged; step_sums [B, S], the state's variance summed; step_maps [B, S, h, w] where asked for; and
        score_NAME [B] for every score.
    """
    steps, trajectory = [], []
    for last in posterior.steps(method, labels, images):
        trajectory.append(last.step)
        steps.append(last.var.mean(1) if measures.step_maps else last.var.sum((1, 2, 3)))
    pipeline, channels = posterior.pipeline, last.var.shape[1]
    stacked = torch.stack(steps, 1)
    pixels, decoded = posterior.pixel_variance(last, images), pipeline.decode(last.step.x_next)
    scores = score_table(pixels.cpu(), decoded, dict(measures.masks), measures.share, measures.parts)
    if measures.extractor is not None:
        scores["feature_entropy"] = entropy_of_members(posterior, last, measures.extractor)
    scores |= {
        f"control_map_{name}": _control_map(name, posterior, labels, images, trajectory, measures)
        for name in measures.control_maps
    }
    found = {
        "latents": last.step.x_next,
        "variance": last.var,
        "map": pixels.mean(1),
        "step_sums": channels * stacked.sum((2, 3)) if measures.step_maps else stacked,
        **({"step_maps": stacked} if measures.step_maps else {}),
        **{f"score_{name}": value for name, value in scores.items()},
    }
    arrays = {name: value.float().cpu().numpy() for name, value in found.items() if not name.startswith("score_")}
    arrays |= {name: value.double().cpu().numpy() for name, value in found.items() if name.startswith("score_")}
    return {"images": to_uint8(decoded), **arrays}


def entropy_of_members(posterior: PosteriorPipeline, last: VarianceStep, extractor: Extractor) -> Tensor:
    """`feature_entropy` of the members' decoded images [B].

    Raises:
        ValueError: for a method that samples no weights.
    """
    if last.members is None or last.tangent:
        raise ValueError("the entropy of features needs sampled members: --method persistent")
    pictures = to_uint8(posterior.pipeline.decode(last.members.flatten(0, 1)))
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(posterior.pipeline.device)
    features = torch.cat([extractor(extractor.prepared(part)) for part in images.split(posterior.chunk)])
    return feature_entropy(features.unflatten(0, last.members.shape[:2]))


def _control_map(
    name: str,
    posterior: PosteriorPipeline,
    labels: Sequence[int] | None,
    images: Sequence[int],
    trajectory: Sequence[Step],
    measures: Measures,
) -> Tensor:
    """Sum [B] of a map that knows no posterior."""
    pipeline = posterior.pipeline
    if name == "edges":
        return total(control_maps.edge_strength(pipeline.decode(trajectory[-1].x_next)))
    if name == "differences":
        return total(control_maps.successive_differences(trajectory))
    if name == "energy":
        features = posterior.predictive(labels).features(trajectory[-1].x, trajectory[-1].u)
        return total(control_maps.feature_energy(posterior.laplace, features))
    middle = trajectory[len(trajectory) // 2]
    sampler, denoiser = make_sampler("DDIM", eta=1.0), posterior.build(labels)(pipeline.model.network)

    def sample_again(seed: int):
        noise = ImageNoise(derive_seed("seeds", pipeline.sampling.seed, seed), tuple(images), device=pipeline.device)
        return sampler(denoiser, pipeline.model.schedule, middle.x, pipeline.times, noise=noise, start=middle.index)

    return total(control_maps.seed_variance(sample_again, measures.seeds))


def sample_in_parts(
    work: WorkList,
    parts: Mapping[str, range],
    posterior: PosteriorPipeline,
    method: str,
    labels: Sequence[int] | None,
    measures: Measures,
    *,
    shown: int,
    progress: Callable[[int], Any],
) -> None:
    """Sample the parts of this process's share that have no file yet, `{work.folder}/{part}.npz`.

    Args:
        parts: ranges of image numbers by the names of their parts.
        labels: the class of every image; None for an unconditional model.
        measures: see `measure_batch`, whose arrays a file holds.
        shown: the maps of single steps are kept of parts that begin below this image.
        progress: called with the images of each part that was sampled.
    """
    for key in work.pending(parts):
        images = list(parts[key])
        own = None if labels is None else [labels[image] for image in images]
        found = measure_batch(posterior, method, own, images, measures)
        if images[0] >= shown:
            found.pop("step_maps", None)
        write_arrays(work.folder / f"{key}.npz", found, overwrite=True)
        work.save(key, {"images": images})
        progress(len(images))


def join_samples(work: WorkList, parts: Mapping[str, range]) -> dict[str, NDArray]:
    """Return the arrays of all parts in their order; `step_maps` of the first images only."""
    arrays: dict[str, list[NDArray]] = {}
    for key in parts:
        found = read_arrays(work.folder / f"{key}.npz", None, "a part of the samples", work.again(key))
        for name, values in found.items():
            arrays.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in arrays.items()}
