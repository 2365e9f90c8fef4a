"""The UNet of guided-diffusion (ADM) and latent-diffusion, in stages: `condition`, `features`, `out`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.augment_labels import AugmentEmbedding, split_augmented
from ldm.modules.diffusionmodules.blocks import (
    AttentionBlock,
    BlockFactory,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    build_encoder,
    build_middle,
)
from ldm.modules.diffusionmodules.encoder_unet import EncoderUNetModel
from ldm.modules.diffusionmodules.util import (
    NORM_GROUPS,
    conv_nd,
    convert_linear_maps,
    normalization,
    repeat_rows,
    split_last_layer,
    timestep_embedding,
    zero_module,
)
from ldm.modules.parts import Parts
from ldm.util import ImageSize, read_image_size, shorten_size

__all__ = [
    "AttentionBlock",
    "Downsample",
    "EncoderUNetModel",
    "ResBlock",
    "TimestepEmbedSequential",
    "UNetModel",
    "Upsample",
    "split_last_layer",
]

log = logging.getLogger(__name__)


class UNetModel(nn.Module):
    """Residual UNet with attention, conditioned by a time and a class label or a context.

    `forward(x, t, context, y) == readout(backbone(x, t, context, y))`, where
    `backbone = features(x, condition(t, y), context)` and `readout` is `out` (or `id_predictor`). Each stage is a
    value, so heads at either end run without the rest. All of it works under `torch.func.functional_call`, `vmap` and
    `jvp`.

    Source: Dhariwal & Nichol 2021 (arXiv 2105.05233, section 3); Rombach et al. 2022 (arXiv 2112.10752, section 3.3).
    State-dict keys, arguments and defaults are the published ones.
    """

    shares_x = True  # Takes images under several conditions, see `features`.

    def __init__(
        self,
        image_size: ImageSize,  # Height and width it is made for; any multiple of the downsampling works.
        in_channels: int,  # Channels of x.
        model_channels: int,  # Width of the first level, a multiple of 32.
        out_channels: int,  # Channels predicted; twice in_channels if the variance is learned.
        num_res_blocks: int,  # Residual blocks a level.
        attention_resolutions: Sequence[int],  # Downsampling factors that have attention.
        dropout: float = 0.0,  # In residual blocks.
        channel_mult: Sequence[float] = (1, 2, 4, 8),  # Width of each level, over model_channels.
        conv_resample: bool = True,  # Resample with convolutions.
        dims: int = 2,  # 1, 2 or 3 dimensions.
        num_classes: int | None = None,  # Number of labels y.
        use_checkpoint: bool = False,  # Recompute activations in the backward pass.
        use_fp16: bool = False,  # Half precision between the embeddings and `out`.
        num_heads: int = -1,  # Attention heads, or
        num_head_channels: int = -1,  # the width of each.
        num_heads_upsample: int = -1,  # Heads of plain attention on the way up; -1: num_heads.
        use_scale_shift_norm: bool = False,  # The embedding scales and shifts, rather than adds.
        resblock_updown: bool = False,  # Resample inside residual blocks.
        use_new_attention_order: bool = False,  # Order of the rows of `qkv`.
        use_spatial_transformer: bool = False,  # Attention to a context.
        transformer_depth: int = 1,  # Blocks of each spatial transformer.
        context_dim: int | None = None,  # Width of the context.
        n_embed: int | None = None,  # Predict logits of this many codes instead.
        legacy: bool = True,  # Head widths of spatial transformers fill the level's width.
        ensemble_size: int = 1,  # Accepted for DECU's configs; members live outside the network.
        old_ensemble: bool = False,  # Accepted for DECU's configs.
        augment_dim: int = 0,  # Augmentation labels that it is told.
    ):
        super().__init__()
        if use_spatial_transformer != (context_dim is not None):
            given = f"use_spatial_transformer={use_spatial_transformer} with context_dim={context_dim}"
            raise ValueError(f"a spatial transformer and the width of its context go together, got {given}")
        if num_heads == -1 and num_head_channels == -1:
            raise ValueError("num_heads and num_head_channels are both -1; set one of them")
        if not use_scale_shift_norm and max(channel_mult) * model_channels <= NORM_GROUPS:
            log.warning(
                "with %d channels at every level each group of the norms is one channel, and takes out what the time "
                "adds: the network cannot tell times apart. Set use_scale_shift_norm, or widen a level",
                NORM_GROUPS,
            )
        self.image_size = shorten_size(read_image_size(image_size))
        self.in_channels, self.out_channels = in_channels, out_channels
        self.model_channels, self.emb_channels = model_channels, 4 * model_channels
        self.num_classes, self.context_dim, self.n_embed = num_classes, context_dim, n_embed
        self.augment_dim = augment_dim
        self.num_res_blocks, self.channel_mult = num_res_blocks, tuple(channel_mult)
        self.attention_resolutions = tuple(attention_resolutions)
        residual = (dropout, dims, use_checkpoint, use_scale_shift_norm, conv_resample, resblock_updown)
        heads = (num_heads, num_head_channels, num_heads_upsample, use_new_attention_order)
        attention = (use_spatial_transformer, transformer_depth, context_dim, legacy)
        self._build(BlockFactory(self.emb_channels, *residual, *heads, *attention))
        if use_fp16:
            self.convert_to_fp16()

    def _build(self, blocks: BlockFactory) -> None:
        width = self.emb_channels
        self.time_embed = nn.Sequential(nn.Linear(self.model_channels, width), nn.SiLU(), nn.Linear(width, width))
        if self.num_classes is not None:
            self.label_emb = nn.Embedding(self.num_classes, width)
        if self.augment_dim:
            self.augment_emb = AugmentEmbedding(self.augment_dim, width)
        sizes = (self.in_channels, self.model_channels, self.num_res_blocks)
        encoder = build_encoder(blocks, *sizes, self.attention_resolutions, self.channel_mult)
        self.input_blocks, skips, factor = encoder
        channels = skips[-1]
        self.middle_block = build_middle(blocks, channels)
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(self.channel_mult))):
            out_channels = int(self.channel_mult[level] * self.model_channels)
            for index in range(self.num_res_blocks + 1):
                parts: list[nn.Module] = [blocks.residual(channels + skips.pop(), out_channels)]
                channels = out_channels
                if factor in self.attention_resolutions:
                    parts.append(blocks.attention(channels, decoder=True))
                if level and index == self.num_res_blocks:
                    parts.append(blocks.up(channels))
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*parts))
        last = zero_module(conv_nd(blocks.dims, channels, self.out_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(channels), nn.SiLU(), last)
        if self.n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(channels), conv_nd(blocks.dims, channels, self.n_embed, 1))

    @property
    def head_name(self) -> str:
        """Name of the submodule that reads the features out."""
        return "out" if self.n_embed is None else "id_predictor"

    @property
    def size_multiple(self) -> int:
        """What height and width of the images must be multiples of."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def taps(self) -> dict[str, str]:
        """Names of the layers that features are read from: {tap: submodule}, in the order of computation."""
        down = {f"in_{count}": f"input_blocks.{count}" for count in range(len(self.input_blocks))}
        up = {f"out_{count}": f"output_blocks.{count - 1}" for count in range(1, len(self.output_blocks) + 1)}
        return down | {"mid": "middle_block"} | up

    @property
    def parts(self) -> Parts:
        """Where the class table, the time embedding, the readout and the taps are."""
        classes = () if self.num_classes is None else ("label_emb.*",)
        return Parts(
            class_tables={"label_emb.weight": 0} if classes else {},
            time_embedding=("time_embed.*",),
            condition=("time_embed.*", *classes, *(("augment_emb.*",) if self.augment_dim else ())),
            output=(f"{self.head_name}.*",),
            last_layer=f"{self.head_name}.{len(getattr(self, self.head_name)) - 1}",
            taps=self.taps,
        )

    def forward(
        self, x: Tensor, timesteps: Tensor | None = None, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """Predict from a noisy image.

        Args:
            x: `[B, in_channels, H, W]`.
            timesteps: `[B]`, whole or fractional, or one for all `[]`.
            context: `[B, T, context_dim]`, for spatial transformers.
            y: labels `[B]` of `num_classes`; with augmentation labels `[B, 1 + A]`, or `[B, A]` without classes.

        Returns:
            `[B, out_channels, H, W]` (`[B, n_embed, H, W]` with `n_embed`).
        """
        return self.readout(self.backbone(x, timesteps, context, y))

    def backbone(
        self, x: Tensor, timesteps: Tensor | None = None, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """The input `[B, C, H, W]` of `out`; arguments of `forward`."""
        return self.features(x, self.condition(timesteps, y), context)

    def readout(self, h: Tensor) -> Tensor:
        """`out(h)`, or the code logits of a network with `n_embed`; h `[B, C, H, W]`."""
        return getattr(self, self.head_name)(h)

    def condition(self, timesteps: Tensor | None, y: Tensor | None = None) -> Tensor:
        """Embedding of time `[B]` (or `[]`) and labels y: `[B, 4 model_channels]` (a time `[]` alone: B = 1).

        Of more labels than times, label j has time j mod B.
        """
        if timesteps is None:
            raise ValueError("the network needs timesteps [B], got None")
        labels, changes = split_augmented(y, self.augment_dim, labelled=self.num_classes is not None)
        if (labels is None) != (self.num_classes is None):
            raise ValueError(
                f"labels y are needed exactly if num_classes is set; num_classes={self.num_classes}, "
                f"y={'None' if y is None else list(y.shape)}"
            )
        dtype = self.time_embed[0].weight.dtype
        t = timesteps.to(torch.promote_types(dtype, torch.float32)).reshape(-1)  # [B]
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(dtype))  # [B, 4 model_channels]
        if labels is not None:
            emb = repeat_rows(emb, max(len(emb), len(labels))) + self.label_emb(labels)  # [B, 4 model_channels]
        return emb if changes is None else emb + self.augment_emb(changes)

    def features(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        """Run the torso: x `[B, in_channels, H, W]`, emb `[B, 4 model_channels]`, context `[B, T, E]` or None.

        Any of the three may have fewer rows, a divisor of the others': row j of the result is of row j mod B of it. One
        image under several conditions so passes once through what comes before the first block that reads them (of a
        network with spatial transformers: the levels before the first that has attention).

        Returns:
            The input `[B, C, H, W]` of `out`, in the type of its parameters.
        """
        return self.split_features(x, emb, context, 0)[0]

    def split_features(
        self, x: Tensor, emb: Tensor, context: Tensor | None, shallow: int, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return `features`, and what their last `shallow` blocks take from the blocks below.

        Args:
            shallow: number of blocks at either end, up to that of `input_blocks`; all others are deep.
            deep: `[B, C_i, H / f, W / f]`, what an earlier call returned second: no deep block runs then.
        """
        self._check(x, emb, context)
        h = x.to(self.input_blocks[0][0].weight.dtype)  # [B, in_channels, H, W]
        below, above = list(self.input_blocks), list(self.output_blocks)
        split = len(above) - shallow
        skips = []
        for block in below if deep is None else below[:shallow]:
            h = block(h, emb, context)  # [B, C_i, H / f, W / f]
            skips.append(h)
        if deep is None:
            h = self.middle_block(h, emb, context)  # [B, C_mid, H / f_max, W / f_max]
            deep = _run_upwards(above[:split], h, skips, emb, context)
        h = _run_upwards(above[split:], deep, skips, emb, context)
        return h.to(self.out[-1].weight.dtype), deep  # [B, C, H, W]

    def convert_to_fp16(self) -> None:
        """Convert the linear maps of the torso to float16; embeddings, norms and `out` stay as they are."""
        self._convert(torch.float16)

    def convert_to_fp32(self) -> None:
        """Undo `convert_to_fp16`."""
        self._convert(torch.float32)

    def _convert(self, dtype: torch.dtype) -> None:
        for part in (self.input_blocks, self.middle_block, self.output_blocks):
            convert_linear_maps(part, dtype, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            for module in part.modules():
                if isinstance(module, SpatialTransformer):
                    convert_linear_maps(module, dtype, (nn.Linear,))

    def _check(self, x: Tensor, emb: Tensor, context: Tensor | None) -> None:
        factor = 2 ** (len(self.channel_mult) - 1)
        if x.shape[1] != self.in_channels or any(size % factor for size in x.shape[2:]):
            raise ValueError(
                f"x must be [B, {self.in_channels}, H, W] with H and W multiples of {factor}, got {list(x.shape)}"
            )
        rows = max(len(x), len(emb), 0 if context is None else len(context))
        if rows % len(x) or rows % len(emb) or max(len(x), len(emb)) % min(len(x), len(emb)):
            raise ValueError(f"{len(emb)} times or labels for {len(x)} images; give one for each")
        if self.context_dim is None:
            if context is not None:
                raise ValueError("this network has no spatial transformer and takes no context; pass labels as y")
        elif context is None or rows % len(context) or context.shape[-1] != self.context_dim:
            got = "None" if context is None else list(context.shape)
            raise ValueError(f"context must be [{rows}, T, {self.context_dim}], got {got}")


def _run_upwards(
    blocks: Sequence[nn.Module], h: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor | None
) -> Tensor:
    """Run blocks of the upward half, each of which takes the last of the maps that were kept on the way down."""
    for block in blocks:
        h = torch.cat([h, repeat_rows(skips.pop(), len(h))], dim=1)  # [B, C_i + C_skip, H / f, W / f]
        h = block(h, emb, context)  # [B, C_i, H / f', W / f']
    return h
