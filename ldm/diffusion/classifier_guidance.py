"""Guidance by a classifier of noisy images (Dhariwal and Nichol 2021, section 4): s times grad_x log p(y | x_u).

Ancestral sampling adds variance times that gradient to the mean of a step (algorithm 1): `ClassifierScore.mean_shift`.
Every other sampler takes it as a change of the predicted noise (algorithm 2): `classifier_guided`. It is the last
wrapper, after scaling and clipping, so that epsilon scaling does not divide the gradient and no bound cuts it off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad
from torch.nn import functional as F

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.schedule import Schedule

Classifier = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ClassifierScore:
    """scale times grad_x log p(y | x_u), of the shape of x.

    Args:
        classifier: (x [N, C, H, W], time of the network [N]) -> logits [N, K].
        schedule: of the diffusion model, which the classifier must have been trained on.
        labels: y [B]; states with members [M, B, C, H, W] share them.
    """

    classifier: Classifier
    schedule: Schedule
    labels: Tensor
    scale: float = 1.0

    def __call__(self, x: Tensor, u: Tensor | float) -> Tensor:
        flat = x.reshape(-1, *x.shape[-3:])
        time = self.schedule.time_to_net(u).to(device=x.device, dtype=torch.float32).expand(x.shape[-4])
        repeats = len(flat) // x.shape[-4]

        def likelihood(state: Tensor) -> Tensor:
            logits = self.classifier(state, time.repeat(repeats))
            chosen = F.log_softmax(logits.to(x.dtype), -1).gather(-1, self.labels.repeat(repeats)[:, None])
            return chosen.sum()

        return self.scale * grad(likelihood)(flat).reshape(x.shape)

    def mean_shift(self, x: Tensor, u: float, variance: Tensor) -> Tensor:
        """What ancestral sampling adds to the mean of a step from (x, u) with this variance."""
        return variance.to(x) * self(x, u)


@dataclass(frozen=True)
class ClassifierGuidedDenoiser:
    """eps' = eps - sigma score, x_0' = x_0 + (sigma^2 / alpha) score: the score of p(x | y) for that of p(x).

    Where there is no data (alpha = 0: a flow's first point) the state says nothing of its class, and nothing changes.
    """

    denoiser: Denoiser
    score: ClassifierScore

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        prediction = self.denoiser(x, u)
        alpha, sigma = self.score.schedule.per_image(u)
        shift = self.score(x, u)
        share = torch.where(alpha > 0, sigma, 0.0).to(x)
        moved = torch.where(alpha > 0, sigma**2 / alpha, 0.0).to(x)
        return Prediction(prediction.x0 + moved * shift, prediction.eps - share * shift, prediction.var_fraction)


def classifier_guided(denoiser: Denoiser, score: ClassifierScore | None) -> Denoiser:
    """`denoiser` guided by a classifier; scale 0 or no score returns it unchanged."""
    return denoiser if score is None or score.scale == 0 else ClassifierGuidedDenoiser(denoiser, score)
