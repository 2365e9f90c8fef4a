"""What members draw of a class, against the pictures they were trained on: what it is taken for, what it is near."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.class_bins import find_full_data
from ldm.data.own import build_dataset
from ldm.evaluation.recognition import PixelClassifier, nearest_images
from ldm.pipelines import EnsemblePipeline
from ldm.pipelines.images import real_images

# Principal components of the pixels that the classifier looks at, of larger pictures than 8x8.
LOOKED_AT = 100


@dataclass(frozen=True)
class RealPictures:
    """Training pictures, a classifier of them, and what it makes of pictures that it was not trained on.

    Attributes:
        images: training pictures, [N, H, W, C] in [-1, 1].
        labels: their classes, [N].
        classifier: of the training pictures, all classes with the same weight.
        known: {class: (validation pictures, those taken for their class)}; classes without any are left out.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    classifier: PixelClassifier
    known: Mapping[int, tuple[int, int]]

    @property
    def accuracy(self) -> float | None:
        """The share of validation pictures that are taken for their class, None where there are none."""
        count = sum(found for found, _ in self.known.values())
        return sum(right for _, right in self.known.values()) / count if count else None


@dataclass(frozen=True)
class ClassMistakes:
    """What the members' samples of a class are taken for, and how near to training pictures they lie.

    Attributes:
        label: the class.
        taken: the class that each sample is taken for, [M n].
        distances: of each sample from its nearest training picture, root mean square in units of -1 .. 1, [M n].
        samples: the first sample of each member, [M, C, H, W] in [-1, 1].
        nearest: the training picture nearest to each of them, [M, C, H, W].
        nearest_labels: the classes of these, [M].
    """

    label: int
    taken: NDArray[np.int64]
    distances: NDArray[np.float64]
    samples: Tensor
    nearest: Tensor
    nearest_labels: tuple[int, ...]

    @property
    def recognised(self) -> int:
        """The number of samples that are taken for their class."""
        return int((self.taken == self.label).sum())

    @property
    def other(self) -> tuple[int, int] | None:
        """The class that most of the other samples are taken for, and their number; None where there are none."""
        others, counts = np.unique(self.taken[self.taken != self.label], return_counts=True)
        return (int(others[counts.argmax()]), int(counts.max())) if len(others) else None


def read_real_pictures(data: Mapping[str, Any], most: int, seed: int, prompts: Sequence[str] = ()) -> RealPictures:
    """Read the training and validation pictures of a config, and fit a classifier.

    Args:
        data: `data.params` of a config; the full training set is read, not a member's bootstrap.
        most: training, and validation, pictures at most, drawn by the seed.
        prompts: captions that stand for classes; pictures of other captions are left out.

    Raises:
        ValueError: if the pictures are of one class, or a prompt is no caption of them.
    """
    images, labels = _read(find_full_data(data["train"]), most, seed, prompts)
    if len(np.unique(labels)) < 2:
        raise ValueError("the training pictures are of one class: there is nothing that a sample could be taken for")
    classifier = PixelClassifier(images, labels, balanced=True, components=LOOKED_AT)
    known: dict[int, tuple[int, int]] = {}
    if "validation" in data:
        others, other_labels = _read(data["validation"], most, seed, prompts)
        right = classifier.recognised(others, other_labels) if len(others) else np.zeros(0, bool)
        known = {int(one): _count(right[other_labels == one]) for one in np.unique(other_labels)}
    return RealPictures(images, labels, classifier, known)


def _read(
    config: Mapping[str, Any], most: int, seed: int, prompts: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return pictures and their classes; where there are prompts, the numbers of these."""
    images, labels = real_images(config, most, seed)
    if not prompts:
        return images, labels
    captions = list(build_dataset(config).class_names)
    unknown = [prompt for prompt in prompts if prompt not in captions]
    if unknown:
        raise ValueError(f"'{unknown[0]}' is no caption of the training pictures, which samples could be held against")
    numbers = {captions.index(prompt): number for number, prompt in enumerate(prompts)}
    kept = np.array([label in numbers for label in labels.tolist()])
    return images[kept], np.array([numbers[label] for label in labels[kept].tolist()])


def find_mistakes(
    pipeline: EnsemblePipeline, real: RealPictures, labels: Sequence[int], n: int
) -> Iterator[ClassMistakes]:
    """Yield of each class what `n` samples of every member are taken for; noise k is that of image k for all."""
    for label in labels:
        latents = pipeline.member_latents([label] * n, list(range(n)))[:, :, 0]  # [M, n, c, h, w]
        images = pipeline.decode(latents)  # [M, n, C, H, W]
        flat = images.flatten(0, 1).permute(0, 2, 3, 1).numpy()  # [M n, H, W, C]
        places, distances = nearest_images(flat, real.images)
        first = places.reshape(len(images), n)[:, 0]
        near = torch.from_numpy(real.images[first]).permute(0, 3, 1, 2)
        near_labels = tuple(int(real.labels[place]) for place in first)
        yield ClassMistakes(label, real.classifier.predict(flat), distances, images[:, 0], near, near_labels)


def _count(right: NDArray[np.bool_]) -> tuple[int, int]:
    return len(right), int(right.sum())
