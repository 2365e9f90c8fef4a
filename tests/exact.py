"""A network whose denoiser is exact for Gaussian data: models of samples and of biases in closed form."""

import torch

from ldm.diffusion.schedule import VPSchedule
from ldm.experiments.toy import GaussianDenoiser


class ExactNetwork(torch.nn.Module):
    """The output that a model of N(mean, variance) gives for any condition.

    Args:
        model: whose schedule and target it has.
        mean, variance: of every element of the data.
        factor: how many times too long the noise is that it predicts.
    """

    needs_choices = False

    def __init__(self, model, mean, variance, factor=1.0):
        super().__init__()
        self.schedule = model.schedule
        self.target = model.target
        self.factor = factor
        shape = model.latent_shape
        self.exact = GaussianDenoiser(self.schedule, torch.full(shape, mean), torch.full(shape, variance))

    def forward(self, x, t, cond=None):
        """Return the regressed output [B, C, H, W] for states x [B, C, H, W] and times t [B] of a network."""
        u = self.time(t.double())
        found = self.exact(x, u)
        if self.factor == 1:
            x0, eps = found.x0, found.eps
        else:
            alpha, sigma = self.schedule.coefficients(u, x)
            eps = self.factor * found.eps
            x0 = (x - sigma * eps) / alpha
        return self.target.of(x0, eps, *self.schedule.coefficients(u, x))

    def time(self, t):
        """Return the schedule's time of a network's."""
        if isinstance(self.schedule, VPSchedule):
            return t + 1
        return t / self.schedule.time_scale
