"""Training times drawn more often where the loss is large (Nichol and Dhariwal 2021, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment")


class LossSecondMoments(nn.Module):
    """Times of a table drawn with p_t proportional to sqrt(E[L_t^2]), over the last losses of each time (eq. 18).

    Until every time has `history` losses the times are uniform. A share `uniform` of the draws stays uniform, so that
    every time goes on being seen. Weights 1 / (T p_t) keep the expected loss. The losses are buffers, saved with a run.

    Args:
        timesteps: T, entries of the table.
        history: losses kept of each time (guided-diffusion: 10).
        uniform: guided-diffusion: 0.001.
    """

    losses: Tensor
    counts: Tensor

    def __init__(self, timesteps: int, history: int = 10, uniform: float = 1e-3):
        super().__init__()
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(timesteps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(timesteps, dtype=torch.int64))

    @property
    def probabilities(self) -> Tensor:
        """p_t, float64 [T]."""
        timesteps, history = self.losses.shape
        even = torch.full_like(self.losses[:, 0], 1 / timesteps)
        size = self.losses.square().mean(1).sqrt()
        uneven = self.uniform * even + (1 - self.uniform) * size / size.sum()
        return torch.where((self.counts < history).any(), even, uneven)

    def times(self, uniform: Tensor) -> Tensor:
        """Times [...] in 0 .. T - 1 for uniform draws [...] in [0, 1): quantiles of p_t."""
        edges = self.probabilities.cumsum(0)
        found = torch.searchsorted(edges / edges[-1], uniform.to(edges), right=True)
        return found.clamp(max=len(edges) - 1)

    def weights(self, t: Tensor) -> Tensor:
        """1 / (T p_t) of times t [B], float64."""
        return 1 / (len(self.counts) * self.probabilities[t])

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses [N] of times t [N], in their order, in place of the oldest. The device is not waited for.

        Raises:
            ValueError: if there are not as many losses as times.
        """
        if t.shape != losses.shape:
            raise ValueError(f"expected a loss for each time, got times {tuple(t.shape)}, losses {tuple(losses.shape)}")
        timesteps, history = self.losses.shape
        t, order = t.to(self.counts).sort(stable=True)
        earlier = torch.arange(len(t), device=t.device) - torch.searchsorted(t, t)  # new losses of the same time before
        total = self.counts.index_add(0, t, torch.ones_like(t))
        dropped = (total - history).clamp(min=0)
        place = self.counts[t] + earlier - dropped[t]
        columns = torch.arange(history, device=t.device) + dropped[:, None]
        kept = self.losses.gather(1, columns.clamp(max=history - 1)).flatten()
        slots = torch.where(place < 0, timesteps * history, t * history + place)  # the last: dropped
        kept = torch.cat([kept, kept.new_zeros(1)]).scatter(0, slots, losses.to(kept)[order])
        self.losses.copy_(kept[:-1].view_as(self.losses))
        self.counts.copy_(total.clamp(max=history))


def make_importance(schedule_sampler: str, timesteps: int | None) -> LossSecondMoments | None:
    """Make the law of training times that a config's `schedule_sampler` names; None for the uniform one.

    Raises:
        ValueError: for an unknown name, or for another law than the uniform one on a continuous schedule.
    """
    if schedule_sampler not in SCHEDULE_SAMPLERS:
        raise ValueError(f"schedule_sampler must be one of {SCHEDULE_SAMPLERS}, got '{schedule_sampler}'")
    if schedule_sampler == "uniform":
        return None
    if timesteps is None:
        raise ValueError(
            f"schedule_sampler: {schedule_sampler} is one of those that belong to a table of betas: leave it out (a "
            "continuous schedule has times_config), or leave out schedule_config"
        )
    return LossSecondMoments(timesteps)
