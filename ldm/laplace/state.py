"""What a last-layer posterior is made of: sums over data, hyperparameters, and the weights it lies around.

All are frozen values. A changed hyperparameter is `dataclasses.replace(state,
prior_precision=2.0)`, which shares the sums and is checked as the first state was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

# Curvature -> the large sums that it needs.
CURVATURE_SUMS: dict[str, frozenset[str]] = {
    "full": frozenset({"gram"}),
    "diag": frozenset(),
    "kron": frozenset({"gram"}),
    "lowrank": frozenset({"gram"}),
    "ef": frozenset(),
    "isotropic": frozenset(),
    "sandwich": frozenset({"gram", "meat"}),
}
_SAVED = ("mean", "repeats", "data_size", "visits", "prior_precision", "prior_mean", "sigma_noise", "temperature")
_PREFIX = "statistics."  # of the sums' names on disk


@dataclass(frozen=True, eq=False)
class LaplaceSums:
    """Sums over draws n and positions p of patches a and residuals r, per noise level.

    A residual is target - output. All are float64. b is the number of noise levels, C that of
    regressed channels, K that of patch entries.

    Attributes:
        gram: sum a a^T [b, K, K], or None where no curvature needs it.
        diagonal: the diagonal of `gram` [b, K].
        cross: sum r a^T [b, C, K], the gradient of the log-likelihood times sigma^2.
        fisher: sum_n (sum_p r a)^2 [b, C, K], the diagonal empirical Fisher of a unit
            likelihood, a draw being one datum.
        squares: sum r^2 [b].
        elements: the number of regressed values [b].
        meat: sum_images g g^T [C, K, K], where g is the sum of r a over an image's draws and
            positions; None where no curvature needs it.
        draws: the number of draws [].
        images: the number of images [].
        draw_meat: sum_draws g g^T [C, K, K], where g is the sum of r a over one draw's
            positions; None where no curvature needs it, with one draw an image (`meat` is the
            same), and in files of versions that did not gather it.
        residuals: sum r r^T over draws and positions, between channels [C, C]; None as
            `draw_meat`, but for one draw.
    """

    gram: Tensor | None
    diagonal: Tensor
    cross: Tensor
    fisher: Tensor
    squares: Tensor
    elements: Tensor
    meat: Tensor | None
    draws: Tensor
    images: Tensor
    draw_meat: Tensor | None = None
    residuals: Tensor | None = None

    def __add__(self, other: LaplaceSums) -> LaplaceSums:
        """Return the sums over both sets of images.

        Raises:
            ValueError: if they are of other layers or levels, or one lacks a matrix that the
                other has.
        """
        sums: dict[str, Any] = {}
        for each in fields(self):
            mine = getattr(self, each.name)
            theirs = getattr(other, each.name)
            here, there = (None if value is None else tuple(value.shape) for value in (mine, theirs))
            if here != there:
                raise ValueError(f"cannot merge statistics: '{each.name}' is {here} here and {there} there")
            sums[each.name] = None if mine is None else mine + theirs.to(mine.device)
        return LaplaceSums(**sums)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums that are there, by name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, eq=False)
class LaplaceState:
    """The posterior of a last layer's parameters, before any factorisation.

        N(mean, (data + prior_precision I)^-1)

    C is the number of regressed channels and K that of a patch's entries. Numbers are taken for
    `prior_mean` and `sigma_noise` too, and become tensors. Two states are equal only if they are
    the same object.

    Attributes:
        name: the layer's name in the network.
        mean: the trained parameters [C, K], float64: weights flattened, then the bias.
        bias: whether the last of the K entries is the bias.
        curvature: full (exact), diag (its diagonal), kron (weights and biases apart), lowrank
            (the leading `rank` eigenvectors), ef (diagonal empirical Fisher), isotropic (no data
            but their number: a map of feature energy), sandwich (sampling covariance of the fit,
            clustered by image).
        prior_precision: of each parameter, in 1 / parameter units squared, above 0.
        prior_mean: a number [] or a matrix [C, K], float64.
        sigma_noise: standard deviation of targets around outputs [levels], above 0, float64. One
            number counts for every level.
        temperature: divides the precision of the likelihood (the convention of laplace-torch).
        rank: number of eigenvectors of `lowrank`.
        published_ef: take the empirical Fisher as published (BayesDiff): doubled, and over
            sigma^2 instead of sigma^4.
        time_edges: ascending times of the network between the noise levels; levels =
            len(time_edges) + 1.
        sums: what `fit_state` gathered, None before.
        repeats: noise draws of each image in the fit, which are a Monte Carlo setting.
        data_size: images of the data set that the images seen stand for.
        visits: R, how often the training saw each image, every time under a noise of its own: the
            observations that an image counts as. At least 1.

    Raises:
        ValueError: for values that give no posterior, with the reason.
    """

    name: str
    mean: Tensor
    bias: bool
    curvature: str = "full"
    prior_precision: float = 1.0
    prior_mean: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    sigma_noise: Tensor = field(default_factory=lambda: torch.tensor(1.0))
    temperature: float = 1.0
    rank: int = 128
    published_ef: bool = False
    time_edges: tuple[float, ...] = ()
    sums: LaplaceSums | None = None
    repeats: int = 1
    data_size: int = 0
    visits: float = 1.0

    def __post_init__(self) -> None:
        edges = tuple(float(edge) for edge in self.time_edges)
        if list(edges) != sorted(set(edges)):
            raise ValueError(f"time_edges must ascend, got {list(self.time_edges)}")
        check_curvature(self.curvature, len(edges) + 1)
        shape = (len(edges) + 1, *self.mean.shape)
        if self.sums is not None and self.sums.cross.shape != shape:
            raise ValueError(
                f"the sums are over (levels, C, K) = {tuple(self.sums.cross.shape)}, this state's are {shape}: "
                "fit again with other time_edges or another layer"
            )
        checked = {
            "time_edges": edges,
            "prior_precision": _check_positive(
                "prior_precision", self.prior_precision, "the posterior of what no data inform is improper"
            ),
            "prior_mean": _check_prior_mean(self.prior_mean, self.mean.shape),
            "sigma_noise": _check_sigma(self.sigma_noise, len(edges) + 1),
            "temperature": _check_positive(
                "temperature", self.temperature, "1 / temperature multiplies the likelihood"
            ),
            "visits": _check_visits(self.visits),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def fitted(self) -> LaplaceSums:
        """Return what the fit gathered.

        Raises:
            ValueError: if there was no fit.
        """
        if self.sums is None:
            raise ValueError("this posterior is not fitted: call fit(batches) or load it")
        return self.sums

    @property
    def images_scale(self) -> float:
        """Images of the data set for each image that the fit saw."""
        return self.data_size / float(self.fitted().images)

    @property
    def scale(self) -> float:
        """Observations of the training, `visits` to an image of the data set, for each draw that the fit saw."""
        return self.data_size * self.visits / float(self.fitted().draws)

    def level(self, t: Tensor) -> Tensor:
        """Return the noise level of each of the network's times t [B]."""
        edges = torch.tensor(self.time_edges, dtype=torch.float64, device=t.device)
        return torch.bucketize(t.double(), edges)

    def noise_variance(self, t: Tensor) -> Tensor:
        """Return sigma_noise^2 at the network's times t [B], float64."""
        return self.sigma_noise.to(t.device).square()[self.level(t)]

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a fit and its tuning found, as float64 tensors by name.

        Raises:
            ValueError: if there was no fit.
        """
        sums = {f"{_PREFIX}{name}": value for name, value in self.fitted().tensors().items()}
        found = {name: getattr(self, name) for name in _SAVED}
        numbers = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in found.items()}
        return numbers | sums

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LaplaceState:
        """Return this state with what `tensors()` of another state of the same weights and options gave.

        Files of versions that knew no `visits` counted an image as often as the fit drew it.

        Raises:
            ValueError: if that was fitted around other weights.
        """
        mean = tensors["mean"].to(self.mean)
        if mean.shape != self.mean.shape or not torch.equal(mean, self.mean):
            raise ValueError(f"this posterior was fitted around other weights of '{self.name}': load its own network")
        sums: dict[str, Any] = dict.fromkeys((each.name for each in fields(LaplaceSums)), None)
        for name in sums:
            if _PREFIX + name in tensors:
                sums[name] = tensors[_PREFIX + name].to(mean.device)
        return replace(
            self,
            sums=LaplaceSums(**sums),
            repeats=int(tensors["repeats"]),
            data_size=int(tensors["data_size"]),
            visits=float(tensors.get("visits", tensors["repeats"])),
            prior_precision=float(tensors["prior_precision"]),
            prior_mean=tensors["prior_mean"],
            sigma_noise=tensors["sigma_noise"],
            temperature=float(tensors["temperature"]),
        )


def check_curvature(name: str, levels: int) -> None:
    """Raise a ValueError unless there is such a curvature and it can do with so many noise levels."""
    if name not in CURVATURE_SUMS:
        raise ValueError(f"curvature must be one of {sorted(CURVATURE_SUMS)}, got '{name}'")
    if name == "sandwich" and levels > 1:
        raise ValueError("the sandwich sums an image's gradients over all its draws: it takes no time_edges")


def _check_positive(name: str, value: float, reason: str) -> float:
    """Return the value as a float, if it is finite and above 0."""
    number = float(value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and above 0, got {number:g}: {reason}")
    return number


def _check_visits(value: float) -> float:
    """Return the visits of an image as a float, if there is at least one."""
    number = float(value)
    if not (number >= 1 and math.isfinite(number)):
        raise ValueError(
            f"visits must be finite and at least 1, got {number:g}: of a training that did not see all images, "
            "data_size is the number that it saw"
        )
    return number


def _check_sigma(value: Any, levels: int) -> Tensor:
    """Return sigma_noise for each level [levels], float64."""
    values = torch.as_tensor(value, dtype=torch.float64).detach().cpu().flatten()
    if len(values) not in (1, levels):
        raise ValueError(f"sigma_noise must be one number or one for each of {levels} levels, got {len(values)}")
    for each in values.tolist():
        _check_positive("sigma_noise", each, "1 / sigma_noise^2 multiplies the data, and would be infinite")
    return values.expand(levels).clone()


def _check_prior_mean(value: Any, shape: torch.Size) -> Tensor:
    """Return the prior's mean, [] or [C, K], float64."""
    mean = torch.as_tensor(value, dtype=torch.float64).detach()
    if mean.ndim and mean.shape != shape:
        raise ValueError(f"prior_mean must be a number or {list(shape)}, got {list(mean.shape)}")
    return mean
