"""Numbered samples of a model, kept in files that processes share: what image i is, drawing it, reading it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.npz import ChunkedArray, read_labels
from ldm.diffusion.noise import ImageNoise, slerp
from ldm.files import read_arrays, write_arrays
from ldm.images import to_uint8
from ldm.jobs import WorkList
from ldm.pipelines.model import ModelPipeline
from ldm.util import generator

# Images in a file, the unit that a process takes.
SAMPLES_PER_FILE = 8


@dataclass(frozen=True)
class SamplePlan:
    """What image i is: its class, its noise, and where it starts.

    Attributes:
        count: number of images N.
        labels: the class of each image [N], or None for an unconditional model.
        arc: noises [F, C, H, W]; image i starts from noise i mod F, and all images share the later draws. None:
            image i draws all its noise from (seed, i, step).
        columns: images of each class, where the images come class by class.
    """

    count: int
    labels: Sequence[int] | None
    arc: Tensor | None = None
    columns: int | None = None

    def sample(self, pipeline: ModelPipeline, images: Sequence[int]) -> Tensor:
        """Return latents [B, c, h, w] of the images numbered `images`."""
        labels = None if self.labels is None else [self.labels[image] for image in images]
        if self.arc is None:
            return pipeline.sample_latents(labels, images)
        starts = self.arc[[image % len(self.arc) for image in images]]
        return pipeline.sample_latents(labels, [0] * len(images), starts)


def plan_samples(
    pipeline: ModelPipeline,
    classes: Sequence[int] | None,
    n: int = 16,
    n_per_class: int | None = None,
    labels: Sequence[int] | None = None,
) -> SamplePlan:
    """Number `n` images with the classes in turn, or `n_per_class` of each class, class by class.

    Args:
        classes: numbers of classes, the null class admitted; None for an unconditional model.
        labels: the class of each image [n], in place of the classes in turn.

    Raises:
        ValueError: if a class is not the model's.
    """
    if classes is not None:
        pipeline.labels(classes, null=True)
    if labels is not None:
        pipeline.labels(labels, null=True)
        return SamplePlan(n, labels)
    if n_per_class is not None:
        return _plan_by_class(classes, n_per_class)
    turns = None if classes is None else [classes[image % len(classes)] for image in range(n)]
    return SamplePlan(n, turns)


def plan_interpolation(
    pipeline: ModelPipeline, classes: Sequence[int] | None, seeds: tuple[int, int], frames: int
) -> SamplePlan:
    """Number `frames` images of each class, along the arc between the first noises of image 0 of two seeds.

    Raises:
        ValueError: if a class is not the model's.
    """
    if classes is not None:
        pipeline.labels(classes, null=True)
    shape = (1, *pipeline.model.latent_shape)
    first, last = (ImageNoise(seed, (0,)).initial(shape)[0] for seed in seeds)
    return _plan_by_class(classes, frames, slerp(first, last, torch.linspace(0, 1, frames)))


def _plan_by_class(classes: Sequence[int] | None, each: int, arc: Tensor | None = None) -> SamplePlan:
    """Number `each` images of every class, or `each` images of an unconditional model."""
    if classes is None:
        return SamplePlan(each, None, arc, each)
    labels = [label for label in classes for _ in range(each)]
    return SamplePlan(len(labels), labels, arc, each)


def draw_labels(classes: Sequence[int], n: int, seed: int) -> list[int]:
    """Draw the class of each of `n` images among `classes`; that of image i depends on (seed, i) alone."""
    sources = [generator("labels", seed, image) for image in range(n)]
    return [classes[int(torch.randint(len(classes), (), generator=source))] for source in sources]


def read_image_labels(path: str, n: int) -> list[int]:
    """Return the first `n` labels of a file.

    Raises:
        ValueError: if it has fewer.
    """
    found = read_labels(path)
    if len(found) < n:
        raise ValueError(f"{path} has {len(found)} labels for the {n} images of --n")
    return found[:n]


def sample_to_files(
    work: WorkList,
    files: Mapping[str, range],
    plan: SamplePlan,
    pipeline: ModelPipeline,
    batch_size: int,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Sample what this process's share of the files lacks; each holds bytes [n, H, W, C] and latents [n, c, h, w].

    Args:
        files: {name of a file: its images}.
        batch_size: images that are sampled together.
        progress: called with the number of images that were written.
    """
    pending = work.pending(files)
    together = max(1, batch_size // SAMPLES_PER_FILE)
    for first in range(0, len(pending), together):
        keys = pending[first : first + together]
        images = [image for key in keys for image in files[key]]
        latents: list[np.ndarray] = []
        pixels: list[np.ndarray] = []
        for start in range(0, len(images), batch_size):
            z = plan.sample(pipeline, images[start : start + batch_size])
            latents.append(z.float().cpu().numpy())
            pixels.append(to_uint8(pipeline.decode(z)))
        cuts = np.cumsum([len(files[key]) for key in keys])[:-1]
        own_latents = np.split(np.concatenate(latents), cuts)
        own_pixels = np.split(np.concatenate(pixels), cuts)
        for key, stored, shown in zip(keys, own_latents, own_pixels, strict=True):
            write_arrays(work.folder / f"{key}.npz", {"images": shown, "latents": stored}, overwrite=True)
            work.save(key, {"images": list(files[key])})
        progress(len(images))


def read_samples(work: WorkList, files: Mapping[str, range], name: str) -> ChunkedArray:
    """Return the `images` or the `latents` of all files in their order, read file by file."""

    def rows() -> Iterator[np.ndarray]:
        for key in files:
            yield read_arrays(work.folder / f"{key}.npz", [name], "a part of the samples", work.again(key))[name]

    first = next(rows())
    count = sum(map(len, files.values()))
    return ChunkedArray((count, *first.shape[1:]), first.dtype, rows())
