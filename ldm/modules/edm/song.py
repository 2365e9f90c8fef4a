"""SongUNet: the DDPM++ and NCSN++ networks of EDM, key names and shapes as published."""

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
    RandomFrequencies,
    Resampling,
    ResamplingConv,
    grouped_norm,
    make_linear,
)
from ldm.modules.edm.unet import EDMNetwork, bottom_blocks
from ldm.util import ImageSize, read_image_size

XAVIER = Initial("xavier")
NEARLY_ZERO = Initial("xavier", weight=1e-5)
EPS = 1e-6


class SongUNet(EDMNetwork):
    """DDPM++ (positional, standard, standard) or NCSN++ (fourier, residual, standard), in stages as `UNetModel`.

    The features end before the last norm. With a "skip" decoder their last channels are the image that the lower
    levels give, to which the last level adds its own.

    Source: Song et al. 2021b (arXiv 2011.13456), as reimplemented by Karras et al. 2022 (arXiv 2206.00364).
    """

    def __init__(
        self,
        img_resolution: ImageSize,  # Height and width of the images; blocks are named by the height.
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,  # Number of classes.
        augment_dim: int = 0,  # Number of augmentation labels.
        model_channels: int = 128,  # Width of the first level.
        channel_mult: Sequence[int] = (1, 2, 2, 2),  # Width of each level, over model_channels.
        channel_mult_emb: int = 4,  # Width of the embedding, over model_channels.
        num_blocks: int = 4,  # Residual blocks a level on the way down; one more on the way up.
        attn_resolutions: Sequence[int] = (16,),  # Heights with attention.
        dropout: float = 0.10,
        label_dropout: float = 0.0,  # Share of the labels that training drops.
        embedding_type: str = "positional",  # Or fourier.
        channel_mult_noise: int = 1,  # Width of the noise embedding, over model_channels.
        encoder_type: str = "standard",  # Or skip, residual.
        decoder_type: str = "standard",  # Or skip.
        resample_filter: Sequence[float] = (1, 1),
    ):
        for name, value, known in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got '{value}'")
        super().__init__(in_channels, label_dim, augment_dim, label_dropout, len(channel_mult))
        self.out_channels, self.encoder_type, self.decoder_type = out_channels, encoder_type, decoder_type
        self.adds_to_last = decoder_type == "skip"
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        fourier = embedding_type == "fourier"
        self.map_noise = (
            RandomFrequencies(noise_channels) if fourier else PositionalEmbedding(noise_channels, endpoint=True)
        )
        if label_dim:
            self.map_label = make_linear(label_dim, noise_channels, XAVIER)
        if augment_dim:
            self.map_augment = make_linear(augment_dim, noise_channels, XAVIER, bias=False)
        self.map_layer0 = make_linear(noise_channels, emb_channels, XAVIER)
        self.map_layer1 = make_linear(emb_channels, emb_channels, XAVIER)
        style = BlockStyle(
            emb_channels, dropout, heads=1, skip_scale=0.5**0.5, eps=EPS, taps=tuple(resample_filter),
            resample_proj=True, adaptive_scale=False, initial=XAVIER, zero=NEARLY_ZERO,
            attention=Initial("xavier", weight=0.2**0.5),
        )  # fmt: skip
        height, _ = read_image_size(img_resolution, "img_resolution")
        sizes = [height >> level for level in range(len(channel_mult))]
        levels = [(size, mult * model_channels) for size, mult in zip(sizes, channel_mult, strict=True)]
        attends = tuple(attn_resolutions)
        self.enc = nn.ModuleDict(self._down(levels, model_channels, num_blocks, attends, style))
        skips = [block.out_channels for name, block in self.enc.items() if "aux" not in name]
        self.dec = nn.ModuleDict(self._up(levels, skips, num_blocks, attends, style))
        self.out_names = (f"dec.{sizes[0]}x{sizes[0]}_aux_norm", f"dec.{sizes[0]}x{sizes[0]}_aux_conv")

    def _down(
        self, levels: Sequence[tuple[int, int]], width: int, num_blocks: int, attends: Sequence[int], style: BlockStyle
    ) -> Iterator[tuple[str, nn.Module]]:
        """The blocks on the way down by name, level by level (size, channels)."""
        channels, aux, taps = width, self.in_channels, style.taps
        for level, (size, level_channels) in enumerate(levels):
            name = f"{size}x{size}"
            if level == 0:
                yield f"{name}_conv", ResamplingConv(self.in_channels, width, 3, initial=XAVIER)
            else:
                yield f"{name}_down", EDMBlock(channels, channels, style, resample=-1)
                if self.encoder_type == "skip":
                    yield f"{name}_aux_down", Resampling(-1, taps)
                    yield f"{name}_aux_skip", ResamplingConv(aux, channels, 1, initial=XAVIER)
                elif self.encoder_type == "residual":
                    halved = ResamplingConv(aux, channels, 3, -1, taps, fused=True, initial=XAVIER)
                    yield f"{name}_aux_residual", halved
                    aux = channels
            for index in range(num_blocks):
                block = EDMBlock(channels, level_channels, style, attention=size in attends)
                yield f"{name}_block{index}", block
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
        for level in reversed(range(len(levels))):
            size, level_channels = levels[level]
            name = f"{size}x{size}"
            lowest = level == len(levels) - 1
            if lowest:
                yield from bottom_blocks(channels, size, style)
            else:
                yield f"{name}_up", EDMBlock(channels, channels, style, resample=1)
            for index in range(num_blocks + 1):
                attention = index == num_blocks and size in attends
                yield f"{name}_block{index}", EDMBlock(channels + skips.pop(), level_channels, style, 0, attention)
                channels = level_channels
            if self.decoder_type == "skip" or level == 0:
                if self.decoder_type == "skip" and not lowest:
                    yield f"{name}_aux_up", Resampling(1, style.taps)
                yield f"{name}_aux_norm", grouped_norm(channels, EPS)
                yield f"{name}_aux_conv", ResamplingConv(channels, self.out_channels, 3, initial=NEARLY_ZERO)

    def _embedding(self, t: Tensor, weights: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        cosines, sines = self.map_noise(t).chunk(2, dim=1)
        emb = torch.cat([sines, cosines], dim=1).to(self.map_layer0.weight.dtype)  # as published
        if weights is not None:
            emb = emb + self.map_label(weights.to(emb) * self.label_dim**0.5)
        if augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def features(self, x: Tensor, emb: Tensor, context: None = None) -> Tensor:
        """The input `[B, F, H, W]` of the readout for images and an embedding `[B, E]`."""
        self._check_images(x)
        h, skips = self._encoded(x, emb)
        image = None
        for name, block in self.dec.items():
            if f"dec.{name}" in self.out_names:
                continue
            if name.endswith("aux_up"):
                image = block(image)
            elif name.endswith("aux_norm"):
                normed = F.silu(block(h))
            elif name.endswith("aux_conv"):
                image = block(normed) if image is None else image + block(normed)
            else:
                h = block(torch.cat([h, skips.pop()], dim=1) if "block" in name else h, emb)
        return h if image is None else torch.cat([h, image], dim=1)

    def _encoded(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The lowest map, and the maps that are kept for the way up."""
        h, aux, skips = x, x, []
        for name, block in self.enc.items():
            if name.endswith("aux_down"):
                aux = block(aux)
                continue
            if name.endswith("aux_skip"):
                h = skips.pop() + block(aux)
            elif name.endswith("aux_residual"):
                h = aux = (skips.pop() + block(aux)) * 0.5**0.5
            else:
                h = block(h, emb) if isinstance(block, EDMBlock) else block(h)
            skips.append(h)
        return h, skips

    def readout(self, h: Tensor) -> Tensor:
        """`[B, out_channels, H, W]` of features."""
        norm, conv = (self.get_submodule(name) for name in self.out_names)
        channels = norm.num_channels
        if h.shape[1] == channels:
            return conv(F.silu(norm(h)))
        # group_norm cannot tell the layout of some slices
        own = h[:, :channels].clone(memory_format=torch.contiguous_format)
        return conv(F.silu(norm(own))) + h[:, channels:]
