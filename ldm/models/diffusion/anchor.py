"""The prior of an anchored member, a quadratic pull of its heads to their own draw of it, and noise of its targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.diffusion.noise import keyed_normal
from ldm.models.protocols import HasParameters


@dataclass(frozen=True)
class TargetNoise:
    """Noise of the targets of one member: of each training image its own, the same whenever the image is seen.

    Source: Pearce et al. 2020, section 3; Osband et al. 2018 (randomised prior functions).

    Args:
        seed, member: of the draws.
        deviation: its standard deviation, in units of what the network regresses.
    """

    seed: int
    member: int
    deviation: float

    def __call__(self, images: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return the noise [B, *shape] of images by their number in the data set, on the CPU."""
        keys = [("targets", self.seed, self.member, image) for image in images]
        return self.deviation * keyed_normal(keys, shape)


class Anchor(nn.Module):
    """The pull of an anchored member to its own draw of the prior (Pearce et al. 2020, arXiv 1810.05546).

        penalty = strength / (2 N D) sum_k (theta_k - anchor_k)^2 / s_k^2

    with N training images of D entries, anchor_k a draw of the prior N(pretrained_k, s_k^2) and `strength` the
    precision multiplier. Beside a loss that is a mean over images and entries, its weight depends neither on the batch
    size nor on the resolution: with noise of variance sigma^2 in every entry their loss is strength = 2 sigma^2.

    What the members are, where outputs are linear in theta (y = X theta + noise, P = diag(1 / s^2) the prior's
    precision, S = (X^T X / sigma^2 + P)^-1 the posterior's covariance): a minimum is S (X^T y / sigma^2 + P anchor), so
    members spread by

        S P S                                     of the anchors alone, targets being the same for all
        S P S + S (X^T X / sigma^2) S = S         with a `TargetNoise` of deviation sigma: draws of the posterior

    S P S is below S, and vanishes against it as the data decide: without noise of the targets members are no draws of
    the posterior. Members on bootstraps of the images in place of that noise spread by S P S + S (sandwich) S, which
    is S on average if the noise is as assumed and there are many images; one image has no bootstrap but itself.

    Holds its tensors as buffers that are not saved: they are drawn again from the member's seed.

    Args:
        anchors: {parameter name: value}.
        deviations: {parameter name: s}, broadcasting to the value; infinite where nothing pulls.
        strength: the precision multiplier, see above.
        entries: D, the entries of one image.

    Attributes:
        noise_deviation: sigma, the deviation of the noise in every entry that `strength` stands for.

    Raises:
        ValueError: if the prior of a parameter has no width.
    """

    def __init__(self, anchors: Mapping[str, Tensor], deviations: Mapping[str, Tensor], strength: float, entries: int):
        super().__init__()
        self.names = tuple(anchors)
        self.strength = strength / entries
        self.noise_deviation = (strength / 2) ** 0.5  # sigma
        for number, name in enumerate(self.names):
            if not bool((deviations[name] > 0).all()):
                raise ValueError(
                    f"the prior of '{name}' has no width: heads.noise times the spread of its rows is 0; take another "
                    "heads.noise, or heads.init: perturbed"
                )
            self.register_buffer(f"centre{number}", anchors[name].detach().clone(), persistent=False)
            self.register_buffer(f"precision{number}", deviations[name].detach() ** -2.0, persistent=False)

    def centre(self, name: str) -> Tensor:
        """Return the anchor of a parameter."""
        return self.get_buffer(f"centre{self.names.index(name)}")

    def precision(self, name: str) -> Tensor:
        """Return 1 / s^2 of a parameter, broadcasting to it."""
        return self.get_buffer(f"precision{self.names.index(name)}")

    def pull(self, name: str, images: int) -> Tensor:
        """Return the factor of the penalty's gradient, pull * (theta - anchor), broadcasting to the parameter."""
        return self.strength / images * self.precision(name)

    def penalty(self, module: HasParameters, images: int, leave_out: Iterable[str] = ()) -> Tensor:
        """Return the penalty [] of a module's parameters, those of `leave_out` taken as constants (no gradient)."""
        total = torch.zeros((), device=self.centre(self.names[0]).device)
        constants = frozenset(leave_out)
        for name in self.names:
            parameter = module.get_parameter(name)
            value = parameter.detach() if name in constants else parameter
            total = total + (self.precision(name) * (value - self.centre(name)).square()).sum()
        return self.strength / (2 * images) * total
