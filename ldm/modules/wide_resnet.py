"""A wide residual network that classifies noisy images, conditioned on their noise level (WRN-28-10)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with C / 4 groups, at most 32, and fewer where those do not divide C."""
    groups = min(channels // 4, 32)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


def standardised(images: Tensor) -> Tensor:
    """Each image [B, C, H, W] at mean 0 and deviation 1; the deviation is at least 1 / sqrt(C H W)."""
    flat = images.flatten(1)
    deviation = flat.std(1, correction=0).clamp(min=flat.shape[1] ** -0.5)
    return (images - flat.mean(1)[:, None, None, None]) / deviation[:, None, None, None]


class FourierEmbedding(nn.Module):
    """Sines and cosines [B, 2 F] of a condition [B] at F frozen frequencies, normal with deviation `scale`.

    Source: Tancik et al. 2020, as Song et al. 2021b embed noise levels.
    """

    def __init__(self, frequencies: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(scale * nn.init.normal_(torch.empty(frequencies)), requires_grad=False)

    def forward(self, condition: Tensor) -> Tensor:
        angles = 2 * math.pi * condition.to(self.weight)[:, None] * self.weight
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class WideBlock(nn.Module):
    """Norm, ReLU and convolution twice over a skip without parameters: averaging, and zeros for new channels."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, stride: int):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.emb = nn.Linear(emb_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.stride, self.added = stride, out_channels - channels

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        h = h + self.emb(F.relu(emb))[:, :, None, None]
        h = self.conv2(F.relu(self.norm2(h)))
        skip = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        return h + F.pad(skip, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))


class WideResNet(nn.Module):
    """Logits of noisy images at a noise level.

    Args:
        depth: 6 n + 4 layers, n blocks in each of three stages; width: multiplies 16, 32, 64 channels.
        classes: K; in_channels: of the images.
        frequencies, scale, emb_channels: of the embedding of the condition.

    Raises:
        ValueError: for a depth that is not 6 n + 4.

    Source: Zagoruyko & Komodakis 2016 (arXiv 1605.07146), with the noise conditioning of Song et al. 2021b. WRN-28-10
    on ten classes of colour images has 38,913,114 trained parameters.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        classes: int = 10,
        in_channels: int = 3,
        frequencies: int = 128,
        scale: float = 16.0,
        emb_channels: int = 512,
    ):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, ..), got {depth}")
        self.embedding = FourierEmbedding(frequencies, scale)
        self.emb1 = nn.Linear(2 * frequencies, emb_channels)
        self.emb2 = nn.Linear(emb_channels, emb_channels)
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        channels, self.blocks = 16, nn.ModuleList()
        for stage, out_channels in enumerate(16 * width * 2**stage for stage in range(3)):
            for index in range((depth - 4) // 6):
                stride = 2 if stage and not index else 1
                self.blocks.append(WideBlock(channels, out_channels, emb_channels, stride))
                channels = out_channels
        self.norm = group_norm(channels)
        self.out = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W], standardised here, at conditions [B]: t / T (VP) or ln sigma (VE)."""
        emb = self.emb2(F.relu(self.emb1(self.embedding(condition))))
        h = self.conv(standardised(x))
        for block in self.blocks:
            h = block(h, emb)
        return self.out(F.relu(self.norm(h)).mean((2, 3)))
