"""Last-layer Laplace: the exact posterior of a network's last layer on its frozen features, and its evidence.

    output_p = W a_p,   target_p ~ N(output_p, sigma_noise^2 I),   W ~ N(prior_mean, I / prior_precision)

with a_p the unfolded features at position p. So this is Bayesian linear regression: the curvature of the likelihood is
I_C (x) A, A = sum a a^T, one matrix for all output channels, and every variance has a closed form without Jacobians.

Sources: Kou et al. 2024 (BayesDiff); Daxberger et al. 2021 (last-layer Laplace; the names of the methods).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.ensembles.members import Members
from ldm.laplace.covariance import Covariance
from ldm.laplace.curvature import CURVATURES, Curvature, check_curvature
from ldm.laplace.hyperparameters import Hyperparameters
from ldm.laplace.layer import LastLayer, split_network
from ldm.laplace.state import gather, restore, state_of
from ldm.laplace.statistics import Observation, Statistics
from ldm.laplace.tuning import TUNERS, evidence, residual_sigma


class LastLayerLaplace(Hyperparameters):
    """Posterior over the last layer of `network(x, t, cond)`; the trained weights are its mean.

    Args:
        network: in evaluation mode; see `split_network`. Nothing in it is changed.
        layer: name of the last layer, found where None.
        curvature: full (exact), diag (diagonal of the exact one), kron (weights and biases apart), lowrank (leading
            `rank` eigenvectors), ef (diagonal empirical Fisher), isotropic (no data but their number: a map of feature
            energy), sandwich (sampling covariance of the fit, clustered by image).
        prior_precision: of each parameter, in 1 / parameter units squared, above 0.
        prior_mean: a number, or a matrix [C, K (+ 1)] (weights flattened, then the bias).
        sigma_noise: standard deviation of targets around outputs, above 0; one, or one for each noise level.
        temperature: divides the likelihood's precision (laplace-torch's convention).
        outputs: number of leading output channels that are regressed; all where None.
        published_ef: the empirical Fisher as published (BayesDiff): doubled, and over sigma^2 instead of sigma^4.
        time_edges: ascending times t of the network that part noise levels, each with its own sigma_noise.
        chunk: images whose patches are held at once.

    Raises:
        ValueError: for a layer or a value that gives no posterior, with the reason.
    """

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
        chunk: int = 4,
    ):
        check_curvature(curvature, len(time_edges) + 1)
        if list(time_edges) != sorted(set(time_edges)):
            raise ValueError(f"time_edges must ascend, got {list(time_edges)}")
        self.features, module, self.name = split_network(network, layer)
        self.layer = LastLayer(module, len(module.weight) if outputs is None else outputs)
        self.curvature, self.rank, self.published_ef = curvature, rank, published_ef
        self.time_edges, self.chunk = tuple(float(edge) for edge in time_edges), chunk
        self.statistics: Statistics | None = None
        self.repeats, self.data_size = 1, 0
        shape = (self.layer.outputs, self.layer.width)
        super().__init__(shape, len(self.time_edges) + 1, prior_precision, prior_mean, sigma_noise, temperature)

    @property
    def mean(self) -> Tensor:
        """The trained parameters [C, K (+ 1)], float64."""
        return self.layer.matrix()

    @torch.no_grad()
    def fit(
        self,
        batches: Iterable[Observation],
        *,
        draws: int = 1,
        data_size: int | None = None,
        override: bool = True,
        also: Sequence[str] = (),
    ) -> LastLayerLaplace:
        """Gather the statistics of a stream of batches; the trunk runs once on each.

        Args:
            batches: rows of one image follow each other, `draws` to an image, none split between batches.
            draws: R, noise draws for each image.
            data_size: images of the training set, which those seen stand for; the number seen where None.
            override: forget what was gathered before; False adds to it.
            also: further curvatures that `with_curvature` shall be able to give.

        Raises:
            ValueError: as `gather`; or if what was gathered before had other `draws`.
        """
        wanted = [CURVATURES[name] for name in (self.curvature, *also)]
        gram, meat = any(kind.gram for kind in wanted), any(kind.meat for kind in wanted)
        gathered = gather(self, batches, draws, gram, meat)
        if self.statistics is not None and not override:
            if draws != self.repeats:
                raise ValueError(f"fitted with {self.repeats} draws an image, cannot add {draws}")
            gathered = self.statistics + gathered
            data_size = data_size or max(self.data_size, int(gathered.images))
        return self.take(gathered, draws, data_size)

    def merge(self, other: LastLayerLaplace) -> LastLayerLaplace:
        """Add another fit of the same network to other images; the larger `data_size` (or images seen) counts.

        Raises:
            ValueError: if either is not fitted, or they are fits of other networks, layers or numbers of draws.
        """
        if not torch.equal(self.mean.cpu(), other.mean.cpu()) or self.repeats != other.repeats:
            raise ValueError("these are fits of other weights or of another number of draws an image")
        both = self.fitted() + other.fitted()
        return self.take(both, self.repeats, max(self.data_size, other.data_size, int(both.images)))

    def with_curvature(
        self, curvature: str, rank: int | None = None, published_ef: bool | None = None
    ) -> LastLayerLaplace:
        """The same fit seen through another curvature, which `fit(also=)` gathered for."""
        check_curvature(curvature, len(self.sigma_noise))
        other = copy.copy(self)
        other.curvature, other._covariance = curvature, None
        other.rank = self.rank if rank is None else rank
        other.published_ef = self.published_ef if published_ef is None else published_ef
        return other

    @torch.no_grad()
    def __call__(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, null: Tensor | None = None, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of the network's output, without the noise of targets; exact under guidance.

        The output is linear in the features, so guided ones, features_null + s (features_cond - features_null), give
        the law of the guided output: one weight matrix serves both halves (the bias's 1 stays 1).

        Args:
            x: the network's input [B, C, H, W]; t [B]; cond and the null condition `null` [B] or None.
            scale: guidance s; 1 is off.

        Returns mean and variance, each [B, outputs, H, W], in the network's output units (squared).
        """
        return self.predict(self.guided_features(x, t, cond, null, scale))

    def guided_features(self, x: Tensor, t: Tensor, cond: Tensor | None, null: Tensor | None, scale: float) -> Tensor:
        """Input of the last layer [B, F, H, W], combined as guidance combines outputs; arguments of `__call__`."""
        features = self.features(x, t, cond)
        if scale == 1:
            return features
        if cond is None or null is None:
            raise ValueError(f"guidance scale {scale} needs a condition and a null condition; use scale 1")
        return torch.lerp(self.features(x, t, null), features, scale)

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the output from the last layer's input."""
        return self.output(features), self.covariance().variance(self.layer, features, self.chunk)

    def output(self, features: Tensor) -> Tensor:
        """The regressed channels of the layer's output."""
        return self.layer.regressed(self.layer.layer(features))

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator, antithetic: bool = False) -> Members:
        """Draws of the parameters as members of a posterior, keys as in the network's state dict.

        With `antithetic`, members come in pairs mean + d, mean - d, whose mean is the network itself.
        """
        if count < 1 or (antithetic and count % 2):
            raise ValueError(f"expected at least one member, an even number if antithetic, got {count}")
        shape = (count // 2 if antithetic else count, self.layer.outputs, self.layer.width)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.mean)
        change = self.covariance().correlate(noise)
        change = torch.stack([change, -change], 1).flatten(0, 1) if antithetic else change
        stacked = self.layer.overrides(self.mean + change)
        return Members({f"{self.name}.{key}": value for key, value in stacked.items()})

    def covariance(self) -> Covariance:
        """Posterior covariance of a row of parameters; factorised once for given hyperparameters."""
        if self._covariance is None:
            self._covariance = CURVATURES[self.curvature].covariance(self.posterior_curvature())
        return self._covariance

    @property
    def scale(self) -> float:
        """Images of the data set for each image seen."""
        return self.data_size / float(self.fitted().images)

    def log_marginal_likelihood(
        self, prior_precision: float | None = None, sigma_noise: float | Sequence[float] | Tensor | None = None
    ) -> float:
        """Laplace evidence ln p(targets) in nats, of this posterior or with other hyperparameters.

            ln N(targets; outputs, sigma^2) - precision |W - prior_mean|^2 / 2 - (1/2) ln det(I + data / precision)

        Exact for `full` where the trained weights are the regression's optimum.
        """
        other = copy.copy(self)
        if prior_precision is not None:
            other.prior_precision = prior_precision
        if sigma_noise is not None:
            other.sigma_noise = sigma_noise
        return float(evidence(other, torch.tensor([other.prior_precision], dtype=torch.float64)))

    def optimize_prior_precision(self, method: str = "marglik", **options: Any) -> float:
        """Set `prior_precision` to the best by evidence (marglik) or by held-out likelihood (gridsearch).

        Options: `low`, `high` (bounds); for gridsearch `batches` (held-out observations) and `steps`. See `tuning`.
        """
        if method not in TUNERS:
            raise ValueError(f"method must be one of {sorted(TUNERS)}, got '{method}'")
        self.prior_precision = TUNERS[method](self, **options)
        return self.prior_precision

    def optimize_sigma_noise(self, degrees_of_freedom: bool = False) -> Tensor:
        """Set `sigma_noise` to its maximum likelihood from the residuals, for each noise level; see `tuning`."""
        self.sigma_noise = residual_sigma(self, degrees_of_freedom)
        return self.sigma_noise

    def spectrum(self) -> Tensor:
        """Eigenvalues [C, K] of the precision that the data add, by this curvature."""
        return CURVATURES[self.curvature].spectrum(self.posterior_curvature())

    def posterior_curvature(self) -> Curvature:
        """Statistics and hyperparameters, as curvatures take them."""
        return Curvature(
            self.fitted(),
            self.scale,
            self.sigma_noise.to(self.mean.device),
            self.prior_precision,
            self.temperature,
            self.layer.bias,
            self.rank,
            self.published_ef,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that `fit` and tuning found, as float64 tensors; `options` holds the rest."""
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of a posterior of the same network and options.

        Raises:
            ValueError: if it was fitted around other weights.
        """
        restore(self, state)

    def noise_variance(self, t: Tensor) -> Tensor:
        """sigma_noise^2 at the network's times t [B], float64."""
        return self.sigma_noise.to(t.device).square()[self.level(t)]

    def level(self, t: Tensor) -> Tensor:
        """Noise level of each time t [B]."""
        edges = torch.tensor(self.time_edges, dtype=torch.float64, device=t.device)
        return torch.bucketize(t.double(), edges)

    def fitted(self) -> Statistics:
        """What `fit` gathered, of the images seen."""
        if self.statistics is None:
            raise ValueError("this posterior is not fitted: call fit(batches) or load it")
        return self.statistics

    def take(self, statistics: Statistics, draws: int, data_size: int | None) -> LastLayerLaplace:
        """Use these statistics of images with `draws` draws each, standing for `data_size` images."""
        self.statistics, self.repeats = statistics, draws
        self.data_size = int(statistics.images) if data_size is None else data_size
        self._covariance = None
        return self
