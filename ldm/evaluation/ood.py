"""Is a picture from a law that a model knows? Scores of pictures on one evaluation of a backbone, or on a few levels.

All scores see the same corruption: picture i at the noise level k is z_u = alpha z + sigma eps with eps drawn from
(seed, i, k), the same for every set of pictures; and the same backbone under the same conditions.

    denoising loss       |eps_hat - eps|^2 / D                                          (Graham et al. 2023)
    members              mutual information of the members' predicted x_0 and the member, in nats (DECU)
    gamma^2              variance of the output over the last layer's posterior (BayesDiff)
    snapshot             activations inside of the network: their Mahalanobis distance from reference pictures'
                         (Lee et al. 2018; a few internal states of one pass: RouzAY 2026), or the nearest one's
    path                 the deterministic way from the picture to noise, x' = alpha' x0_hat + sigma' eps_hat, over the
                         levels (DiffPath, Heng et al. 2024):
                         energy sum |eps_hat|^2, curvature sum |d eps_hat / d log(sigma / alpha)|^2, six such sums

What can be too small as well as too large counts by its distance from reference pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from ldm.diffusion.denoiser import Network, NetworkDenoiser, Prediction, Target
from ldm.diffusion.noise import keyed_normal
from ldm.diffusion.schedule import Schedule
from ldm.evaluation.recognition import nearest_distances
from ldm.evaluation.taps import activations, pool_activation
from ldm.laplace import LastLayerLaplace
from ldm.modules.distributions.gaussian import Gaussian
from ldm.uncertainty.control_maps import edge_strength
from ldm.uncertainty.information import mutual_information
from ldm.uncertainty.propagation import PredictiveDenoiser

# Which of the six sums along a path the scores of it take.
PATH_SUMS = {"path energy": [1], "path curvature": [4], "path, six sums": list(range(6))}


@dataclass(frozen=True)
class Corruption:
    """The noise that pictures get.

    Attributes:
        ratios: noise levels sigma / alpha, ascending [T].
        seed: of the noises.
    """

    ratios: tuple[float, ...]
    seed: int = 0

    @classmethod
    def make(cls, low: float, high: float, levels: int, seed: int = 0) -> Corruption:
        """Return levels at equal steps of log(sigma / alpha) from `low` to `high`.

        Raises:
            ValueError: for fewer than two levels, or ends that do not ascend.
        """
        if levels < 2 or not 0 < low < high:
            raise ValueError(f"expected two or more levels between 0 < LOW < HIGH, got {levels}, {low:g} and {high:g}")
        return cls(tuple(np.geomspace(low, high, levels).tolist()), seed)

    def nearest(self, ratio: float) -> int:
        """Return the place of the level nearest to a ratio."""
        return int(np.abs(np.log(self.ratios) - np.log(ratio)).argmin())

    def noises(self, numbers: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return the noises [T, B, ...] of pictures by number."""
        return torch.stack(
            [keyed_normal([("ood", self.seed, n, level) for n in numbers], shape) for level in range(len(self.ratios))]
        )


@dataclass(frozen=True)
class Readings:
    """What was read of N pictures at T levels; None: what there is nothing to read of.

    Attributes:
        loss: [N, T]. members, variance: [N, T]. snapshots: [N, T, F]. path: six sums [N, 6].
    """

    loss: NDArray[np.float64]
    path: NDArray[np.float64]
    members: NDArray[np.float64] | None = None
    variance: NDArray[np.float64] | None = None
    snapshots: NDArray[np.float64] | None = None

    @classmethod
    def join(cls, parts: Sequence[Readings]) -> Readings:
        """Return the readings of all pictures, in the order of the parts."""
        joined: dict[str, Any] = {}
        for each in fields(cls):
            values = [getattr(part, each.name) for part in parts]
            joined[each.name] = None if values[0] is None else np.concatenate(values)
        return cls(**joined)


@dataclass(frozen=True)
class NetworkReader:
    """A network, and what there is beside it: members on it, a posterior of its last layer, places inside of it.

    Attributes:
        network: `network(x, t, cond)`; schedule, target, learned_range: see `NetworkDenoiser`.
        members: the same of all members at once, [M, B, ...].
        laplace: the posterior.
        taps: {tap: submodule}, see `ldm.evaluation.taps`; none: no snapshots.
    """

    network: Any
    schedule: Schedule
    target: Target
    learned_range: bool = False
    members: Network | None = None
    laplace: LastLayerLaplace | None = None
    taps: Mapping[str, str] | None = None

    @torch.no_grad()
    def read(self, z: Tensor, cond: Tensor | None, numbers: Sequence[int], corruption: Corruption) -> Readings:
        """Read clean states z [B, C, H, W] under conditions [B].

        Args:
            numbers: of the pictures [B], which name their noise.
        """
        noises = corruption.noises(numbers, z.shape[1:]).to(z)
        found: dict[str, list[Tensor]] = {"loss": [], "members": [], "variance": [], "snapshots": []}
        for ratio, eps in zip(corruption.ratios, noises, strict=True):
            u = self.schedule.reach(ratio)
            x = self.schedule.noised(z, eps, u)
            said = self._predict(self.network, x, u, cond)
            found["loss"].append((said.eps - eps).double().square().flatten(1).mean(1))
            if self.members is not None:
                law = Gaussian(self._predict(self.members, x, u, cond).x0)
                found["members"].append(mutual_information(law, "wasserstein", "sample", "mean"))
            if self.laplace is not None:
                denoiser = PredictiveDenoiser(self.laplace, self.schedule, self.target, cond)
                found["variance"].append(denoiser.law(x, u)[1].double().flatten(1).mean(1))
            if self.taps:
                found["snapshots"].append(self.snapshot(x, u, cond))
        read = {name: torch.stack(values, 1).cpu().numpy() for name, values in found.items() if values}
        return Readings(path=self.follow(z, cond, corruption.ratios).cpu().numpy(), **read)

    def _predict(self, network: Network, x: Tensor, u: float, cond: Tensor | None) -> Prediction:
        return NetworkDenoiser(network, self.schedule, self.target, cond, self.learned_range)(x, u)

    def snapshot(self, x: Tensor, u: float, cond: Tensor | None) -> Tensor:
        """Return the means of the taps' activations over positions [B, F]."""
        scale = self.target.coefficients(*self.schedule.per_image(u))[2].to(x)
        time = self.schedule.time_to_net(u).to(device=x.device, dtype=torch.float32).expand(len(x))
        found = activations(self.network, self.taps or {}, scale * x, time, cond)
        return torch.cat([pool_activation(value).double() for value in found.values()], 1)

    def follow(self, z: Tensor, cond: Tensor | None, ratios: Sequence[float]) -> Tensor:
        """Return sums of |eps|^p, and of |d eps / d log ratio|^p, p = 1, 2, 3, along the way to noise [B, 6]."""
        said: Prediction | None = None
        sizes: list[Tensor] = []
        bends: list[Tensor] = []
        for place, ratio in enumerate(ratios):
            u = self.schedule.reach(ratio)
            alpha, sigma = self.schedule.coefficients(u, z)
            x = alpha * z if said is None else alpha * said.x0 + sigma * said.eps
            now = self._predict(self.network, x, u, cond)
            sizes.append(_powers(now.eps))
            if said is not None:
                bends.append(_powers((now.eps - said.eps) / float(np.log(ratio / ratios[place - 1]))))
            said = now
        return torch.cat([torch.stack(sizes).sum(0), torch.stack(bends).sum(0)], 1)


def _powers(eps: Tensor) -> Tensor:
    """Return the means of |eps|^p, p = 1, 2, 3, over the elements [B, 3]."""
    flat = eps.double().abs().flatten(1)
    return torch.stack([(flat**power).mean(1) for power in (1, 2, 3)], 1)


@dataclass(frozen=True)
class Law:
    """Reference values as a Gaussian with Ledoit and Wolf's (2004) covariance, each number in its own deviation."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    precision: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray) -> Law:
        """Return the law of reference values [N, F]."""
        mean, deviation = values.mean(0), values.std(0)
        deviation = np.where(deviation > 0, deviation, 1.0)
        scaled = (values - mean) / deviation
        return cls(mean, deviation, LedoitWolf(assume_centered=True).fit(scaled).precision_)

    def distance(self, values: NDArray) -> NDArray[np.float64]:
        """Return the squared Mahalanobis distance of values [N, F] over F [N]."""
        scaled = (values - self.mean) / self.deviation
        return np.einsum("nf,fg,ng->n", scaled, self.precision, scaled) / scaled.shape[1]


def pixel_statistics(images: Tensor) -> NDArray[np.float64]:
    """Return mean, deviation and strength of edges of pictures [N, C, H, W]: [N, 3]."""
    flat = images.double().flatten(1)
    edges = edge_strength(images.double()).flatten(1).mean(1)
    return torch.stack([flat.mean(1), flat.std(1), edges], 1).numpy()


@dataclass(frozen=True)
class PictureScore:
    """A score of N pictures, the larger the less known, and the evaluations of the network that it takes a picture."""

    values: NDArray[np.float64]
    evaluations: int


@dataclass(frozen=True)
class KnownPictures:
    """Pictures that the model knows, in memory: what scores compare with.

    Attributes:
        images: [N, C, H, W] in [-1, 1]; readings: of the same.
        one: the level of scores on one evaluation.
        members: how many members there are.
    """

    images: Tensor
    readings: Readings
    one: int
    members: int = 1

    def score(self, images: Tensor, readings: Readings) -> dict[str, PictureScore]:
        """Return all scores of pictures [N, C, H, W] in [-1, 1], by name."""
        levels = readings.loss.shape[1]
        own = self.readings
        pixels = Law.of(pixel_statistics(self.images)).distance(pixel_statistics(images))
        found = {
            "pixel statistics": PictureScore(pixels, 0),
            "nearest neighbour": PictureScore(nearest_distances(images.numpy(), self.images.numpy()), 0),
        }
        several = {"denoising loss": readings.loss, "members": readings.members, "gamma^2": readings.variance}
        for name, values in several.items():
            if values is not None:
                passes = self.members if name == "members" else 1
                found[f"{name}, 1 level"] = PictureScore(values[:, self.one], passes)
                found[f"{name}, {levels} levels"] = PictureScore(np.log(values.clip(1e-30)).mean(1), passes * levels)
        if readings.snapshots is not None and own.snapshots is not None:
            each = snapshot_distances(own.snapshots, readings.snapshots)
            found["snapshot, 1 level"] = PictureScore(each[:, self.one], 1)
            found[f"snapshot, {levels} levels"] = PictureScore(np.log(each).mean(1), levels)
            pair = own.snapshots[:, self.one], readings.snapshots[:, self.one]
            found["nearest snapshot, 1 level"] = PictureScore(_nearest(*pair), 1)
        for name in PATH_SUMS:
            found[name] = PictureScore(path_distances(name, own.path, readings.path), levels)
        return found


def snapshot_distances(known: NDArray, asked: NDArray) -> NDArray[np.float64]:
    """Return the distance of snapshots [N, T, F] at each level from the law of known ones [K, T, F]: [N, T]."""
    pairs = zip(known.swapaxes(0, 1), asked.swapaxes(0, 1), strict=True)
    return np.stack([Law.of(own).distance(other) for own, other in pairs], 1)


def path_distances(name: str, known: NDArray, asked: NDArray) -> NDArray[np.float64]:
    """Return the distance of paths [N, 6], in the sums that a score of `PATH_SUMS` takes, from known ones [K, 6]."""
    columns = PATH_SUMS[name]
    return Law.of(np.log(known[:, columns])).distance(np.log(asked[:, columns]))


def _nearest(known: NDArray, asked: NDArray) -> NDArray[np.float64]:
    """Return the distance of each row [N, F] from the nearest known one, each number in its deviation."""
    deviation = known.std(0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    search = NearestNeighbors(n_neighbors=1).fit(known / deviation)
    return search.kneighbors(asked / deviation)[0][:, 0]


def conformal_p(known: NDArray, asked: NDArray) -> NDArray[np.float64]:
    """Return the p value of each score [N] that its picture is from the law of the known ones [K].

        p = (1 + number of known scores >= score) / (K + 1)

    For a picture of that law it is at most q with a probability of at most q (Vovk et al. 2005).
    """
    ordered = np.sort(known)
    above = len(known) - np.searchsorted(ordered, asked, side="left")
    return (1 + above) / (len(known) + 1)
