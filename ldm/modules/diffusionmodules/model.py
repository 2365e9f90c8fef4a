"""DDPM's UNet, and encoder and decoder of the first stages; key names as published with latent-diffusion.

Sources: Ho et al. 2020 (`Model`, in `ddpm_unet.py`); Esser et al. 2021 (VQGAN).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.diffusionmodules.blocks import Upsample
from ldm.modules.diffusionmodules.ddpm_unet import Model
from ldm.modules.diffusionmodules.resnet import MiddleBlocks, PaddedDownsample, ResnetBlock, make_attn
from ldm.modules.diffusionmodules.util import normalization
from ldm.util import ImageSize, read_image_size

__all__ = ["Decoder", "Encoder", "Model"]


class Level(nn.Module):
    """Residual blocks of one size, each with or without attention, then a change of size (`resample` names it)."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, dropout: float, attention: bool, attn_type: str
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(make_attn(out_channels, attn_type) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)  # [B, out, H, W]
            if len(self.attn):
                x = self.attn[index](x)  # [B, out, H, W]
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)  # [B, out, H', W']
        return x


class Encoder(nn.Module):
    """Images to latents, or to the mean and log-variance of latents.

    Args:
        ch: width of the first level, a multiple of 32.
        out_ch: channels of a reconstruction (of the decoder; accepted so that both take one config).
        ch_mult: width of each level, over `ch`; there is one halving fewer than levels.
        num_res_blocks: residual blocks a level.
        attn_resolutions: heights that have attention (for images of `resolution`).
        in_channels, resolution: channels and size of an image, height and width where they differ.
        z_channels: channels Z of a latent.
        dropout: in residual blocks.
        resamp_with_conv: halve with convolutions.
        double_z: predict 2 Z channels.
        attn_type: "vanilla", "linear" or "none".
        use_linear_attn: former spelling of attn_type "linear".
        tanh_out, give_pre_end: of the decoder.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        in_channels: int,
        resolution: ImageSize,
        z_channels: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        attn_type: str = "vanilla",
        use_linear_attn: bool = False,
        tanh_out: bool = False,
        give_pre_end: bool = False,
    ):
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.in_channels, self.factor = in_channels, 2 ** (len(ch_mult) - 1)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        widths = [ch] + [ch * mult for mult in ch_mult]
        self.down = nn.ModuleList()
        height, _ = read_image_size(resolution, "resolution")
        for index in range(len(ch_mult)):
            attention = height // 2**index in attn_resolutions
            level = Level(widths[index], widths[index + 1], num_res_blocks, dropout, attention, attn_type)
            if index < len(ch_mult) - 1:
                level.downsample = PaddedDownsample(widths[index + 1], resamp_with_conv)
            self.down.append(level)
        self.mid = MiddleBlocks(widths[-1], dropout, attn_type)
        self.norm_out = normalization(widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_channels, H, W]` to `[B, Z, H / f, W / f]` (2 Z with `double_z`)."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or any(size % self.factor for size in x.shape[2:]):
            raise ValueError(
                f"images must be [B, {self.in_channels}, H, W] with H and W multiples of {self.factor}, "
                f"got {list(x.shape)}"
            )
        h = self.conv_in(x)  # [B, ch, H, W]
        for level in self.down:
            h = level(h)  # [B, C_i, H / 2^i, W / 2^i]
        h = self.mid(h)  # [B, C, H / f, W / f]
        return self.conv_out(F.silu(self.norm_out(h)))  # [B, Z, H / f, W / f]


class Decoder(nn.Module):
    """Latents to images; arguments of `Encoder`.

    Args:
        tanh_out: end with a hyperbolic tangent.
        give_pre_end: return the input of the last norm instead.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        in_channels: int,
        resolution: ImageSize,
        z_channels: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        attn_type: str = "vanilla",
        use_linear_attn: bool = False,
        tanh_out: bool = False,
        give_pre_end: bool = False,
    ):
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.tanh_out, self.give_pre_end = tanh_out, give_pre_end
        widths = [ch * mult for mult in ch_mult] + [ch * ch_mult[-1]]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = MiddleBlocks(widths[-1], dropout, attn_type)
        self.up = nn.ModuleList()
        height, _ = read_image_size(resolution, "resolution")
        for index in range(len(ch_mult)):
            attention = height // 2**index in attn_resolutions
            level = Level(widths[index + 1], widths[index], num_res_blocks + 1, dropout, attention, attn_type)
            if index > 0:
                level.upsample = Upsample(widths[index], resamp_with_conv)
            self.up.append(level)
        self.norm_out = normalization(widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Latents `[B, Z, h, w]` to images `[B, out_ch, f h, f w]`."""
        h = self.mid(self.conv_in(z))  # [B, C, h, w]
        for level in reversed(self.up):
            h = level(h)  # [B, C_i, f h / 2^i, f w / 2^i]
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))  # [B, out_ch, f h, f w]
        return torch.tanh(h) if self.tanh_out else h
