"""The UNet of DDPM and DDIM, key names as published with latent-diffusion (Ho et al. 2020; Song et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.augment_labels import AugmentEmbedding, split_augmented
from ldm.modules.diffusionmodules.blocks import Upsample
from ldm.modules.diffusionmodules.resnet import MiddleBlocks, PaddedDownsample, ResnetBlock, make_attn
from ldm.modules.diffusionmodules.util import normalization
from ldm.modules.parts import Parts
from ldm.util import ImageSize, read_image_size


def ddpm_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids [B, width] of times [B], sines first: frequencies from 1 down to 1 / 10000, both included.

    Source: Ho et al. 2020 (`get_timestep_embedding`); `timestep_embedding` leaves the slowest one out.
    """
    half = width // 2
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    exponents = torch.arange(half, dtype=dtype, device=t.device) * (-math.log(10000) / (half - 1))
    angles = t.to(dtype)[:, None] * exponents.exp()  # [B, width // 2]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


class TimeMaps(nn.Module):
    """Two linear maps, in `dense`, with a SiLU between."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(width, out), nn.Linear(out, out)])

    def forward(self, x: Tensor) -> Tensor:
        return self.dense[1](F.silu(self.dense[0](x)))


class ModelLevel(nn.Module):
    """The blocks of one size: residual ones in `block`, each followed by attention in `attn` or all of them not."""

    def __init__(self, blocks: Sequence[ResnetBlock], attention: Sequence[nn.Module]):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attention)

    def run_block(self, index: int, h: Tensor, emb: Tensor | None) -> Tensor:
        """Run a residual block, and its attention where there is one: [B, C', H, W] of [B, C, H, W]."""
        h = self.block[index](h, emb)
        return self.attn[index](h) if len(self.attn) else h

    def last_names(self, prefix: str) -> Iterator[str]:
        """Yield the name of the last submodule of each block, below `prefix`."""
        part = "attn" if len(self.attn) else "block"
        yield from (f"{prefix}.{part}.{index}" for index in range(len(self.block)))


class Model(nn.Module):
    """Residual UNet with attention at some sizes, conditioned on time alone.

    `forward(x, t, context) == readout(features(x, condition(t), context))`, in stages as `UNetModel`; a context is an
    image [B, C', H, W] that is joined to x along channels, and `in_channels` counts both. Taps are `in_0`, `in_1`, ..
    on the way down, `mid`, and `out_1`, .. on the way up. The network of CelebA at 64 pixels has 78,700,803 parameters.

    Source: Ho et al. 2020 (arXiv 2006.11239, appendix B); arguments, defaults and state-dict keys are the published
    ones. Channels of every level are multiples of 32.

    Raises:
        ValueError: for levels without blocks, or augmentation labels without a time.
    """

    def __init__(
        self,
        *,
        ch: int,  # Width of the first level.
        out_ch: int,  # Channels predicted.
        ch_mult: Sequence[int] = (1, 2, 4, 8),  # Width of each level, over ch.
        num_res_blocks: int,  # Residual blocks a level; one more on the way up.
        attn_resolutions: Sequence[int],  # Sizes that have attention, for images of `resolution`.
        dropout: float = 0.0,
        resamp_with_conv: bool = True,  # Resample with convolutions.
        in_channels: int,  # Channels of x, and of a context where there is one.
        resolution: ImageSize,  # Height (and width) that `attn_resolutions` are counted from.
        use_timestep: bool = True,  # Whether it is told the time; else the blocks' maps of it are there, unused.
        use_linear_attn: bool = False,  # Former spelling of attn_type: linear.
        attn_type: str = "vanilla",  # "vanilla", "linear" or "none".
        augment_dim: int = 0,  # Augmentation labels that it is told beside the time.
    ):
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.in_channels, self.out_channels, self.ch = in_channels, out_ch, ch
        self.size_multiple = 2 ** (len(ch_mult) - 1)
        emb = 4 * ch
        if use_timestep:
            self.temb = TimeMaps(ch, emb)
        if num_res_blocks < 1:
            raise ValueError(f"num_res_blocks must be 1 or more, got {num_res_blocks}")
        self.augment_dim = augment_dim
        if augment_dim and not use_timestep:
            raise ValueError("augmentation labels are added to the time's embedding: use_timestep must be True")
        if augment_dim:
            self.augment_emb = AugmentEmbedding(augment_dim, emb)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        widths = [ch, *(ch * mult for mult in ch_mult)]
        height, _ = read_image_size(resolution, "resolution")
        attends = [height // 2**level in attn_resolutions for level in range(len(ch_mult))]
        skips = [ch]
        self.down = nn.ModuleList()
        for index, width in enumerate(widths[1:]):
            sizes = [widths[index]] + [width] * (num_res_blocks - 1)
            level = _make_level([(size, width) for size in sizes], dropout, emb, attends[index], attn_type)
            skips += [width] * num_res_blocks
            if index < len(ch_mult) - 1:
                level.downsample = PaddedDownsample(width, resamp_with_conv)
                skips.append(width)
            self.down.append(level)
        self.mid = MiddleBlocks(widths[-1], dropout, attn_type, emb)
        levels, before = [], widths[-1]
        for index in reversed(range(len(ch_mult))):
            width = widths[index + 1]
            sizes = [before] + [width] * num_res_blocks
            pairs = [(size + skips.pop(), width) for size in sizes]
            level = _make_level(pairs, dropout, emb, attends[index], attn_type)
            if index:
                level.upsample = Upsample(width, resamp_with_conv)
            levels.append(level)
            before = width
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = normalization(before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, out_ch, 3, padding=1)

    @property
    def taps(self) -> dict[str, str]:
        """Names of the layers that features are read from: {tap: submodule}, in the order of computation."""
        down = ["conv_in"]
        for index, level in enumerate(self.down):
            down += level.last_names(f"down.{index}")
            down += [f"down.{index}.downsample"] if hasattr(level, "downsample") else []
        up = []
        for index in reversed(range(len(self.up))):
            up += self.up[index].last_names(f"up.{index}")
        inward = {f"in_{count}": name for count, name in enumerate(down)}
        return inward | {"mid": "mid"} | {f"out_{count}": name for count, name in enumerate(up, start=1)}

    @property
    def parts(self) -> Parts:
        """Its parts by name."""
        time = ("temb.*",) if hasattr(self, "temb") else ()
        return Parts(
            time_embedding=time,
            condition=(*time, *(("augment_emb.*",) if self.augment_dim else ())),
            output=("norm_out.*", "conv_out.*"),
            last_layer="conv_out",
            taps=self.taps,
        )

    def forward(
        self, x: Tensor, t: Tensor | None = None, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """`[B, out_ch, H, W]` of states `[B, C, H, W]` at times `[B]`; y: augmentation labels `[B, A]`, where told."""
        return self.readout(self.backbone(x, t, context, y))

    def backbone(
        self, x: Tensor, t: Tensor | None = None, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """The input `[B, ch, H, W]` of `readout`; arguments of `forward`."""
        return self.features(x, self.condition(t, y), context)

    def condition(self, t: Tensor | None, y: Tensor | None = None) -> Tensor | None:
        """Embedding `[B, 4 ch]` of times `[B]` and augmentation labels `[B, A]`; None of a network told no time."""
        labels, changes = split_augmented(y, self.augment_dim, labelled=False)
        if labels is not None:
            raise ValueError("this network takes no labels y")
        if not hasattr(self, "temb"):
            return None
        if t is None:
            raise ValueError("this network needs times t [B], got None")
        emb = self.temb(ddpm_embedding(t, self.ch).to(self.conv_in.weight.dtype))
        return emb if changes is None else emb + self.augment_emb(changes)

    def features(self, x: Tensor, emb: Tensor | None, context: Tensor | None = None) -> Tensor:
        """The input `[B, ch, H, W]` of `readout` for states, an embedding `[B, 4 ch]` and a context."""
        x = x if context is None else torch.cat([x, context], dim=1)  # [B, in_channels, H, W]
        if x.shape[1] != self.in_channels or any(size % self.size_multiple for size in x.shape[2:]):
            raise ValueError(
                f"x and context must be [B, {self.in_channels}, H, W] together with H and W multiples of "
                f"{self.size_multiple}, got {list(x.shape)}"
            )
        h = self.conv_in(x)  # [B, ch, H, W]
        skips = [h]
        for level in self.down:
            for index in range(len(level.block)):
                h = level.run_block(index, h, emb)  # [B, C_i, H / 2^i, W / 2^i]
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)  # [B, C_i, H / 2^(i+1), W / 2^(i+1)]
                skips.append(h)
        h = self.mid(h, emb)  # [B, C, H / f, W / f]
        for level in reversed(self.up):
            for index in range(len(level.block)):
                h = level.run_block(index, torch.cat([h, skips.pop()], dim=1), emb)  # [B, C_i, H / 2^i, W / 2^i]
            if hasattr(level, "upsample"):
                h = level.upsample(h)  # [B, C_i, H / 2^(i-1), W / 2^(i-1)]
        return h

    def readout(self, h: Tensor) -> Tensor:
        """`[B, out_ch, H, W]` of features `[B, ch, H, W]`."""
        return self.conv_out(F.silu(self.norm_out(h)))

    def get_last_layer(self) -> Tensor:
        """Weight of the last convolution."""
        return self.conv_out.weight


def _make_level(
    pairs: Sequence[tuple[int, int]], dropout: float, emb: int, attends: bool, attn_type: str
) -> ModelLevel:
    """Make the blocks of one size from their (channels in, channels out)."""
    blocks = [ResnetBlock(before, after, dropout, emb) for before, after in pairs]
    attention = [make_attn(after, attn_type) for _, after in pairs] if attends else []
    return ModelLevel(blocks, attention)
