"""Closed-form networks of the goldens edm and es, as their json defines them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldm.diffusion.schedule import EDMSchedule, VPSchedule


def edm_toy():
    """F(x, c, labels) of the EDM goldens."""

    def network(x, t, labels):
        c = t.reshape(-1, 1, 1, 1)
        out = 0.6 * torch.tanh(1.3 * x) * torch.cos(c) + 0.25 * x.roll(1, -1) - 0.15 * x.roll(1, -2) * torch.sin(c)
        out = out + 0.05 * c
        if labels is not None:
            out = out + 0.1 * (labels @ torch.arange(1.0, labels.shape[1] + 1)).reshape(-1, 1, 1, 1)
        return out

    return network


def vp_toy(x, t, cond=None):
    c = t.reshape(-1, 1, 1, 1)
    return 0.9 * x + 0.1 * torch.tanh(2 * x.roll(1, -1)) + 0.05 * torch.sin(c / 100) * x.roll(1, -2)


iddpm_toy = vp_toy


def ve_toy(x, t, cond=None):
    """The published network gives minus eps."""
    c = t.reshape(-1, 1, 1, 1)
    return 0.95 * x / ((2 * torch.exp(c)) ** 2 + 0.25).sqrt() - 0.1 * torch.tanh(x.roll(1, -1))


def es_toy(x, t, cond=None):
    c = t.reshape(-1, 1, 1, 1)
    return 0.8 * x + 0.2 * torch.tanh(2 * x.roll(1, -1)) + 0.1 * torch.sin(c / 100) * x.roll(1, -2)


def es_toy_learned(x, t, cond=None):
    return torch.cat([es_toy(x, t), 0.5 * torch.tanh(x.roll(2, -1))], 1)


@dataclass(frozen=True)
class HalfLogPath(EDMSchedule):
    """EDM's schedule with the network time of VE models, ln(sigma / 2)."""

    def time_to_net(self, u):
        return (torch.as_tensor(u, dtype=torch.float64) / 2).log()


class CosineTimes(VPSchedule):
    """A table whose network takes the nearest entry, as iDDPM models under EDM's samplers do."""

    def time_to_net(self, u):
        return (torch.as_tensor(u, dtype=torch.float64) - 1).round()
