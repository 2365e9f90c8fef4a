"""DhariwalUNet: ADM's network as EDM trains it, key names and shapes as published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.edm.blocks import (
    BlockStyle,
    EDMBlock,
    Initial,
    PositionalEmbedding,
    ResamplingConv,
    grouped_norm,
    make_linear,
)
from ldm.modules.edm.unet import EDMNetwork, bottom_blocks
from ldm.util import ImageSize, read_image_size

KAIMING = Initial("kaiming", weight=(1 / 3) ** 0.5, bias=(1 / 3) ** 0.5)
ZERO = Initial("kaiming", weight=0.0, bias=0.0)
EPS_OF_ADM = 1e-5


class DhariwalUNet(EDMNetwork):
    """ADM's UNet in stages as `UNetModel`; the features end before the last norm.

    Blocks of fewer than 64 channels have no attention, also where `attn_resolutions` lists their size (as published).

    Source: Dhariwal and Nichol 2021 (arXiv 2105.05233), as reimplemented by Karras et al. 2022 (arXiv 2206.00364).
    """

    def __init__(
        self,
        img_resolution: ImageSize,  # Height and width of the images; blocks are named by the height.
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,  # Number of classes.
        augment_dim: int = 0,  # Number of augmentation labels.
        model_channels: int = 192,  # Width of the first level, over its channel_mult.
        channel_mult: Sequence[int] = (1, 2, 3, 4),  # Width of each level, over model_channels.
        channel_mult_emb: int = 4,  # Width of the embedding, over model_channels.
        num_blocks: int = 3,  # Residual blocks a level on the way down; one more on the way up.
        attn_resolutions: Sequence[int] = (32, 16, 8),  # Heights with attention.
        dropout: float = 0.10,
        label_dropout: float = 0.0,  # Share of the labels that training drops.
    ):
        super().__init__(in_channels, label_dim, augment_dim, label_dropout, len(channel_mult))
        self.out_channels = out_channels
        emb_channels = model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(model_channels)
        if augment_dim:
            self.map_augment = make_linear(augment_dim, model_channels, ZERO, bias=False)
        self.map_layer0 = make_linear(model_channels, emb_channels, KAIMING)
        self.map_layer1 = make_linear(emb_channels, emb_channels, KAIMING)
        if label_dim:
            law = Initial("kaiming_normal", weight=label_dim**0.5)
            self.map_label = make_linear(label_dim, emb_channels, law, bias=False)
        style = BlockStyle(
            emb_channels, dropout, heads=None, skip_scale=1.0, eps=EPS_OF_ADM, taps=(1.0, 1.0), resample_proj=False,
            adaptive_scale=True, initial=KAIMING, zero=ZERO, attention=KAIMING,
        )  # fmt: skip
        height, _ = read_image_size(img_resolution, "img_resolution")
        sizes = [height >> level for level in range(len(channel_mult))]
        levels = [(size, mult * model_channels) for size, mult in zip(sizes, channel_mult, strict=True)]
        attends = tuple(attn_resolutions)
        self.enc = nn.ModuleDict(self._down(levels, num_blocks, attends, style))
        skips = [block.out_channels for block in self.enc.values()]
        self.dec = nn.ModuleDict(self._up(levels, skips, num_blocks, attends, style))
        self.out_norm = grouped_norm(levels[0][1], EPS_OF_ADM)
        self.out_conv = ResamplingConv(levels[0][1], out_channels, 3, initial=ZERO)
        self.out_names = ("out_norm", "out_conv")

    def _down(
        self, levels: Sequence[tuple[int, int]], num_blocks: int, attends: Sequence[int], style: BlockStyle
    ) -> Iterator[tuple[str, nn.Module]]:
        """The blocks on the way down by name, level by level (size, channels)."""
        channels = levels[0][1]
        for level, (size, level_channels) in enumerate(levels):
            name = f"{size}x{size}"
            if level == 0:
                yield f"{name}_conv", ResamplingConv(self.in_channels, channels, 3, initial=KAIMING)
            else:
                yield f"{name}_down", EDMBlock(channels, channels, style, resample=-1)
            for index in range(num_blocks):
                yield f"{name}_block{index}", EDMBlock(channels, level_channels, style, 0, size in attends)
                channels = level_channels

    def _up(
        self,
        levels: Sequence[tuple[int, int]],
        skips: list[int],
        num_blocks: int,
        attends: Sequence[int],
        style: BlockStyle,
    ) -> Iterator[tuple[str, nn.Module]]:
        """The blocks on the way up by name; `skips` are the channels that were kept on the way down."""
        channels = skips[-1]
        for level, (size, level_channels) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                yield from bottom_blocks(channels, size, style)
            else:
                yield f"{size}x{size}_up", EDMBlock(channels, channels, style, resample=1)
            for index in range(num_blocks + 1):
                block = EDMBlock(channels + skips.pop(), level_channels, style, 0, size in attends)
                yield f"{size}x{size}_block{index}", block
                channels = level_channels

    def _embedding(self, t: Tensor, weights: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(t).to(self.map_layer0.weight.dtype)
        if augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if weights is not None:
            emb = emb + self.map_label(weights.to(emb))
        return F.silu(emb)

    def features(self, x: Tensor, emb: Tensor, context: None = None) -> Tensor:
        """The input `[B, F, H, W]` of the readout for images and an embedding `[B, E]`."""
        self._check_images(x)
        h, skips = x, []
        for block in self.enc.values():
            h = block(h, emb) if isinstance(block, EDMBlock) else block(h)
            skips.append(h)
        for name, block in self.dec.items():
            h = block(torch.cat([h, skips.pop()], dim=1) if "block" in name else h, emb)
        return h

    def readout(self, h: Tensor) -> Tensor:
        """`[B, out_channels, H, W]` of features."""
        return self.out_conv(F.silu(self.out_norm(h)))
