"""Images that a benchmark stands on: of ten classes, to train on and held back, and data of another kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.benchmark.settings import EVERY_IMAGE, BenchmarkSettings, World
from ldm.data.base import LabelledImages
from ldm.experiments.small_networks import read_digits
from ldm.util import generator, instantiate_as

# Real images of every benchmark: of the classes that were trained, of the class that was left out, and other data.
KNOWN_CLASSES, LEFT_OUT_CLASS = "known classes", "left-out class"
# Pixels of a photograph that become one pixel, along an axis.
SHRUNK = 8


@dataclass(frozen=True)
class BenchmarkImages:
    """Images in [-1, 1], flat, of ten classes.

    Attributes:
        train, labels: [N, D] and [N].
        tests, test_labels: the same of images that nothing is trained on.
        shape: (C, H, W) of an image, D = C H W.
        given: {name: [n, D]}, other data of the user's.
        record: what they were read of, for the record of a folder.
    """

    train: Tensor
    labels: Tensor
    tests: Tensor
    test_labels: Tensor
    shape: tuple[int, int, int] = (1, 8, 8)
    given: Mapping[str, Tensor] = field(default_factory=dict)
    record: Any = "digits"

    def square(self, images: Tensor) -> Tensor:
        """Return flat images [N, D] as [N, C, H, W]."""
        return images.reshape(-1, *self.shape)

    def subset(self, world: World, settings: BenchmarkSettings) -> tuple[Tensor, Tensor]:
        """Return the training images [N, D] of a world and their classes [N]."""
        if world.data == EVERY_IMAGE:
            return self.train, self.labels
        kept = []
        for label in range(10):
            own = (self.labels == label).nonzero().flatten()
            count = world.images_of(label, len(own), settings)
            if count < len(own):
                order = torch.randperm(len(own), generator=generator("few images", world.seed, label))
                own = own[order[:count]]
            kept.append(own)
        chosen = torch.cat(kept)
        return self.train[chosen], self.labels[chosen]

    def real_sets(self, settings: BenchmarkSettings, seed: int) -> dict[str, Tensor]:
        """Return {set: images [n, D]} of a seed, the same in each of its worlds, none of which was trained on.

        The sets are `KNOWN_CLASSES`, `LEFT_OUT_CLASS`, and other data: held-back images turned, inverted and blurred,
        patches of photographs, and what the user gave.

        Raises:
            ValueError: if too few images are held back.
        """
        count = settings.reals
        order = torch.randperm(len(self.tests), generator=generator("real images", seed))
        is_out = self.test_labels[order] == World("out", seed).left_out_class
        known, left = order[~is_out], order[is_out]
        if len(known) < 2 * count or len(left) < 2:
            raise ValueError(
                f"benchmark.reals: {count} needs {2 * count} held-back images of the trained classes and 2 of the one "
                f"that is left out, got {len(known)} and {len(left)}"
            )
        own = self.tests[known[:count]]
        changed = self.square(self.tests[known[count : 2 * count]])
        found = {KNOWN_CLASSES: own, LEFT_OUT_CLASS: self.tests[left[:count]]}
        found |= {name: images.flatten(1) for name, images in change_images(changed).items()}
        found["photographs"] = cut_photographs(self.shape, count, seed).flatten(1)
        for name, images in self.given.items():
            drawn = torch.randperm(len(images), generator=generator("other data", name, seed))
            found[name] = images[drawn[:count]]
        return found


def change_images(images: Tensor) -> dict[str, Tensor]:
    """Return images [N, C, H, W] that are no longer of their classes: turned by 90 degrees, inverted, blurred."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    return {"turned": images.rot90(1, (2, 3)), "inverted": -images, "blurred": F.avg_pool2d(padded, 3, 1)}


def cut_photographs(shape: tuple[int, int, int], count: int, seed: int) -> Tensor:
    """Return patches [count, C, H, W] in [-1, 1] of the two photographs that scikit-learn carries, made smaller."""
    from sklearn.datasets import load_sample_images

    channels, height, width = shape
    source = generator("photographs", seed)
    found = []
    pictures = [torch.tensor(one).permute(2, 0, 1).float() / 127.5 - 1 for one in load_sample_images().images]
    for number in range(count):
        picture = pictures[number % len(pictures)]
        sides = [min(side * SHRUNK, most) for side, most in zip((height, width), picture.shape[1:], strict=True)]
        top, left = (
            int(torch.randint(most - side + 1, (), generator=source))
            for side, most in zip(sides, picture.shape[1:], strict=True)
        )
        patch = picture[:, top : top + sides[0], left : left + sides[1]]
        found.append(F.adaptive_avg_pool2d(patch.mean(0, keepdim=True) if channels == 1 else patch, (height, width)))
    return torch.stack(found)


def read_benchmark_images(section: Mapping[str, Any] | None) -> BenchmarkImages:
    """Return the images of a config's section `benchmark_data`, scikit-learn's digits where there is none.

    Args:
        section: {train: config, test: config, images_per_class: int, others: {name: config}}, all of them optional:
            configs of data sets of this project, `target` and `params`; train and test stand together. `invert: true`
            beside a target of the others makes dark ink bright, as that of digits is.

    Raises:
        ValueError: for another key, one of train and test alone, classes that are not ten, or names that are taken.
    """
    given = dict(section or {})
    wrong = sorted(set(given) - {"train", "test", "images_per_class", "others"})
    if wrong:
        raise ValueError(f"benchmark_data has no key '{wrong[0]}'; it has train, test, images_per_class and others")
    if ("train" in given) != ("test" in given):
        raise ValueError("benchmark_data: train and test stand together, or neither (then the digits are taken)")
    most = given.get("images_per_class")
    if "train" in given:
        read = [_read_set(given[name], f"benchmark_data.{name}", most) for name in ("train", "test")]
        (train, labels, shape), (tests, test_labels, _) = read
    else:
        (train, labels), (tests, test_labels) = read_digits("train"), read_digits("test")
        shape = (1, 8, 8)
    taken = (KNOWN_CLASSES, LEFT_OUT_CLASS, "turned", "inverted", "blurred", "photographs")
    others = {}
    for name, config in (given.get("others") or {}).items():
        if name in taken:
            raise ValueError(f"benchmark_data.others: the name '{name}' is taken by a set that is always there")
        place = f"benchmark_data.others.{name}"
        named = dict(config) if isinstance(config, Mapping) else {}
        inverted = named.pop("invert", False)
        if not isinstance(inverted, bool):
            raise ValueError(f"{place}.invert is true or false, got {inverted!r}")
        images, _, own = _read_set(named or config, place, None, classes=None)
        found = _resize(images.reshape(-1, *own), shape).flatten(1)
        others[str(name)] = -found if inverted else found
    return BenchmarkImages(train, labels, tests, test_labels, shape, others, given or "digits")


def _read_set(
    config: Any, place: str, most: int | None, classes: int | None = 10
) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Return the images [N, D] of a data set, their classes and their shape; of each class the first `most`."""
    data = instantiate_as(LabelledImages, config, place)
    if classes is not None and data.n_classes != classes:
        raise ValueError(f"{place}: expected {classes} classes, got {data.n_classes}")
    positions = torch.arange(len(data))
    if classes is None:
        positions = torch.randperm(len(data), generator=generator("other data", place))[:400]
    elif most is not None:
        positions = torch.cat([(data.labels == label).nonzero().flatten()[:most] for label in range(classes)])
    height, width, channels = data.image_shape
    images = torch.stack([data[int(number)]["image"] for number in positions]).permute(0, 3, 1, 2)
    return images.flatten(1), data.labels[positions], (channels, height, width)


def _resize(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return images [N, c, h, w] as [N, C, H, W], grey where C is 1."""
    if shape[0] == 1:
        images = images.mean(1, keepdim=True)
    elif images.shape[1] == 1:
        images = images.expand(-1, shape[0], -1, -1)
    if images.shape[2:] == shape[1:]:
        return images
    return F.interpolate(images, shape[1:], mode="bilinear", antialias=True).clamp(-1, 1)
