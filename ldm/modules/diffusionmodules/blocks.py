"""Blocks of the UNets: residual, attention, and resampling; key names as in guided-diffusion and latent-diffusion."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import SpatialTransformer, attend
from ldm.modules.diffusionmodules.util import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    normalization,
    repeat_rows,
    zero_module,
)


class Upsample(nn.Module):
    """Double the size by nearest neighbours (of a volume, its two inner axes), then convolve if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.dims = dims
        self.use_conv = use_conv
        if use_conv:
            self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        factor = (1.0, 2.0, 2.0) if self.dims == 3 else (2.0,) * self.dims
        x = F.interpolate(x, scale_factor=factor, mode="nearest")  # [B, C, 2H, 2W]
        return self.conv(x) if self.use_conv else x  # [B, out, 2H, 2W]


class Downsample(nn.Module):
    """Halve the size (of a volume, its two inner axes) by a strided convolution, or by averaging."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels or channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # [B, out, H / 2, W / 2]


class ResBlock(nn.Module):
    """Residual block modulated by an embedding of time and class, which may resample.

    Args:
        channels, out_channels: channels in and out (the same if None).
        emb_channels: width E of the embedding.
        dropout: before the last convolution.
        use_conv: a changed width is skipped over by a 3x3 convolution rather than 1x1.
        use_scale_shift_norm: the embedding scales and shifts the second norm; otherwise it is added.
        dims: 1, 2 or 3.
        use_checkpoint: read by `TimestepEmbedSequential`.
        up, down: resample by 2 inside the block.

    Source: Ho et al. 2020 (appendix B); scale-shift and resampling blocks of Dhariwal & Nichol 2021 (section 3).
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.resample: nn.Module = nn.Identity()
        if up or down:
            self.resample = Upsample(channels, False, dims) if up else Downsample(channels, False, dims)
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, width))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection: nn.Module = nn.Identity()
        else:
            kernel = 3 if use_conv else 1
            self.skip_connection = conv_nd(dims, channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x `[B, C, H, W]`, emb `[B, E]` (or a divisor of B rows, repeated); returns `[B, out, H', W']`."""
        norm, activation, convolution = self.in_layers
        h = convolution(self.resample(activation(norm(x))))  # [B, out, H', W']
        modulation = repeat_rows(self.emb_layers(emb).to(h.dtype), len(h))  # [B, out] or [B, 2 out]
        modulation = modulation.reshape(modulation.shape + (1,) * (h.ndim - 2))  # [B, ., 1, 1]
        if self.use_scale_shift_norm:
            scale, shift = modulation.chunk(2, dim=1)  # 2 x [B, out, 1, 1]
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)  # [B, out, H', W']
        else:
            h = self.out_layers(h + modulation)  # [B, out, H', W']
        return self.skip_connection(self.resample(x)) + h  # [B, out, H', W']


class AttentionBlock(nn.Module):
    """Self-attention over all positions of an image.

    Args:
        channels: C, a multiple of 32.
        num_heads: number of heads, unless `num_head_channels` gives the width of each.
        use_checkpoint: read by `TimestepEmbedSequential`.
        use_new_attention_order: `qkv` lists all queries, then keys, then values; otherwise (published before) each
            head lists its own three.

    Source: Dhariwal & Nichol 2021, section 3.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        width = channels // num_heads if num_head_channels == -1 else num_head_channels
        if channels % width:
            raise ValueError(f"{channels} channels do not divide into heads of {width}; change num_head_channels")
        self.num_heads = channels // width
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, C, ...]`; returns the same shape."""
        qkv = self.qkv(self.norm(x.flatten(2)))  # [B, 3 C, N]
        if self.use_new_attention_order:
            query, key, value = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)  # 3 x [B, heads, d, N]
        else:
            query, key, value = qkv.unflatten(1, (self.num_heads, 3, -1)).unbind(2)  # 3 x [B, heads, d, N]
        h = attend(query.mT, key.mT, value.mT)  # [B, heads, N, d]
        h = self.proj_out(h.mT.flatten(1, 2))  # [B, C, N]
        return x + h.reshape(x.shape)  # [B, C, ...]


class TimestepEmbedSequential(nn.Sequential):
    """Layers in a row; residual blocks get the embedding, spatial transformers the context.

    Where these have more rows than x, x is repeated in front of the first layer that reads them: what comes before
    runs once for images that share x.
    """

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = repeat_rows(x, max(len(x), len(emb)))
                x = checkpoint(layer, x, emb, enabled=layer.use_checkpoint)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x if context is None else repeat_rows(x, max(len(x), len(context))), context)
            elif isinstance(layer, AttentionBlock):
                x = checkpoint(layer, x, enabled=layer.use_checkpoint)
            else:
                x = layer(x)
        return x


@dataclass(frozen=True)
class BlockFactory:
    """The choices that all blocks of one UNet share; the fields are named as the UNet's arguments."""

    emb_channels: int
    dropout: float = 0.0
    dims: int = 2
    use_checkpoint: bool = False
    use_scale_shift_norm: bool = False
    conv_resample: bool = True
    resblock_updown: bool = False
    num_heads: int = -1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    transformer_depth: int = 1
    context_dim: int | None = None
    legacy: bool = True

    def residual(
        self, channels: int, out_channels: int | None = None, up: bool = False, down: bool = False
    ) -> ResBlock:
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
        )

    def down(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.residual(channels, down=True)
        return Downsample(channels, self.conv_resample, self.dims)

    def up(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.residual(channels, up=True)
        return Upsample(channels, self.conv_resample, self.dims)

    def attention(self, channels: int, decoder: bool = False) -> nn.Module:
        """Attention layer of the published head sizes.

        `num_head_channels` decides the number of heads, else `num_heads`. A legacy spatial transformer then fills the
        width whatever the remainder. `num_heads_upsample` acts in legacy plain attention of the decoder alone.
        """
        heads = self.num_heads if self.num_head_channels == -1 else channels // self.num_head_channels
        if self.use_spatial_transformer:
            fill = self.legacy or self.num_head_channels == -1
            width = channels // heads if fill else self.num_head_channels
            return SpatialTransformer(
                channels,
                heads,
                width,
                depth=self.transformer_depth,
                context_dim=self.context_dim,
                use_checkpoint=self.use_checkpoint,
            )
        if decoder and self.legacy and self.num_heads_upsample != -1:
            heads = self.num_heads_upsample
        return AttentionBlock(
            channels, heads, self.num_head_channels, self.use_checkpoint, self.use_new_attention_order
        )


def build_encoder(
    blocks: BlockFactory,
    in_channels: int,
    model_channels: int,
    num_res_blocks: int,
    attention_resolutions: tuple[int, ...],
    channel_mult: tuple[float, ...],
) -> tuple[nn.ModuleList, list[int], int]:
    """The downward half of a UNet: its blocks, the channels after each of them, and the last downsampling factor."""
    channels = int(channel_mult[0] * model_channels)
    layers = [TimestepEmbedSequential(conv_nd(blocks.dims, in_channels, channels, 3, padding=1))]
    widths, factor = [channels], 1
    for level, mult in enumerate(channel_mult):
        for _ in range(num_res_blocks):
            parts: list[nn.Module] = [blocks.residual(channels, int(mult * model_channels))]
            channels = int(mult * model_channels)
            if factor in attention_resolutions:
                parts.append(blocks.attention(channels))
            layers.append(TimestepEmbedSequential(*parts))
            widths.append(channels)
        if level < len(channel_mult) - 1:
            layers.append(TimestepEmbedSequential(blocks.down(channels)))
            widths.append(channels)
            factor *= 2
    return nn.ModuleList(layers), widths, factor


def build_middle(blocks: BlockFactory, channels: int) -> TimestepEmbedSequential:
    """Residual block, attention, residual block at the smallest size."""
    return TimestepEmbedSequential(blocks.residual(channels), blocks.attention(channels), blocks.residual(channels))
