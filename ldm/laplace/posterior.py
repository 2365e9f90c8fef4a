"""Last-layer Laplace with the life cycle of laplace-torch: fit, call, sample, evidence, tuning, saving.

`LastLayerLaplace` holds a network in two pieces and a `LaplaceState`; each of its methods calls
one function of this room and takes up the state that it gives.
Sources: Kou et al. 2024 (BayesDiff); Daxberger et al. 2021 (last-layer Laplace; the names of the
methods).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from ldm.ensembles.members import Members
from ldm.laplace.arrangement import Arrangement, Example
from ldm.laplace.covariance import Covariance, OutputLaw, predict_output, sample_parameters
from ldm.laplace.curvature import data_spectrum, make_covariance
from ldm.laplace.fit import Observation, fit_state, merge_states
from ldm.laplace.layer import LastLayer
from ldm.laplace.split import split_network
from ldm.laplace.state import LaplaceState, LaplaceSums
from ldm.laplace.tune import (
    TUNERS,
    evidence,
    find_precision_by_evidence,
    find_precision_by_held_out,
    find_residual_sigma,
    find_temperature,
)

T = TypeVar("T")


class _StateField(Generic[T]):
    """An attribute that reads a field of `owner.state`, and replaces the state when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: LastLayerLaplace | None, kind: type) -> T:
        return cast(T, self if owner is None else getattr(owner.state, self.name))

    def __set__(self, owner: LastLayerLaplace, value: Any) -> None:
        owner.state = replace(owner.state, **{self.name: value})


class LastLayerLaplace:
    """Posterior over the last layer of `network(x, t, cond)`; the trained weights are its mean.

    Args:
        network: in evaluation mode; see `split_network`. Nothing in it is changed.
        layer: name of the last layer, found where it is None.
        example: one row of the network's arguments, or the arrangement of its output that a file
            holds; see `split_network`.
        outputs: number of leading output channels that are regressed; all where it is None.
        chunk: images whose patches are held at once.

    The other arguments are fields of `LaplaceState`. Each is an attribute too; setting one
    replaces the state, which checks it.

    Raises:
        ValueError: for a layer or a value that gives no posterior, with the reason.
    """

    name = _StateField[str]()
    mean = _StateField[Tensor]()
    curvature = _StateField[str]()
    prior_precision = _StateField[float]()
    prior_mean = _StateField[Tensor]()
    sigma_noise = _StateField[Tensor]()
    temperature = _StateField[float]()
    rank = _StateField[int]()
    published_ef = _StateField[bool]()
    time_edges = _StateField[tuple[float, ...]]()
    sums = _StateField["LaplaceSums | None"]()
    repeats = _StateField[int]()
    data_size = _StateField[int]()
    visits = _StateField[float]()

    def __init__(
        self,
        network: nn.Module,
        layer: str | None = None,
        *,
        curvature: str = "full",
        prior_precision: float = 1.0,
        prior_mean: float | Tensor = 0.0,
        sigma_noise: float | Sequence[float] | Tensor = 1.0,
        temperature: float = 1.0,
        rank: int = 128,
        outputs: int | None = None,
        published_ef: bool = False,
        time_edges: Sequence[float] = (),
        visits: float = 1.0,
        chunk: int = 4,
        example: Example | Arrangement | None = None,
    ):
        split = split_network(network, layer, example)
        self.features = split.features
        self.arrangement = split.arrangement
        self.layer = LastLayer.from_module(split.layer, outputs, self.arrangement)
        self.chunk = chunk
        self.state = LaplaceState(
            name=split.name,
            mean=self.layer.matrix(),
            bias=self.layer.bias,
            curvature=curvature,
            prior_precision=prior_precision,
            prior_mean=torch.as_tensor(prior_mean, dtype=torch.float64),
            sigma_noise=torch.as_tensor(sigma_noise, dtype=torch.float64),
            temperature=temperature,
            rank=rank,
            published_ef=published_ef,
            time_edges=tuple(time_edges),
            visits=visits,
        )
        self._covariance: tuple[LaplaceState, Covariance] | None = None

    def fit(
        self,
        batches: Iterable[Observation],
        *,
        draws: int = 1,
        data_size: int | None = None,
        override: bool = True,
        also: Sequence[str] = (),
    ) -> LastLayerLaplace:
        """Gather the sums of a stream of batches; other arguments are those of `fit_state`.

        Args:
            override: forget what was gathered before; False adds to it.
            also: further curvatures that `with_curvature` shall be able to give.

        Raises:
            ValueError: as `fit_state`; or if what was gathered is of other weights or `draws`.
        """
        found = fit_state(
            self.state,
            self.features,
            self.layer,
            batches,
            draws=draws,
            data_size=data_size,
            also=also,
            chunk=self.chunk,
        )
        if self.state.sums is not None and not override:
            found = merge_states(self.state, found)
            found = found if data_size is None else replace(found, data_size=data_size)
        self.state = found
        return self

    def merge(self, other: LastLayerLaplace) -> LastLayerLaplace:
        """Add another fit of the same network to other images; see `merge_states`."""
        self.state = merge_states(self.state, other.state)
        return self

    def with_curvature(
        self, curvature: str, rank: int | None = None, published_ef: bool | None = None
    ) -> LastLayerLaplace:
        """Return the same fit seen through another curvature, which `fit(also=)` gathered for."""
        other = copy.copy(self)
        other.state = replace(
            self.state,
            curvature=curvature,
            rank=self.rank if rank is None else rank,
            published_ef=self.published_ef if published_ef is None else published_ef,
        )
        return other

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        *,
        null: Tensor | None = None,
        scale: float = 1.0,
    ) -> OutputLaw:
        """Return the law of the network's output, exact under guidance.

        Args:
            x: the network's input [B, C, H, W].
            t: its times [B].
            cond: its condition [B] or None, and `null` the null condition.
            scale: guidance s; 1 is off.
        """
        return self.predict(self.guided_features(x, t, cond, null, scale))

    def guided_features(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor | None,
        null: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Return the input of the last layer [B, F, H, W], combined as guidance combines outputs.

            features_null + s (features_cond - features_null)

        The output is linear in the features, so these give the law of the guided output: one
        matrix of weights serves both halves, and the bias's 1 stays 1. Arguments are those of a
        call.

        Raises:
            ValueError: if there is guidance without a condition or a null condition.
        """
        features = self.features(x, t, cond)
        if scale == 1:
            return features
        if cond is None or null is None:
            raise ValueError(f"guidance scale {scale} needs a condition and a null condition; use scale 1")
        return torch.lerp(self.features(x, t, null), features, scale)

    def predict(self, features: Tensor) -> OutputLaw:
        """Return the law of the output from the last layer's input [B, F, H, W]."""
        return predict_output(self.layer, self.covariance(), features, self.chunk)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator, antithetic: bool = False) -> Members:
        """Return draws of the parameters as members, with keys as in the network's state dict."""
        matrices = sample_parameters(self.mean, self.covariance(), count, generator, antithetic)
        return self.members(matrices)

    def members(self, matrices: Tensor) -> Members:
        """Return parameters [M, C, K] as members, with keys as in the network's state dict."""
        stacked = self.layer.overrides(matrices)
        return Members({f"{self.name}.{key}": value for key, value in stacked.items()})

    def covariance(self) -> Covariance:
        """Return the posterior covariance of a row of parameters, factorised once for a state."""
        if self._covariance is None or self._covariance[0] is not self.state:
            self._covariance = (self.state, make_covariance(self.state))
        return self._covariance[1]

    def spectrum(self) -> Tensor:
        """Return the eigenvalues [C, K] of the precision that the data add, by this curvature."""
        return data_spectrum(self.state)

    def log_marginal_likelihood(
        self,
        prior_precision: float | None = None,
        sigma_noise: float | Sequence[float] | Tensor | None = None,
    ) -> float:
        """Return the evidence in nats, here or with other hyperparameters; see `evidence`."""
        given: dict[str, Any] = {"prior_precision": prior_precision, "sigma_noise": sigma_noise}
        state = replace(self.state, **{name: value for name, value in given.items() if value is not None})
        return float(evidence(state, torch.tensor([state.prior_precision], dtype=torch.float64)))

    def optimize_prior_precision(self, method: str = "marglik", **options: Any) -> float:
        """Set `prior_precision` to the best by evidence (marglik) or by held-out likelihood (gridsearch).

        Options are those of `find_precision_by_evidence` (`low`, `high`), or of
        `find_precision_by_held_out` (`batches`, `low`, `high`, `steps`).

        Raises:
            ValueError: for another method, or if there is no best value.
        """
        if method not in TUNERS:
            raise ValueError(f"method must be one of {sorted(TUNERS)}, got '{method}'")
        if method == "marglik":
            self.prior_precision = find_precision_by_evidence(self.state, **options)
        else:
            self.prior_precision = find_precision_by_held_out(
                self.state, self.features, self.layer, chunk=self.chunk, **options
            )
        return self.prior_precision

    def optimize_sigma_noise(self, degrees_of_freedom: bool = False) -> Tensor:
        """Set `sigma_noise` [levels] to that of the residuals; see `find_residual_sigma`."""
        self.sigma_noise = find_residual_sigma(self.state, degrees_of_freedom)
        return self.sigma_noise

    def optimize_temperature(self) -> float:
        """Set `temperature` so that the mean variance is the sandwich's; see `find_temperature`."""
        self.temperature = find_temperature(self.state)
        return self.temperature

    def fitted(self) -> LaplaceSums:
        """Return what the fit gathered, of the images seen; a ValueError says if there was none."""
        return self.state.fitted()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what `fit` and tuning found, as float64 tensors, without the options."""
        return self.state.tensors()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state of a posterior of the same network and options.

        Raises:
            ValueError: if that was fitted around other weights.
        """
        self.state = self.state.with_tensors(tensors)
