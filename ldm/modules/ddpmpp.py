"""The UNets of denoising diffusion autoencoders: DDPM's and the wider DDPM++, key names and shapes as published."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import attend
from ldm.modules.diffusionmodules.blocks import Downsample, Upsample
from ldm.modules.diffusionmodules.util import normalization
from ldm.modules.parts import Parts

OUTPUT_GROUPS = 8  # of the last norm; every other norm has 32


class TimeEmbedding(nn.Module):
    """Embedding `[B, 4 C]` of a time: sinusoids, sines first, the slowest of period 2 pi 10^4, and two linear maps.

    Args:
        channels: width C of the sinusoids.
        augment_dim: number of augmentation labels, mapped without a bias and added to the sinusoids; None for none.
        time_scale: multiplies the time before the sinusoids.
    """

    def __init__(self, channels: int, augment_dim: int | None = None, time_scale: float = 1.0):
        super().__init__()
        self.channels, self.time_scale = channels, time_scale
        self.lin1 = nn.Linear(channels, 4 * channels)
        self.lin2 = nn.Linear(4 * channels, 4 * channels)
        if augment_dim is not None:
            self.aug_emb = nn.Linear(augment_dim, channels, bias=False)

    def forward(self, t: Tensor, augment_labels: Tensor | None = None) -> Tensor:
        """`[B, 4 C]` of times `[B]` and augmentation labels `[B, A]`; None stands for labels of zero."""
        half = self.channels // 2
        exponents = torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(10000) / (half - 1))
        angles = self.time_scale * t[:, None] * exponents.exp()  # [B, C / 2]
        waves = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.lin1.weight.dtype)  # [B, C]
        if augment_labels is not None:
            waves = waves + self.aug_emb(augment_labels.to(waves.dtype))
        return self.lin2(F.silu(self.lin1(waves)))


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution twice, the time added between, over a skip; `resample` acts before the first map.

    Source: Ho et al. 2020 (appendix B); with `resample`, the block of Brock et al. 2019 in Song et al. 2021b.
    """

    def __init__(
        self, channels: int, out_channels: int, emb_channels: int, dropout: float, resample: nn.Module | None = None
    ):
        super().__init__()
        self.norm1 = normalization(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = normalization(out_channels)
        self.conv2 = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`[B, out, H', W']` of x `[B, C, H, W]` and an embedding `[B, E]`."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = h + self.time_emb(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(self.resample(x))


class SpatialAttention(nn.Module):
    """Self-attention over the positions of a map, over a skip; `head_channels` None is one head."""

    def __init__(self, channels: int, head_channels: int | None = None):
        super().__init__()
        if channels % (head_channels or channels):
            raise ValueError(f"{channels} channels do not divide into heads of {head_channels}")
        self.heads = channels // (head_channels or channels)
        self.norm = normalization(channels)
        self.projection = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` of the same."""
        h = self.norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        split = self.projection(h).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, 3 d]
        h = attend(*split.chunk(3, dim=-1)).transpose(1, 2).flatten(2)  # [B, N, C]
        return x + self.output(h).transpose(1, 2).reshape(x.shape)


class ResAttnBlock(nn.Module):
    """A residual block, then attention where the level has it; its output is a tap."""

    def __init__(self, res: ResidualBlock, attn: nn.Module):
        super().__init__()
        self.res, self.attn = res, attn

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attn(self.res(x, emb))


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, res1: ResidualBlock, attn: SpatialAttention, res2: ResidualBlock):
        super().__init__()
        self.res1, self.attn, self.res2 = res1, attn, res2

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.res2(self.attn(self.res1(x, emb)), emb)


class ResidualResampling(nn.Module):
    """Resampling by 2 inside a residual block (DDPM++)."""

    def __init__(self, op: ResidualBlock):
        super().__init__()
        self.op = op

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.op(x, emb)


class ConvUp(nn.Module):
    """Doubling by nearest neighbours and a convolution (DDPM); the embedding is not used."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ConvDown(nn.Module):
    """Halving by a convolution of stride 2 (DDPM); the embedding is not used."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(x)


class UNet(nn.Module):
    """UNet of DDAE's configs, in stages: `condition`, `features`, `readout`.

    `forward(x, t) == final(features(x, condition(t)))`. The features end with the last norm and SiLU, so that `final`
    is the last layer. Blocks start from torch's own initialisation: no layer is zero (as published; it differs from
    DDPM's and EDM's networks).

    Source: Xiang et al. 2023 (arXiv 2303.09769); Ho et al. 2020; Song et al. 2021b (arXiv 2011.13456).
    """

    head_name = "final"

    def __init__(
        self,
        image_shape: Sequence[int],  # Channels, height and width.
        n_channels: int = 128,  # Width of the first level, a multiple of 32.
        ch_mults: Sequence[int] = (1, 2, 2, 2),  # Width of each level, over n_channels.
        is_attn: Sequence[bool] = (False, True, False, False),  # Levels with attention.
        attn_channels_per_head: int | None = None,  # One head where None.
        dropout: float = 0.1,
        n_blocks: int = 2,  # Residual blocks a level on the way down; one more on the way up.
        use_res_for_updown: bool = False,  # Resample in residual blocks (DDPM++).
        augment_dim: int | None = None,  # Number of augmentation labels.
        time_scale: float = 1.0,  # Multiplies the times.
    ):
        super().__init__()
        if len(ch_mults) != len(is_attn):
            raise ValueError(f"ch_mults and is_attn go level by level, got {list(ch_mults)} and {list(is_attn)}")
        self.image_shape, self.n_channels = tuple(image_shape), n_channels
        self.augment_dim, self.levels = augment_dim, len(ch_mults)
        self._options = (4 * n_channels, dropout, attn_channels_per_head, use_res_for_updown)
        widths = [mult * n_channels for mult in ch_mults]
        channels = self.image_shape[0]
        self.image_proj = nn.Conv2d(channels, n_channels, 3, padding=1)
        self.time_emb = TimeEmbedding(n_channels, augment_dim, time_scale)
        self.down, skips = self._build_down(n_channels, widths, is_attn, n_blocks)
        width = widths[-1]
        self.middle = Middle(self._res(width, width), SpatialAttention(width, attn_channels_per_head),
                             self._res(width, width))  # fmt: skip
        self.up = self._build_up(skips, widths, is_attn, n_blocks)
        self.norm = normalization(widths[0], groups=OUTPUT_GROUPS)
        self.final = nn.Conv2d(widths[0], channels, 3, padding=1)

    def _res(self, channels: int, out_channels: int, resample: nn.Module | None = None) -> ResidualBlock:
        emb_channels, dropout, _, _ = self._options
        return ResidualBlock(channels, out_channels, emb_channels, dropout, resample)

    def _block(self, channels: int, out_channels: int, attention: bool) -> ResAttnBlock:
        attn = SpatialAttention(out_channels, self._options[2]) if attention else nn.Identity()
        return ResAttnBlock(self._res(channels, out_channels), attn)

    def _resampling(self, channels: int, inside: nn.Module, alone: type[nn.Module]) -> nn.Module:
        """Resampling by `inside` in a residual block (DDPM++), or by a convolution `alone`."""
        in_block = self._options[3]
        return ResidualResampling(self._res(channels, channels, inside)) if in_block else alone(channels)

    def _build_down(
        self, channels: int, widths: Sequence[int], is_attn: Sequence[bool], n_blocks: int
    ) -> tuple[nn.ModuleList, list[int]]:
        """The blocks on the way down and the widths of all skips."""
        blocks, skips = nn.ModuleList(), [channels]
        for level, (width, attention) in enumerate(zip(widths, is_attn, strict=True)):
            for _ in range(n_blocks):
                blocks.append(self._block(channels, width, attention))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                blocks.append(self._resampling(channels, Downsample(channels, False), ConvDown))
                skips.append(channels)
        return blocks, skips

    def _build_up(
        self, skips: list[int], widths: Sequence[int], is_attn: Sequence[bool], n_blocks: int
    ) -> nn.ModuleList:
        blocks, channels = nn.ModuleList(), widths[-1]
        for level in reversed(range(len(widths))):
            for _ in range(n_blocks + 1):
                blocks.append(self._block(channels + skips.pop(), widths[level], is_attn[level]))
                channels = widths[level]
            if level:
                blocks.append(self._resampling(channels, Upsample(channels, False), ConvUp))
        return blocks

    @property
    def taps(self) -> dict[str, str]:
        """Names of the layers that features are read from: {tap: submodule}, in the order of computation."""
        down = [name for name, block in self.down.named_children() if isinstance(block, ResAttnBlock)]
        up = [name for name, block in self.up.named_children() if isinstance(block, ResAttnBlock)]
        names = {f"in_{count}": f"down.{name}" for count, name in enumerate(down, 1)}
        return names | {"mid": "middle"} | {f"out_{count}": f"up.{name}" for count, name in enumerate(up, 1)}

    @property
    def size_multiple(self) -> int:
        """What height and width of the images must be multiples of."""
        return 2 ** (self.levels - 1)

    @property
    def parts(self) -> Parts:
        """Where the embedding of times and augmentation labels, the last layer and the taps are."""
        embedding = ("time_emb.*",)
        return Parts(
            time_embedding=embedding, condition=embedding, output=("final.*",), last_layer="final", taps=self.taps
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` of noisy images `[B, C, H, W]`, times `[B]` and augmentation labels y `[B, A]` or None."""
        return self.readout(self.backbone(x, timesteps, y))

    def backbone(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The input `[B, F, H, W]` of `final`; arguments of `forward`."""
        return self.features(x, self.condition(timesteps, y))

    def readout(self, h: Tensor) -> Tensor:
        return self.final(h)

    def condition(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Embedding `[B, E]` of times `[B]` and augmentation labels `[B, A]`; None stands for labels of zero."""
        if y is not None and self.augment_dim is None:
            raise ValueError("this network has no augmentation labels; set augment_dim, or leave the labels out")
        return self.time_emb(timesteps.to(torch.promote_types(timesteps.dtype, torch.float32)), y)

    def features(self, x: Tensor, emb: Tensor, context: None = None) -> Tensor:
        """The input `[B, F, H, W]` of `final` for images and an embedding `[B, E]`."""
        factor = self.size_multiple
        if x.shape[1] != self.image_shape[0] or any(size % factor for size in x.shape[2:]):
            raise ValueError(
                f"x must be [B, {self.image_shape[0]}, H, W] with H and W multiples of {factor}, got {list(x.shape)}"
            )
        h = self.image_proj(x)
        skips = [h]
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
        h = self.middle(h, emb)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], dim=1) if isinstance(block, ResAttnBlock) else h, emb)
        return F.silu(self.norm(h))
