"""What more images would bring: a last layer's regression with images added that are like given ones of a class.

The posterior of a last layer (`ldm.laplace.fit`) has precision P and the regression's optimum W. Of one more image of a
class, G is the mean of the weighted patches' products and g the mean of the gradients at W, S their covariance over
images. With k more such images the regression moves, on average and by the choice of the images, to

    P_k = P + k G        E W_k - W = k P_k^-1 g        Cov W_k = k P_k^-1 S P_k^-1

so the loss of a held-out image with patches B and residuals R at W, and what the weights leave open of an output with
patch a, fall by

    |R|^2 - |R - B (E W_k - W)^T|^2 - tr(B Cov W_k B^T)              log(1 + a^T P^-1 a) / 2 - log(1 + a^T P_k^-1 a) / 2

The held-out images stand for those that might be collected: those of some folds of a class are added, and the fall is
measured on the images of the other fold, so that no image is judged by itself. G is taken as its mean.

Sources: recursive least squares (Plackett 1950); expected error and information as what data are chosen by (MacKay
1992; Cohn et al. 1996).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.laplace.attribution import Refit, image_rows
from ldm.laplace.fit import Observation


class _Held(NamedTuple):
    """The rows of a held-out image, in coordinates in which the precision is I.

    Attributes:
        rows: patches times the root of their weight [R P, K]; errors: residuals times the same [R P, C].
        weight: the sum of weights over rows and channels.
    """

    rows: Tensor
    errors: Tensor
    weight: float


@dataclass(frozen=True)
class MoreImages:
    """What k more images of each class would bring, measured on N held-out images.

    Attributes:
        k: the number of images.
        classes: those that are added [G].
        labels: classes of the held-out images [N].
        loss: of each held-out image before [N], the mean squared error of what is regressed, weighted as in the fit.
        fall: of each held-out image's loss by each class's images [G, N].
        information: that an output holds of the weights, mean over the outputs of an image, in nats [N].
        learned: the fall of that information [G, N].
    """

    k: int
    classes: Sequence[int]
    labels: Tensor
    loss: Tensor
    fall: Tensor
    information: Tensor
    learned: Tensor


@dataclass(frozen=True)
class _Addition:
    """k images added to the regression: the move of the optimum [K, C], its covariance [K, K] and P_k^-1 [K, K]."""

    move: Tensor
    covariance: Tensor
    left: Tensor

    @classmethod
    def of(cls, k: int, gram: Tensor, pull: Tensor, spread: Tensor) -> _Addition:
        """Return k images of a class from its means: gram [K, K], pull [K, C], spread [K, K]."""
        identity = torch.eye(len(gram)).to(gram)
        left = torch.cholesky_inverse(torch.linalg.cholesky(identity + k * gram))
        return cls(k * left @ pull, k * left @ spread @ left, left)


@dataclass
class _Sums:
    """Sums over images of a class in one fold: their number, grams, pulls, and products of pulls."""

    count: int
    gram: Tensor
    pull: Tensor
    products: Tensor

    @classmethod
    def empty(cls, refit: Refit) -> _Sums:
        width = len(refit.root)
        gram = refit.root.new_zeros(width, width)
        return cls(0, gram, refit.root.new_zeros(width, len(refit.change)), gram.clone())

    def add(self, held: _Held, draws: int, visits: float) -> None:
        """Add an image; the chance of few noise draws in its pull is reduced to that of a training's visits."""
        each = held.rows.unflatten(0, (draws, -1)).transpose(1, 2) @ held.errors.unflatten(0, (draws, -1))  # [R, K, C]
        pull = each.sum(0)
        self.count += 1
        self.gram += held.rows.T @ held.rows
        self.pull += pull
        self.products += pull @ pull.T
        if draws > 1 and visits > draws:
            within = (each - each.mean(0)).movedim(0, 1).flatten(1)
            self.products -= (1 - draws / visits) * draws / (draws - 1) * within @ within.T


def value_images(
    refit: Refit,
    observe: Callable[[], Iterable[Observation]],
    labels: Tensor,
    ks: Sequence[int],
    folds: int = 5,
) -> list[MoreImages]:
    """Predict what k more images of each class would bring to a refitted last layer.

    Args:
        refit: the regression.
        observe: gives the rows of the held-out images, as many draws to an image as in the fit; it is called twice.
        labels: classes of the held-out images [N].
        ks: numbers of images.
        folds: parts of each class's images; those of a part are judged by the other parts.

    Raises:
        ValueError: where a class has fewer than three held-out images.
    """
    folded = _fold(labels, folds)
    classes = sorted(set(labels.tolist()))
    sums = {(label, fold): _Sums.empty(refit) for label in classes for fold in range(folds)}
    state = refit.laplace.state
    for place, held in enumerate(_held_rows(refit, observe())):
        sums[int(labels[place]), int(folded[place])].add(held, state.repeats, state.visits)
    share = state.images_scale
    return [_measure(refit, observe, labels, folded, _additions(sums, classes, folds, k, share), k) for k in ks]


def _fold(labels: Tensor, folds: int) -> Tensor:
    """Return the fold of each image [N], in turn within its class."""
    folded = torch.empty_like(labels)
    for label in labels.unique():
        own = labels == label
        count = int(own.sum())
        if count < 3:
            raise ValueError(
                f"class {int(label)} has {count} held-out images, and 3 are the fewest that can stand for more: name "
                "more held-out images, or classes that have them"
            )
        folded[own] = torch.arange(count, device=labels.device) % folds
    return folded


def _additions(
    sums: dict[tuple[int, int], _Sums], classes: Sequence[int], folds: int, k: int, share: float
) -> dict[tuple[int, int], _Addition]:
    """Return, for each class and fold, k images like those of the other folds.

    Args:
        share: images that each image of the fit stands for, as which the rows are weighted.
    """
    found = {}
    for label in classes:
        for fold in range(folds):
            others = [sums[label, other] for other in range(folds) if other != fold]
            count = sum(each.count for each in others)
            gram = torch.stack([each.gram for each in others]).sum(0) / count
            pull = torch.stack([each.pull for each in others]).sum(0) / count
            products = torch.stack([each.products for each in others]).sum(0) / count
            spread = (products - pull @ pull.T) * count / max(1, count - 1)
            found[label, fold] = _Addition.of(k, gram / share, pull / share, spread / share**2)
    return found


def _measure(
    refit: Refit,
    observe: Callable[[], Iterable[Observation]],
    labels: Tensor,
    folded: Tensor,
    additions: dict[tuple[int, int], _Addition],
    k: int,
) -> MoreImages:
    """Judge additions by the held-out images of the folds that they do not stand for."""
    classes = sorted({label for label, _ in additions})
    state = refit.laplace.state
    one = state.temperature / state.scale  # of a draw's weight: an observation counts once
    losses, falls, known, learned, weights = [], [], [], [], []
    for place, held in enumerate(_held_rows(refit, observe())):
        added = [additions[label, int(folded[place])] for label in classes]
        before = held.errors.square().sum()
        gram = held.rows.T @ held.rows
        after = [
            (held.errors - held.rows @ each.move).square().sum() + (gram * each.covariance).sum() for each in added
        ]
        first = held.rows[: len(held.rows) // state.repeats]  # one draw says how much is known
        open_before = _information(first.square().sum(1) * one)
        open_after = [_information(((first @ each.left) * first).sum(1) * one) for each in added]
        losses.append(before)
        falls.append(before - torch.stack(after))
        known.append(open_before)
        learned.append(open_before - torch.stack(open_after))
        weights.append(held.weight)
    unit = sum(weights) / len(weights)
    return MoreImages(
        k,
        classes,
        labels,
        torch.stack(losses) / unit,
        torch.stack(falls, 1) / unit,
        torch.stack(known),
        torch.stack(learned, 1),
    )


def _information(variance: Tensor) -> Tensor:
    """Return the mean of log(1 + v) / 2 over outputs whose variance over that of an observation is v [P]."""
    return variance.log1p().mean() / 2


def _held_rows(refit: Refit, batches: Iterable[Observation]) -> Iterator[_Held]:
    """Yield the rows of each held-out image."""
    state = refit.laplace.state
    for batch in batches:
        weight = state.scale / (state.noise_variance(batch.t) * state.temperature)
        by_image = weight.unflatten(0, (-1, state.repeats)).sum(1).tolist()
        for own, (rows, errors) in zip(by_image, image_rows(refit, [batch]), strict=True):
            yield _Held(rows, errors, own * errors.numel() / state.repeats)
