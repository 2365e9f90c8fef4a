"""Linear probes of features: any number of heads in one optimiser, chosen on validation images, tested once.

A head is softmax regression on the features of one place, (noise level, layer). The sum of the heads' losses has no
terms in common and Adam acts element by element, so heads trained together end where each would end alone.
Source: Xiang et al. 2023 (arXiv 2303.09769), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ldm.evaluation.fitting import Batches, Progress, half_cosine, minimise
from ldm.evaluation.taps import Place
from ldm.util import generator

Arrays = Mapping[Place, NDArray[np.float32]]
# Rows that a measurement of a head reads at once.
_CHUNK = 2000


@dataclass(frozen=True)
class ProbeTraining:
    """Adam from zero weights under a rate that falls as half a cosine, step by step.

    Args:
        learning_rate: published is 1e-3, for features as they are; standardised ones bear more.
        standardise: scale every feature to mean 0 and deviation 1 over the training images.
    """

    epochs: int = 15
    batch_size: int = 128
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    standardise: bool = True


@dataclass(frozen=True)
class Group:
    """Heads on features of one width D: weights [h, D, K], biases [h, 1, K], feature means and deviations [h, 1, D]."""

    places: tuple[Place, ...]
    weight: Tensor
    bias: Tensor
    mean: Tensor
    deviation: Tensor

    def logits(self, arrays: Arrays, rows: NDArray[np.int64]) -> Tensor:
        """[h, B, K] of rows of the features."""
        features = torch.from_numpy(np.stack([arrays[place][rows] for place in self.places]))  # [h, B, D]
        features = (features.to(self.weight) - self.mean) / self.deviation
        return torch.baddbmm(self.bias, features, self.weight)


@dataclass(frozen=True)
class Heads:
    """Trained heads of many places."""

    groups: tuple[Group, ...]

    @torch.no_grad()
    def predictions(self, arrays: Arrays, rows: NDArray[np.int64]) -> dict[Place, NDArray[np.int64]]:
        """{place: predicted classes [B]} of rows of the features."""
        found: dict[Place, list[Tensor]] = {place: [] for group in self.groups for place in group.places}
        for start in range(0, len(rows), _CHUNK):
            for group in self.groups:
                chosen = group.logits(arrays, rows[start : start + _CHUNK]).argmax(2).cpu()
                for place, classes in zip(group.places, chosen, strict=True):
                    found[place].append(classes)
        return {place: torch.cat(classes).numpy() for place, classes in found.items()}

    def accuracies(self, arrays: Arrays, labels: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[Place, float]:
        """{place: share of the rows whose class [N] is predicted}."""
        wanted = labels[rows]
        return {place: float((got == wanted).mean()) for place, got in self.predictions(arrays, rows).items()}

    def only(self, place: Place) -> Heads:
        """The head of one place."""
        group = next(group for group in self.groups if place in group.places)
        one = slice(group.places.index(place), group.places.index(place) + 1)
        return Heads((Group((place,), group.weight[one], group.bias[one], group.mean[one], group.deviation[one]),))


def _group(arrays: Arrays, places: Sequence[Place], rows: NDArray[np.int64], classes: int, training: ProbeTraining,
           device: str | torch.device) -> Group:  # fmt: skip
    width = arrays[places[0]].shape[1]
    mean, deviation = np.zeros((len(places), 1, width)), np.ones((len(places), 1, width))
    if training.standardise:
        for index, place in enumerate(places):
            values = np.asarray(arrays[place][rows], dtype=np.float64)
            mean[index, 0], deviation[index, 0] = values.mean(0), values.std(0) + 1e-6
    weight = torch.zeros(len(places), width, classes, device=device, requires_grad=True)
    bias = torch.zeros(len(places), 1, classes, device=device, requires_grad=True)
    moments = (torch.from_numpy(value).float().to(device) for value in (mean, deviation))
    return Group(tuple(places), weight, bias, *moments)


def fit_heads(
    copies: Sequence[Arrays],
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    classes: int,
    training: ProbeTraining,
    seed: int,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Heads:
    """Train one head a place, all in one optimiser; the order of the images comes from (seed, epoch).

    Args:
        copies: {place: features [N, D]} of the images under other noise or augmentation; epoch e takes copy
            e modulo their number. All have the same places.
        labels: classes [N]; rows: the images that are learned from.

    Raises:
        ValueError: if there are no images, labels and features differ in number, or the loss is not finite.
    """
    first = copies[0]
    sizes = {len(array) for arrays in copies for array in arrays.values()}
    if sizes != {len(labels)} or not len(rows):
        raise ValueError(f"expected features of {len(labels)} images and some rows, got {sizes} and {len(rows)} rows")
    widths = sorted({array.shape[1] for array in first.values()})
    by_width = [[place for place, array in first.items() if array.shape[1] == width] for width in widths]
    groups = tuple(_group(first, places, rows, classes, training, device) for places in by_width)
    parameters = [tensor for group in groups for tensor in (group.weight, group.bias)]
    adam = torch.optim.Adam(parameters, training.learning_rate, weight_decay=training.weight_decay)
    batches = Batches(len(rows), training.batch_size, training.epochs, "probe order", seed)
    targets = torch.from_numpy(labels).to(device)

    def loss(part: Tensor, epoch: int, _source: torch.Generator) -> Tensor:
        """The sum over heads of each head's mean loss: every head gets the gradient of its own."""
        chosen, arrays = rows[part.numpy()], copies[epoch % len(copies)]
        return torch.cat([_losses(group.logits(arrays, chosen), targets[chosen]) for group in groups]).sum()

    minimise(loss, batches, adam, half_cosine(adam, batches.steps), progress)
    return Heads(tuple(_detached(group) for group in groups))


def _losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each head [h] for logits [h, B, K] and classes [B]."""
    flat = F.cross_entropy(logits.flatten(0, 1), wanted.repeat(len(logits)), reduction="none")
    return flat.unflatten(0, (len(logits), -1)).mean(1)


def _detached(group: Group) -> Group:
    return Group(group.places, group.weight.detach(), group.bias.detach(), group.mean, group.deviation)


def validation_split(labels: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray, NDArray]:
    """Ascending rows that are learned from and rows that heads are chosen on, a `share` of every class.

    Raises:
        ValueError: if the share is not between 0 and 1, or leaves one of the two without images.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of validation images lies between 0 and 1, got {share}")
    held = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        order = torch.randperm(len(own), generator=generator("probe split", seed, int(label))).numpy()
        held.append(own[order[: round(share * len(own))]])
    validation = np.sort(np.concatenate(held))
    training = np.setdiff1d(np.arange(len(labels)), validation)
    if not len(validation) or not len(training):
        raise ValueError(f"{len(labels)} images and a share of {share} leave no validation or no training images")
    return training, validation


def choose(accuracies: Sequence[Mapping[Place, float]]) -> Place:
    """The place whose validation accuracy, averaged over seeds, is highest; the first of equals."""
    means = {place: np.mean([seed[place] for seed in accuracies]) for place in accuracies[0]}
    return max(means, key=means.__getitem__)


@dataclass(frozen=True)
class ProbeResult:
    """What a probe of many places found, one entry a seed: validation accuracies, and tests at the chosen place.

    `errors` [S][K] are the shares of each class's test images that are mistaken.
    """

    validation: tuple[Mapping[Place, float], ...]
    place: Place
    test: tuple[float, ...]
    errors: tuple[Sequence[float], ...]

    @property
    def mean(self) -> float:
        """Test accuracy, averaged over seeds."""
        return float(np.mean(self.test))

    @property
    def deviation(self) -> float:
        """Standard deviation of the test accuracy over seeds."""
        return float(np.std(self.test))


def probe(
    copies: Sequence[Arrays],
    labels: NDArray[np.int64],
    tested: Callable[[Place, int], tuple[Arrays, NDArray[np.int64]]],
    classes: int,
    training: ProbeTraining,
    seeds: Sequence[int] = (0, 1, 2),
    share: float = 0.1,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> ProbeResult:
    """Train heads at every place for every seed, choose one place on validation images, and test it once a seed.

    A seed decides which images are held out for validation, the order of the others, and the noise of the test.

    Args:
        copies, labels: see `fit_heads`.
        tested: `tested(place, seed)` gives {place: features} of the test images and their classes.
        share: of every class's images, held out for validation.
    """
    fitted, validation = [], []
    for seed in seeds:
        rows, held = validation_split(labels, share, seed)
        fitted.append(fit_heads(copies, labels, rows, classes, training, seed, device, progress))
        validation.append(fitted[-1].accuracies(copies[0], labels, held))
    place = choose(validation)
    test, errors = [], []
    for seed, heads in zip(seeds, fitted, strict=True):
        arrays, wanted = tested(place, seed)
        got = heads.only(place).predictions(arrays, np.arange(len(wanted)))[place]
        test.append(float((got == wanted).mean()))
        errors.append(class_errors(got, wanted, classes))
    return ProbeResult(tuple(validation), place, tuple(test), tuple(errors))


def class_errors(predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> list[float]:
    """Share of each class's images that are mistaken [K]; NaN for a class without images."""
    return [
        float((predicted[labels == label] != label).mean()) if (labels == label).any() else math.nan
        for label in range(classes)
    ]
