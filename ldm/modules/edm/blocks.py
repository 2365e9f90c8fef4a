"""Blocks of EDM's networks: embeddings, resampling convolutions and residual blocks; key names as published.

Source: Karras et al. 2022 (arXiv 2206.00364, appendix F.2); the blocks unify those of Song et al. 2021b and of Dhariwal
and Nichol 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import attend
from ldm.modules.diffusionmodules.util import GroupNorm32

NORM_CHANNELS = 4  # The least number of channels in a group of a norm.


@dataclass(frozen=True)
class Initial:
    """Law of initial weights: uniform or normal, scaled to the fans of a layer.

    Args:
        kind: "xavier" is uniform of variance 2 / (fan in + fan out); "kaiming" uniform and "kaiming_normal" normal are
            of variance 1 / fan in.
        weight, bias: factors on what weights and biases draw.
    """

    kind: str = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    def fill(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Draw the weight and the bias of a layer, which a layer without storage (device "meta") has not."""
        if layer.weight.is_meta:
            return
        fan_in = layer.weight[0].numel()
        fan_out = layer.weight.shape[0] * layer.weight[0, 0].numel()
        for parameter, factor in ((layer.weight, self.weight), (layer.bias, self.bias)):
            if parameter is None:
                continue
            if self.kind == "kaiming_normal":
                nn.init.normal_(parameter, std=factor * fan_in**-0.5)
            else:
                variance = 1 / fan_in if self.kind == "kaiming" else 2 / (fan_in + fan_out)
                bound = factor * (3 * variance) ** 0.5
                nn.init.uniform_(parameter, -bound, bound)


def make_linear(channels: int, out_channels: int, initial: Initial, bias: bool = True) -> nn.Linear:
    """Make a linear layer with initial weights of a law."""
    layer = nn.Linear(channels, out_channels, bias)
    initial.fill(layer)
    return layer


def grouped_norm(channels: int, eps: float) -> GroupNorm32:
    """Make a group norm of at most 32 groups, each of at least 4 channels."""
    return GroupNorm32(min(32, channels // NORM_CHANNELS), channels, eps=eps)


class PositionalEmbedding(nn.Module):
    """Cosines and sines `[B, C]` of a time: `w_i = 10000^(-i / (C/2))`, or with `endpoint` `-i / (C/2 - 1)`."""

    def __init__(self, channels: int, endpoint: bool = False):
        super().__init__()
        self.channels, self.endpoint = channels, endpoint

    def forward(self, t: Tensor) -> Tensor:
        half = self.channels // 2
        share = torch.arange(half, dtype=t.dtype, device=t.device) / (half - self.endpoint)
        angles = t[:, None] * (1 / 10000) ** share  # [B, C / 2]
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class RandomFrequencies(nn.Module):
    """Cosines and sines `[B, C]` of 2 pi w_i t, with frequencies w_i drawn once from N(0, 16^2)."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", nn.init.normal_(torch.empty(channels // 2), std=scale))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * (2 * math.pi * self.freqs).to(t.dtype)  # the bracket is rounded first, as published
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResamplingConv(nn.Conv2d):
    """A convolution after doubling or halving the size by a filter; with `fused` a halving comes after it.

    Args:
        channels, out_channels, kernel: of the convolution, whose output has the size of its input.
        resample: -1 halves the size, 1 doubles it.
        taps: of the separable filter, `resample_filter` in the state dict.
        fused: convolve first, at the full size.
        initial: law of the initial weights.
    """

    resample_filter: Tensor

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int,
        resample: int = 0,
        taps: Sequence[float] = (1, 1),
        fused: bool = False,
        initial: Initial | None = None,
    ):
        super().__init__(channels, out_channels, kernel, padding=kernel // 2)
        (initial or Initial()).fill(self)
        self.resample, self.fused = resample, fused
        if resample:
            self.register_buffer("resample_filter", make_filter(taps))

    def reset_parameters(self) -> None:
        """Draw nothing: `initial` does, once."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, out_channels, H', W']` of x `[B, channels, H, W]`."""
        if self.fused and self.resample:
            edge = self.kernel_size[0] // 2 + filter_edge(self.resample_filter)
            return resampled(F.conv2d(x, self.weight, self.bias, padding=edge), self.resample_filter, -1, edge=0)
        if self.resample:
            x = resampled(x, self.resample_filter, self.resample)
        return F.conv2d(x, self.weight, self.bias, padding=self.kernel_size[0] // 2)


class Resampling(nn.Module):
    """Doubling (`resample` 1) or halving (-1) of the size by a separable filter, without a convolution."""

    resample_filter: Tensor

    def __init__(self, resample: int, taps: Sequence[float] = (1, 1)):
        super().__init__()
        self.resample = resample
        self.register_buffer("resample_filter", make_filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        return resampled(x, self.resample_filter, self.resample)


def make_filter(taps: Sequence[float]) -> Tensor:
    """The square filter `[1, 1, k, k]` of separable taps, of sum 1."""
    row = torch.as_tensor(list(taps), dtype=torch.float32)
    return row.outer(row)[None, None] / row.sum() ** 2


def filter_edge(taps: Tensor) -> int:
    """The padding that keeps a filter `[1, 1, k, k]` centred."""
    return (taps.shape[-1] - 1) // 2


def resampled(x: Tensor, taps: Tensor, resample: int, edge: int | None = None) -> Tensor:
    """Double (1) or halve (-1) images `[B, C, H, W]` by a filter `[1, 1, k, k]`, channel by channel."""
    edge = filter_edge(taps) if edge is None else edge
    channels = x.shape[1]
    weights = taps.to(x).expand(channels, 1, *taps.shape[2:])
    if resample > 0:
        return F.conv_transpose2d(x, 4 * weights, groups=channels, stride=2, padding=edge)
    return F.conv2d(x, weights, groups=channels, stride=2, padding=edge)


@dataclass(frozen=True)
class BlockStyle:
    """What all residual blocks of a network share.

    Args:
        emb_channels: width E of the embedding.
        dropout: before the second convolution.
        heads: of the attention; None: as many as there are 64 channels, none below 64.
        skip_scale: factor after each sum.
        eps: of the norms.
        taps: of the resampling filter.
        resample_proj: every resampling skip has a 1x1 convolution.
        adaptive_scale: the embedding scales and shifts the second norm; otherwise it is added before it.
        initial, zero, attention: laws of the initial weights: of most layers, of those before a sum, of the queries.
    """

    emb_channels: int
    dropout: float
    heads: int | None
    skip_scale: float
    eps: float
    taps: tuple[float, ...]
    resample_proj: bool
    adaptive_scale: bool
    initial: Initial
    zero: Initial
    attention: Initial


class EDMBlock(nn.Module):
    """Residual block under an embedding, which may resample, then self-attention where it has any.

    Args:
        channels, out_channels: channels in and out.
        style: what the network's blocks share.
        resample: -1 halves the size, 1 doubles it.
        attention: whether it attends over positions.
    """

    def __init__(self, channels: int, out_channels: int, style: BlockStyle, resample: int = 0, attention: bool = False):
        super().__init__()
        self.in_channels, self.out_channels = channels, out_channels
        self.dropout, self.skip_scale = style.dropout, style.skip_scale
        self.adaptive_scale = style.adaptive_scale
        heads = out_channels // 64 if style.heads is None else style.heads
        self.num_heads = heads if attention else 0
        self.norm0 = grouped_norm(channels, style.eps)
        self.conv0 = ResamplingConv(channels, out_channels, 3, resample, style.taps, initial=style.initial)
        self.affine = make_linear(style.emb_channels, out_channels * (1 + style.adaptive_scale), style.initial)
        self.norm1 = grouped_norm(out_channels, style.eps)
        self.conv1 = ResamplingConv(out_channels, out_channels, 3, initial=style.zero)
        self.skip = self._make_skip(style, resample)
        if self.num_heads:
            self.norm2 = grouped_norm(out_channels, style.eps)
            self.qkv = ResamplingConv(out_channels, 3 * out_channels, 1, initial=style.attention)
            self.proj = ResamplingConv(out_channels, out_channels, 1, initial=style.zero)

    def _make_skip(self, style: BlockStyle, resample: int) -> nn.Module | None:
        if self.in_channels != self.out_channels or (resample and style.resample_proj):
            return ResamplingConv(self.in_channels, self.out_channels, 1, resample, style.taps, initial=style.initial)
        return Resampling(resample, style.taps) if resample else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`[B, out_channels, H', W']` of x `[B, channels, H, W]` and an embedding `[B, E]`."""
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            h = F.silu(self.norm1(h) * (scale + 1) + shift)
        else:
            h = F.silu(self.norm1(h + modulation))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return (x + self._attended(x)) * self.skip_scale if self.num_heads else x

    def _attended(self, x: Tensor) -> Tensor:
        """What the positions of a map `[B, C, H, W]` attend to; channels of qkv are ordered (head, width, 3)."""
        split = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.num_heads, -1, 3))  # [B, heads, d, 3, N]
        query, key, value = split.permute(3, 0, 1, 4, 2)  # [B, heads, N, d] each
        return self.proj(attend(query, key, value).mT.reshape(x.shape))
