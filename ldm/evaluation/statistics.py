"""Moments of features in float64: streamed in blocks, merged across processes, weighted, on disk.

An array of features [N, D] is a NumPy array (a memory map of any size) or a tensor; it is read block by block.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.files import read_arrays, reading, write_arrays

FeatureArray = Tensor | NDArray[np.floating]
BLOCK = 1024  # rows


def check_features(name: str, features: FeatureArray, least: int = 1) -> None:
    """Raise ValueError unless `features` is [N, D] with at least `least` rows."""
    shape = tuple(features.shape)
    if len(shape) != 2 or shape[0] < least or shape[1] < 1:
        raise ValueError(f"{name} must be features [N, D] with at least {least} rows, got shape {shape}")


def blocks(
    features: FeatureArray, size: int = BLOCK, device: str | torch.device = "cpu"
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, float64 rows [<= size, D]) from the first to the last row.

    Raises:
        ValueError: if a value is NaN or infinite, with its row.
    """
    for start in range(0, len(features), size):
        piece = features[start : start + size]
        rows = piece if isinstance(piece, Tensor) else torch.from_numpy(np.array(piece))
        rows = rows.to(device=device, dtype=torch.float64)
        broken = (~rows.isfinite()).any(1).nonzero().flatten()
        if len(broken):
            raise ValueError(f"features of row {start + int(broken[0])} hold NaN or infinity; look at that image")
        yield start, rows


@dataclass(frozen=True)
class FeatureStatistics:
    """What FID needs of a set: mean [D] and unbiased covariance [D, D] in float64; `count` where it is known."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None


@dataclass(frozen=True)
class FeatureMoments:
    """Weight `count`, mean [D] and scatter sum (x - mean)(x - mean)^T [D, D] of rows seen so far, in float64.

    Merging is exact in any order up to rounding (Chan, Golub & LeVeque 1983), so processes may share the rows.
    """

    count: float
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor | None = None) -> FeatureMoments:
        """Moments of rows [N, D]; `weights` [N] count each row that many times."""
        rows = rows.double()
        weights = rows.new_ones(len(rows)) if weights is None else weights.double()
        count = float(weights.sum())
        mean = weights @ rows / max(count, 1)
        centred = rows - mean
        return cls(count, mean, (centred * weights[:, None]).T @ centred)

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Moments of both sets of rows together."""
        count = self.count + other.count
        if count == 0:
            return self
        shift, share = other.mean - self.mean, other.count / count
        scatter = self.scatter + other.scatter + self.count * share * torch.outer(shift, shift)
        return FeatureMoments(count, self.mean + share * shift, scatter)

    def statistics(self) -> FeatureStatistics:
        """Mean and covariance with denominator N - 1, as in the published statistics.

        Raises:
            ValueError: if there are fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count:g}")
        return FeatureStatistics(self.mean, self.scatter / (self.count - 1), round(self.count))


def moments(
    features: FeatureArray, weights: Tensor | None = None, device: str | torch.device = "cpu"
) -> FeatureMoments:
    """Moments of features [N, D], a block at a time: memory of order D^2, whatever N is."""
    check_features("features", features)
    total: FeatureMoments | None = None
    for start, rows in blocks(features, device=device):
        part = FeatureMoments.of(rows, None if weights is None else weights[start : start + len(rows)].to(rows.device))
        total = part if total is None else total.merge(part)
    return total


PUBLISHED_NAMES = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def save_statistics(
    statistics: Mapping[str, FeatureStatistics], path: str | os.PathLike, overwrite: bool = False
) -> None:
    """Write statistics {"pooled": ..., "spatial": ...} as .npz in the published layout: mu, sigma, mu_s, sigma_s."""
    arrays = {}
    for kind, names in PUBLISHED_NAMES.items():
        if kind in statistics:
            values = (statistics[kind].mean, statistics[kind].covariance)
            arrays.update({name: value.cpu().numpy() for name, value in zip(names, values, strict=True)})
    write_arrays(path, arrays, overwrite)


def load_statistics(path: str | os.PathLike) -> dict[str, FeatureStatistics]:
    """Read published statistics (.npz with mu, sigma and for sFID mu_s, sigma_s); {} where the file has none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if shapes do not fit, or a value is not finite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a file of statistics at {path}, and there is none: check the path")
    found = {}
    stored = read_arrays(path, None, "a file of statistics (.npz with mu and sigma)", "fetch it, or make it, again")
    for kind, (mean_name, covariance_name) in PUBLISHED_NAMES.items():
        if mean_name not in stored or covariance_name not in stored:
            continue
        if np.iscomplexobj(stored[mean_name]) or np.iscomplexobj(stored[covariance_name]):
            raise ValueError(f"{path}: {mean_name} or {covariance_name} holds complex numbers; make it again")
        with reading(path, "a file of statistics", "fetch it, or make it, again"):
            mean = torch.from_numpy(np.asarray(stored[mean_name], dtype=np.float64))
            covariance = torch.from_numpy(np.asarray(stored[covariance_name], dtype=np.float64))
        if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{path}: expected {mean_name} [D] and {covariance_name} [D, D], got {tuple(mean.shape)} and "
                f"{tuple(covariance.shape)}"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{path}: {mean_name} or {covariance_name} holds NaN or infinity")
        if (covariance - covariance.T).abs().max() > 1e-6 * covariance.abs().max():
            raise ValueError(f"{path}: {covariance_name} is no covariance: it is not symmetric; make it again")
        if (covariance.diagonal() < 0).any():
            raise ValueError(f"{path}: {covariance_name} is no covariance: a variance in it is negative; make it again")
        found[kind] = FeatureStatistics(mean, covariance)
    return found
