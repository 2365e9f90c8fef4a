"""Prior, noise and temperature of a last-layer posterior, checked where they are set."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Hyperparameters:
    """Values that no data enter; setting one forgets the covariance that was factorised with the old one.

    Args:
        shape: (C, K) of the parameters' matrix.
        levels: number of noise levels, each with its own sigma_noise.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        levels: int,
        prior_precision: float,
        prior_mean: float | Tensor,
        sigma_noise: float | Sequence[float] | Tensor,
        temperature: float,
    ):
        self._shape, self._levels = shape, levels
        self.prior_precision, self.prior_mean = prior_precision, prior_mean
        self.sigma_noise, self.temperature = sigma_noise, temperature

    @property
    def prior_precision(self) -> float:
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float) -> None:
        self._prior_precision = positive("prior_precision", value, "the posterior of what no data inform is improper")
        self._covariance = None

    @property
    def sigma_noise(self) -> Tensor:
        """[levels], float64."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float | Sequence[float] | Tensor) -> None:
        values = torch.as_tensor(value, dtype=torch.float64).detach().cpu().flatten()
        levels = self._levels
        if len(values) not in (1, levels):
            raise ValueError(f"sigma_noise must be one number or one for each of {levels} levels, got {len(values)}")
        for each in values.tolist():
            positive("sigma_noise", each, "1 / sigma_noise^2 multiplies the data, and would be infinite")
        self._sigma_noise = values.expand(levels).clone()
        self._covariance = None

    @property
    def temperature(self) -> float:
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = positive("temperature", value, "1 / temperature multiplies the likelihood")
        self._covariance = None

    @property
    def prior_mean(self) -> Tensor:
        """[] or [C, K (+ 1)], float64."""
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, value: float | Tensor) -> None:
        mean = torch.as_tensor(value, dtype=torch.float64).detach()
        if mean.ndim and mean.shape != self._shape:
            raise ValueError(f"prior_mean must be a number or {list(self._shape)}, got {list(mean.shape)}")
        self._prior_mean = mean


def positive(name: str, value: float, reason: str) -> float:
    """The value as a float, if it is finite and above 0."""
    number = float(value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and above 0, got {number:g}: {reason}")
    return number
