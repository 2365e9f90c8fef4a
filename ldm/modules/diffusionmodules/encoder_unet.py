"""The downward half of a UNet as a classifier of noisy images (guided-diffusion's `EncoderUNetModel`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.attention import attend
from ldm.modules.diffusionmodules.blocks import BlockFactory, build_encoder, build_middle
from ldm.modules.diffusionmodules.util import (
    conv_nd,
    convert_linear_maps,
    normalization,
    timestep_embedding,
    zero_module,
)
from ldm.modules.parts import Parts, find_parts
from ldm.util import ImageSize, read_image_size

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
HIDDEN = 2048  # Width of the hidden layer of the spatial pools.


class AttentionPool2d(nn.Module):
    """Attention whose query is the mean over positions (CLIP's image pooling, Radford et al. 2021, section 2.4).

    Args:
        size: height and width of the features, one number where they are equal.
        channels: C, a multiple of `head_channels`.
        head_channels: width of each head.
        out_channels: width of the result.
    """

    def __init__(self, size: ImageSize, channels: int, head_channels: int, out_channels: int):
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"attention pooling: {channels} channels do not divide into heads of {head_channels}")
        self.heads = channels // head_channels
        positions = math.prod(read_image_size(size, "size"))
        self.positional_embedding = nn.Parameter(
            nn.init.normal_(torch.empty(channels, positions + 1), std=channels**-0.5)
        )
        self.qkv_proj = conv_nd(1, channels, 3 * channels, 1)
        self.c_proj = conv_nd(1, channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, C, H, W]` of so many positions; returns `[B, out]`."""
        tokens = x.flatten(2)  # [B, C, N]
        tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], dim=2)  # [B, C, 1 + N]
        if tokens.shape[2] != self.positional_embedding.shape[1]:
            raise ValueError(
                f"this classifier was made for {self.positional_embedding.shape[1] - 1} positions at its last level, "
                f"got {tokens.shape[2] - 1}: images must have the image_size of its config"
            )
        qkv = self.qkv_proj(tokens + self.positional_embedding.to(tokens.dtype))  # [B, 3 C, 1 + N]
        query, key, value = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)  # 3 x [B, heads, d, 1 + N]
        pooled = attend(query[..., :1].mT, key.mT, value.mT)  # [B, heads, 1, d]
        return self.c_proj(pooled.mT.flatten(1, 2))[..., 0]  # [B, out]


class EncoderUNetModel(nn.Module):
    """Logits of a noisy image's class, for classifier guidance and noisy classifiers.

    Source: Dhariwal & Nichol 2021 (arXiv 2105.05233, section 4). State-dict keys, arguments and defaults are the
    published ones; `pool` is "adaptive" (mean), "attention", or "spatial" and "spatial_v2" (means of every block).
    """

    def __init__(
        self,
        image_size: ImageSize,  # Height and width of the images.
        in_channels: int,  # Channels of x.
        model_channels: int,  # Width of the first level, a multiple of 32.
        out_channels: int,  # Number of classes.
        num_res_blocks: int,  # Residual blocks a level.
        attention_resolutions: Sequence[int],  # Downsampling factors that have attention.
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,  # Accepted for published configs: there is no way up.
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got '{pool}'")
        self.in_channels, self.model_channels, self.pool = in_channels, model_channels, pool
        width = 4 * model_channels
        residual = (dropout, dims, use_checkpoint, use_scale_shift_norm, conv_resample, resblock_updown)
        blocks = BlockFactory(width, *residual, num_heads, num_head_channels, -1, use_new_attention_order)
        self.time_embed = nn.Sequential(nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width))
        self.input_blocks, widths, factor = build_encoder(
            blocks, in_channels, model_channels, num_res_blocks, tuple(attention_resolutions), tuple(channel_mult)
        )
        channels = widths[-1]
        self.middle_block = build_middle(blocks, channels)
        size = tuple(side // factor for side in read_image_size(image_size))
        every = sum(widths) + channels
        self.out = self._readout(dims, size, channels, every, num_head_channels, out_channels)
        if use_fp16:
            self.convert_to_fp16()

    def _readout(
        self, dims: int, size: Sequence[int], channels: int, every: int, head_channels: int, out_channels: int
    ) -> nn.Sequential:
        if self.pool == "spatial":
            return nn.Sequential(nn.Linear(every, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, out_channels))
        if self.pool == "spatial_v2":
            return nn.Sequential(
                nn.Linear(every, HIDDEN), normalization(HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, out_channels)
            )
        if self.pool == "attention":
            if head_channels == -1:
                raise ValueError("pool: attention needs num_head_channels")
            pooling: tuple[nn.Module, ...] = (AttentionPool2d(size, channels, head_channels, out_channels),)
        else:
            last = zero_module(conv_nd(dims, channels, out_channels, 1))
            pooling = (nn.AdaptiveAvgPool2d((1, 1)), last, nn.Flatten())
        return nn.Sequential(normalization(channels), nn.SiLU(), *pooling)

    @property
    def taps(self) -> dict[str, str]:
        """Names of the layers that features are read from: {tap: submodule}, in the order of computation."""
        down = {f"in_{count}": f"input_blocks.{count}" for count in range(len(self.input_blocks))}
        return down | {"mid": "middle_block"}

    @property
    def parts(self) -> Parts:
        """Where the time embedding, the readout of logits and the taps are."""
        last = find_parts(self.out).last_layer
        return Parts(
            time_embedding=("time_embed.*",),
            output=("out.*",),
            last_layer=None if last is None else f"out.{last}",
            taps=self.taps,
        )

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits `[B, out_channels]` of x `[B, in_channels, H, W]` at times `[B]`."""
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [B, {self.in_channels}, H, W], got {list(x.shape)}")
        dtype = self.time_embed[0].weight.dtype
        t = timesteps.to(torch.promote_types(dtype, torch.float32))  # [B]
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(dtype))  # [B, 4 model_channels]
        h, means = x.to(self.input_blocks[0][0].weight.dtype), []
        for block in (*self.input_blocks, self.middle_block):
            h = block(h, emb)  # [B, C_i, H / f, W / f]
            if self.pool.startswith("spatial"):
                means.append(h.flatten(2).mean(2).to(dtype))
        return self.out(torch.cat(means, 1) if means else h.to(dtype))

    def convert_to_fp16(self) -> None:
        """Convert the convolutions of the torso to float16; embeddings, norms and `out` stay as they are."""
        for part in (self.input_blocks, self.middle_block):
            convert_linear_maps(part, torch.float16, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
