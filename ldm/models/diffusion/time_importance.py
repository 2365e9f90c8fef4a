"""Training times drawn more often where the loss is large (Nichol and Dhariwal 2021, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LossSecondMoments(nn.Module):
    """Times of a table drawn with p_t proportional to sqrt(E[L_t^2]), over the last losses of each time (eq. 18).

    Until every time has `history` losses the times are uniform. A share `uniform` of the draws stays uniform, so that
    every time goes on being seen. Weights 1 / (T p_t) keep the expected loss. The losses are buffers, saved with a run.

    Args:
        timesteps: T, entries of the table.
        history: losses kept of each time (guided-diffusion: 10).
        uniform: guided-diffusion: 0.001.
    """

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
        if bool((self.counts < history).any()):
            return even
        size = self.losses.square().mean(1).sqrt()
        return self.uniform * even + (1 - self.uniform) * size / size.sum()

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
        """Remember the losses [N] of times t [N], in their order, in place of the oldest."""
        history = self.losses.shape[1]
        for time, loss in zip(t.tolist(), losses.to(self.losses), strict=True):
            kept = int(self.counts[time])
            if kept == history:
                self.losses[time] = self.losses[time].roll(-1)
                kept -= 1
            self.losses[time, kept] = loss
            self.counts[time] = kept + 1
