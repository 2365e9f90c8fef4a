"""What is minimised in training: unreduced errors of the regression target, and their weights per time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.denoiser import Target
from ldm.diffusion.learned_variance import LearnedVariance
from ldm.diffusion.process import NoiseProcess, TableProcess
from ldm.diffusion.schedule import VPSchedule
from ldm.diffusion.weighting import BoundWeight, Weighting

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


def elementwise_error(output: Tensor, target: Tensor, loss_type: str = "l2") -> Tensor:
    """|output - target| (l1) or its square (l2), unreduced.

    Raises:
        ValueError: for another name.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type must be one of {sorted(LOSSES)}, got '{loss_type}'")
    return LOSSES[loss_type](output, target, reduction="none")


def elbo_weights(schedule: VPSchedule, parameterization: str, posterior_variance: Tensor) -> Tensor:
    """Weight of the error at each table entry in the variational bound, float64 [T] (Ho et al. 2020, eq. 12).

    Entry 0, where the posterior variance vanishes, takes the value of entry 1. For x_0 latent-diffusion's published
    weight is sqrt(alpha-bar) / (2 (2 - alpha-bar)) (a bracket is missing before 1 - alpha-bar); kept for parity.

    Raises:
        ValueError: for a parameterization without a published weight.
    """
    abar = schedule.log_abar[1:].exp()
    if parameterization in ("eps", "score"):
        weights = schedule.betas**2 / (2 * posterior_variance * (1 - schedule.betas) * (1 - abar))
    elif parameterization == "x0":
        weights = 0.5 * abar.sqrt() / (2 - abar)
    elif parameterization == "v":
        weights = torch.ones_like(abar)
    else:
        raise ValueError(f"no published bound weights for parameterization '{parameterization}'")
    return torch.cat([weights[1:2], weights[1:]]) if len(weights) > 1 else weights


@dataclass(frozen=True)
class ImageLosses:
    """The loss of each image and the parts that it is made of, each [B]; a part that a loss does not have is None.

    Args:
        total: what is minimised.
        simple: the mean error of what the network regresses.
        gamma: simple / exp(logvar) + logvar, where the logarithm of the loss's variance is learned.
        bound: the variational bound, or latent-diffusion's weighted error in its place.
    """

    total: Tensor
    simple: Tensor
    gamma: Tensor | None = None
    bound: Tensor | None = None

    def weighted(self, weights: Tensor) -> ImageLosses:
        """Return all parts times weights [B] of the images."""
        return replace(self, **{name: weights * value for name, value in vars(self).items() if value is not None})

    def batch_means(self, prefix: str) -> dict[str, Tensor]:
        """Return the means [] over the batch without gradients, under the names that are logged below `prefix`."""
        parts = {"loss_simple": self.simple, "loss_gamma": self.gamma, "loss_vlb": self.bound, "loss": self.total}
        return {f"{prefix}/{name}": value.mean().detach() for name, value in parts.items() if value is not None}


@dataclass(frozen=True)
class DiffusionLoss:
    """weight * mean error of what a network regresses, of each image.

    Args:
        process: the noising.
        target: what the network regresses.
        error: l1 or l2, see `elementwise_error`.
        weight: of the mean error (latent-diffusion: `l_simple_weight`).
        weighting: a weight per noise level beside it; None: 1 on what the network regresses.
    """

    process: NoiseProcess
    target: Target
    error: str = "l2"
    weight: float = 1.0
    weighting: Weighting | None = None

    def __call__(
        self, output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor, input_noise: Tensor | None = None
    ) -> ImageLosses:
        """Compare the network's output with its target, image by image.

        Args:
            output: of the network [B, C, H, W], or [B, 2 C, H, W] where it learns a variance.
            x_start: clean states [B, C, H, W].
            t: times [B], see `NoiseProcess`.
            noise: that of the target, like x_start.
            input_noise: what the network's input was noised with, where that is another.
        """
        simple = self.mean_error(output, x_start, t, noise)
        return ImageLosses(self.weight * self.weigh(simple, x_start, t), simple)

    def weigh(self, simple: Tensor, x_start: Tensor, t: Tensor) -> Tensor:
        """Return mean errors [B] under the weight of their noise levels."""
        if self.weighting is None:
            return simple
        return self.weighting.weigh(simple, self.process, self.target, t, x_start)

    def mean_error(self, output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the mean over channels and pixels of the error of an output [B, C, H, W]: [B]."""
        target = self.target.of(x_start, noise, *self.process.levels(t, x_start))
        return elementwise_error(output, target, self.error).mean(dim=(1, 2, 3))


@dataclass(frozen=True, kw_only=True)
class TableLoss(DiffusionLoss):
    """latent-diffusion's loss on a table of betas: weight (simple / exp(logvar) + logvar) + bound_weight bound.

    Args:
        logvar: logarithm of the loss's variance at each entry [T].
        bound_weights: weight of the error in the bound at each entry [T], see `elbo_weights`.
        bound_weight: of the bound (latent-diffusion: `original_elbo_weight`).
        learns_logvar: whether `logvar` trains, so that its part is reported.
    """

    logvar: Tensor
    bound_weights: Tensor
    bound_weight: float = 0.0
    learns_logvar: bool = False

    def __call__(
        self, output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor, input_noise: Tensor | None = None
    ) -> ImageLosses:
        simple = self.mean_error(output, x_start, t, noise)
        logvar = self.logvar[t]
        gamma = simple / logvar.exp() + logvar
        bound = self.bound_weights[t] * simple
        total = self.weight * gamma + self.bound_weight * bound
        return ImageLosses(total, simple, gamma if self.learns_logvar else None, bound)


@dataclass(frozen=True, kw_only=True)
class LearnedVarianceLoss(DiffusionLoss):
    """The loss of a network that learns the variance of ancestral steps as well (Nichol and Dhariwal 2021).

    Args:
        process: the noising, at the entries of a table.
        variance: how the bound enters the loss.
    """

    process: TableProcess
    variance: LearnedVariance

    def __call__(
        self, output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor, input_noise: Tensor | None = None
    ) -> ImageLosses:
        output, v = output.chunk(2, dim=1)
        simple = self.mean_error(output, x_start, t, noise)
        seen = noise if input_noise is None else input_noise
        bound = self.variance.bound(self.process.schedule, self.target, output, v, x_start, t, seen)
        return ImageLosses(self.variance.combine(self.weigh(simple, x_start, t), bound), simple, bound=bound)


@dataclass(frozen=True)
class LossSettings:
    """What a config says of a loss.

    Args:
        error: l1 or l2, see `elementwise_error`.
        weight: of the mean error (latent-diffusion: `l_simple_weight`).
        bound_weight: of the bound on a table of betas (latent-diffusion: `original_elbo_weight`).
        learns_logvar: whether the logarithm of the loss's variance at each entry of a table trains.
        variance: how the bound trains a learned variance; None: the variance is not learned.
        weighting: a weight per noise level, see `ldm.diffusion.weighting`; None: the keys above are all.
    """

    error: str = "l2"
    weight: float = 1.0
    bound_weight: float = 0.0
    learns_logvar: bool = False
    variance: LearnedVariance | None = None
    weighting: Weighting | None = None

    def check(self, timesteps: int | None) -> None:
        """Make sure that what is set goes together, on a table of `timesteps` entries (None: a continuous schedule).

        Raises:
            ValueError: naming the keys of a config that contradict each other.
        """
        if self.weighting is None:
            return
        others = {
            "original_elbo_weight": bool(self.bound_weight),
            "learn_logvar: true": self.learns_logvar,
            "learned_variance: vlb": self.variance is not None and self.variance.loss == "vlb",
        }
        if named := [name for name, is_set in others.items() if is_set]:
            raise ValueError(
                f"loss_weight is the whole weight of the loss, and {', '.join(named)} is another: leave one of them "
                "out (loss_weight: vlb is the bound's, loss_weight: learned learns a log variance)"
            )
        if self.error != "l2":
            raise ValueError(f"loss_weight weighs squared errors: leave out loss_type: {self.error}, or loss_weight")
        if isinstance(self.weighting, BoundWeight) and (timesteps is None or timesteps < 2):
            raise ValueError(
                "loss_weight: vlb is that of the steps of a table of betas: a continuous schedule has none, and its "
                "bound is infinite where it reaches clean data or pure noise; take simple, sigmoid or another"
            )

    def build(
        self, process: NoiseProcess, target: Target, logvar: Tensor | None, bound_weights: Tensor | None
    ) -> DiffusionLoss:
        """Make the loss of a noise process.

        Args:
            process: the noising.
            target: what the network regresses.
            logvar: logarithm of the loss's variance at each entry of a table [T]; None on a continuous schedule.
            bound_weights: weight of the bound at each entry [T], likewise.
        """
        if isinstance(process, TableProcess) and self.variance is not None:
            return LearnedVarianceLoss(
                process=process,
                target=target,
                error=self.error,
                weight=self.weight,
                weighting=self.weighting,
                variance=self.variance,
            )
        if self.weighting is not None or logvar is None or bound_weights is None:
            return DiffusionLoss(process, target, self.error, self.weight, self.weighting)
        return TableLoss(
            process,
            target,
            self.error,
            self.weight,
            logvar=logvar,
            bound_weights=bound_weights,
            bound_weight=self.bound_weight,
            learns_logvar=self.learns_logvar,
        )
