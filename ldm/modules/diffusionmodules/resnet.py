"""Residual, attention and resampling blocks of DDPM's UNet and the first stages; key names as published."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import attend
from ldm.modules.diffusionmodules.util import normalization

ATTENTION_TYPES = ("vanilla", "linear", "none")


class ResnetBlock(nn.Module):
    """Residual block; an embedding of `temb_channels` is added in the middle, where there is one (0: there is none)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, temb_channels: int = 0):
        super().__init__()
        self.norm1 = normalization(in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = normalization(out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """Images [B, out, H, W] of images [B, in, H, W], and of an embedding [B, E] where the block takes one."""
        h = self.conv1(F.silu(self.norm1(x)))  # [B, out, H, W]
        if emb is not None:
            h = h + self.temb_proj(F.silu(emb))[:, :, None, None]  # [B, out, H, W]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # [B, out, H, W]
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)  # [B, out, H, W]


class AttnBlock(nn.Module):
    """Self-attention of one head over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = normalization(channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)  # [B, C, H, W]
        query, key, value = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # [B, 1, N, C]
        h = attend(query, key, value)[:, 0].mT.reshape(x.shape)  # [B, C, H, W]
        return x + self.proj_out(h)  # [B, C, H, W]


class LinAttnBlock(nn.Module):
    """Linear attention of one head over all positions, softmax over the keys alone (Shen et al. 2021).

    As published it has neither a norm nor a residual: it takes the place of its input.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.to_qkv(x).flatten(2).chunk(3, dim=1)  # [B, C, N] each
        context = torch.softmax(key, dim=2) @ value.mT  # [B, C, C]
        return self.to_out((context.mT @ query).reshape(x.shape))  # [B, C, H, W]


class PaddedDownsample(nn.Module):
    """Halve the size by a convolution padded on the right and below, or by averaging."""

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "conv"):
            return self.conv(F.pad(x, (0, 1, 0, 1)))  # [B, C, H / 2, W / 2]
        return F.avg_pool2d(x, 2)  # [B, C, H / 2, W / 2]


def make_attn(channels: int, attn_type: str) -> nn.Module:
    """An attention block, or nothing in its place for "none"."""
    if attn_type not in ATTENTION_TYPES:
        raise ValueError(f"attn_type must be one of {ATTENTION_TYPES}, got '{attn_type}'")
    if attn_type == "none":
        return nn.Identity()
    return AttnBlock(channels) if attn_type == "vanilla" else LinAttnBlock(channels)


class MiddleBlocks(nn.Module):
    """Residual block, attention, residual block at the smallest size."""

    def __init__(self, channels: int, dropout: float, attn_type: str, temb_channels: int = 0):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, temb_channels)
        self.attn_1 = make_attn(channels, attn_type)
        self.block_2 = ResnetBlock(channels, channels, dropout, temb_channels)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, emb)), emb)  # [B, C, H, W]
