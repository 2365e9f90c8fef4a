"""The library's one probabilistic value: Gaussians with diagonal covariance, one for each ensemble member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, init=False)
class Gaussian:
    """M diagonal Gaussians N(mean_i, diag(var_i)), together the equal-weight mixture (1/M) sum_i N(mean_i, var_i).

    Args:
        mean: [M, B, ...] (images: [M, B, C, H, W]), latent or pixel units.
        var: anything that broadcasts to `mean`, units squared; a number or a 0-d tensor is shared by all elements,
            and 0 means zero covariance (DDIM with eta = 0). It is kept as a tensor.

    Raises:
        ValueError: if `mean` has no member and batch axes, or `var` does not broadcast to it.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, mean: Tensor, var: Tensor | float = 0.0) -> None:
        if mean.ndim < 2 or not mean.is_floating_point():
            raise ValueError(
                f"mean must be a floating-point tensor [M, B, ...] with the member axis first, got {mean.dtype} "
                f"{tuple(mean.shape)}; for one member use mean[None]"
            )
        kept = torch.as_tensor(var, dtype=mean.dtype if isinstance(var, (int, float)) else None).to(mean.device)
        fits = kept.ndim <= mean.ndim and all(
            size in (1, full) for size, full in zip(kept.shape[::-1], mean.shape[::-1], strict=False)
        )
        if not fits:
            raise ValueError(f"var {tuple(kept.shape)} does not broadcast to mean {tuple(mean.shape)}")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "var", kept)

    @property
    def members(self) -> int:
        """M, the size of the first axis."""
        return self.mean.shape[0]

    @property
    def std(self) -> Tensor:
        """Standard deviation, the square root of `var`, in its (broadcastable) shape."""
        return self.var.sqrt()

    def select(self, members: Sequence[int]) -> Gaussian:
        """The Gaussian of the listed members, in that order.

        Raises:
            ValueError: if the list is empty or names a member that does not exist.
        """
        chosen = check_members(members, self.members)
        index = torch.tensor(chosen, device=self.mean.device)
        own = self.var.ndim == self.mean.ndim and self.var.shape[0] == self.members
        return Gaussian(self.mean[index], self.var[index] if own else self.var)

    def moment_match(self) -> Gaussian:
        """The one Gaussian with the mixture's mean and variance, as a Gaussian with M = 1.

            mean = (1/M) sum_i mean_i,    var = (1/M) sum_i var_i + (1/M) sum_i (mean_i - mean)^2

        The two parts of the variance are the law of total variance; shapes [1, B, ...], float type of `mean`.
        """
        mean = self.mean.mean(0, keepdim=True)
        within = self.var.expand_as(self.mean).mean(0, keepdim=True)
        return Gaussian(mean, within + (self.mean - mean).square().mean(0, keepdim=True))


def check_members(members: Sequence[int], count: int) -> list[int]:
    """Return the member numbers as a list after checking that they exist and do not repeat.

    Raises:
        ValueError: if there are none, one is outside 0 .. count - 1, or one repeats.
    """
    chosen = [int(member) for member in members]
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0 or max(chosen) >= count:
        raise ValueError(f"members must be different numbers from 0 to {count - 1}, at least one; got {chosen}")
    return chosen
