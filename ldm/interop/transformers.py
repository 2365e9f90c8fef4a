"""Transformers of diffusers, in the stages that networks have here: DiT, and the flows of SD3 and Flux.

The classes are diffusers' own with their constructors, modules and key names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch.nn import functional as F

from ldm.interop.pooled import unpack_pooled
from ldm.interop.transforms import exact_attention
from ldm.modules.parts import Parts
from ldm.util import ImageSize, read_image_size, shorten_size

DIT_FREQUENCY_SHIFT = 1  # what diffusers computes; DiT itself was trained with 0


def unfold_patches(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Return images `[B, C, H, W]` of tokens `[B, N, patch * patch * C]` of a grid of patches, row by row."""
    cells = tokens.unflatten(1, grid).unflatten(3, (patch, patch, -1))  # [B, h, w, p, p, C]
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def find_square(sample_size: ImageSize) -> int:
    """Return the side of the square that holds states: the size that diffusers' classes with a square table take."""
    return max(read_image_size(sample_size, "sample_size"))


class TransformerStages:
    """What the transformers of diffusers share, as stages; mixed in before diffusers' class."""

    context_dim: int | None = None
    sample_size: ImageSize
    # Arguments that diffusers' class does not have.
    further_config: Mapping[str, Any] = MappingProxyType({})
    last_layer_name = "proj_out"
    patch: int

    def keep_size(self, sample_size: ImageSize, **further: Any) -> None:
        """Keep height and width of the states, whose proportions those of every size have, with further arguments."""
        height, width = read_image_size(sample_size, "sample_size")
        self.sample_size = shorten_size((height, width))
        self.proportions = (height // math.gcd(height, width), width // math.gcd(height, width))
        self.further_config = {**further, "sample_size": self.sample_size}

    @property
    def taps(self) -> dict[str, str]:
        """Names of the blocks that features are read from: {tap: submodule}, in the order of computation."""
        return {f"layer-{index}": f"transformer_blocks.{index}" for index in range(len(self.transformer_blocks))}

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """`[B, out_channels, H, W]` of states `[B, C, H, W]`, times `[B]`, a context `[B, L, D]` and labels `[B]`."""
        return self.readout(self.backbone(x, timesteps, context, y))

    def backbone(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """The input `[B, N, D]` of the last layer; arguments of `forward`."""
        return self.features(x, self.condition(timesteps, y), context)

    def readout(self, h: Tensor) -> Tensor:
        """Output `[B, out_channels, H, W]` of tokens `[B, N, D]`."""
        return unfold_patches(getattr(self, self.last_layer_name)(h), self.patch, self._grid(h.shape[1]))

    def _grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of a number of patches."""
        high, wide = self.proportions
        scale = math.isqrt(tokens // (high * wide))
        return scale * high, scale * wide

    def _check_states(self, x: Tensor) -> None:
        high, wide = self.proportions
        whole = all(side % self.patch == 0 for side in x.shape[2:])
        if x.shape[1] != self.in_channels or x.shape[2] * wide != x.shape[3] * high or not whole:
            sides = "S, S" if high == wide else f"{high} S, {wide} S"
            raise ValueError(
                f"x must be [B, {self.in_channels}, {sides}] with sides that are multiples of {self.patch}, "
                f"got {list(x.shape)}"
            )


class _DiTBlock(BasicTransformerBlock):
    """A block of DiT on tokens [B, N, D], shifted, scaled and gated by an embedding [B, D] that it is given."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        norm = self.norm1
        modulation = norm.linear(norm.silu(embedding))[:, None]  # [B, 1, 6 D]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        h = h + gate_a * self.attn1(norm.norm(h) * (1 + scale_a) + shift_a)
        return h + gate_m * self.ff(self.norm3(h) * (1 + scale_m) + shift_m)


class StagedDiT(TransformerStages, DiTTransformer2DModel):
    """`diffusers.DiTTransformer2DModel`, whose blocks each keep a table of classes and an embedding of time.

    Args:
        time_frequency_shift: the sinusoids of a time have frequencies 10000^(-i / (128 - shift)). diffusers takes 1;
            DiT (Peebles & Xie 2023) was trained with 0, which our export writes.
        sample_size: height and width of the states, one number where they are equal. Places of others are those of the
            first rows and columns of the square that holds them.
        config: arguments of diffusers' class.
    """

    last_layer_name = "proj_out_2"

    def __init__(self, time_frequency_shift: int = DIT_FREQUENCY_SHIFT, sample_size: ImageSize = 32, **config: Any):
        super().__init__(sample_size=find_square(sample_size), **config)
        self.in_channels = self.config.in_channels
        self.num_classes = self.config.num_embeds_ada_norm
        self.patch = self.config.patch_size
        self.keep_size(sample_size, time_frequency_shift=time_frequency_shift)
        for block in self.transformer_blocks:
            block.__class__ = _DiTBlock
            block.norm1.emb.time_proj.downscale_freq_shift = time_frequency_shift
            # Labels are dropped outside the network, by generators of known seeds.
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def parts(self) -> Parts:
        """Where the transformer keeps its parts, by diffusers' names."""
        tables = [
            f"transformer_blocks.{index}.norm1.emb.class_embedder.embedding_table.weight"
            for index in range(len(self.transformer_blocks))
        ]
        time = ("transformer_blocks.*.norm1.emb.timestep_embedder.*",)
        return Parts(
            class_tables=dict.fromkeys(tables, 0),
            time_embedding=time,
            condition=(*time, "transformer_blocks.*.norm1.emb.class_embedder.*"),
            output=("proj_out_2.*",),
            last_layer="proj_out_2",
            taps=self.taps,
        )

    def condition(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Embeddings `[B, blocks, D]` of times `[B]` and labels `[B]`; None stands for the null class."""
        if y is None:
            y = torch.full((len(timesteps),), self.num_classes, device=timesteps.device)
        each = [block.norm1.emb(timesteps, y, hidden_dtype=self.dtype) for block in self.transformer_blocks]
        return torch.stack(each, dim=1)

    def features(self, x: Tensor, emb: Tensor, context: None = None) -> Tensor:
        """The input `[B, N, D]` of the last layer, for embeddings `[B, blocks, D]`."""
        self._check_states(x)
        h = self._embed_patches(x)  # [B, N, D]
        with exact_attention():
            for index, block in enumerate(self.transformer_blocks):
                h = block(h, emb[:, index])
        shift, scale = self.proj_out_1(F.silu(emb[:, 0])).chunk(2, dim=1)
        return self.norm_out(h) * (1 + scale[:, None]) + shift[:, None]

    def _embed_patches(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, D]` with their places; those of a grid that is not square lie in the square that holds it."""
        if x.shape[2] == x.shape[3]:
            return self.pos_embed(x)
        rows, columns = (side // self.patch for side in x.shape[2:])
        side = math.isqrt(self.pos_embed.pos_embed.shape[1])
        if max(rows, columns) > side:
            raise ValueError(f"x must have sides up to {self.patch * side}, got {list(x.shape)}")
        places = self.pos_embed.pos_embed.unflatten(1, (side, side))[:, :rows, :columns].flatten(1, 2)
        tokens = self.pos_embed.proj(x).flatten(2).transpose(1, 2)  # [B, N, D]
        return (tokens + places).to(tokens.dtype)


class _FlowStages(TransformerStages):
    """Stages of a transformer whose condition is a text: embedded tokens, and one pooled vector of the whole.

    Both come as one context, see `ldm.interop.pooled`. The embedding of time needs the pooled vector, so the stage
    `condition` gives the times as they are.
    """

    @property
    def taps(self) -> dict[str, str]:
        """Names of what features are read from: the last layers of the blocks that see the patches."""
        return {f"layer-{index}": f"transformer_blocks.{index}.ff" for index in range(len(self.transformer_blocks))}

    @property
    def parts(self) -> Parts:
        """Where the transformer keeps its parts, by diffusers' names."""
        time = ("time_text_embed.*",)
        return Parts(time_embedding=time, output=("proj_out.*",), last_layer="proj_out", taps=self.taps)

    def condition(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The times `[B]` as they are.

        Raises:
            ValueError: if there are labels: a text is the condition.
        """
        if y is not None:
            raise ValueError("this transformer takes a context (embedded text), and no labels")
        return timesteps

    def features(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        """The input `[B, N, D]` of the last layer at times `[B]`, for a context of tokens and pooled vector.

        Raises:
            ValueError: for an image of other proportions, or without a context.
        """
        self._check_states(x)
        if context is None:
            raise ValueError("this transformer takes a context: embedded tokens, packed with their pooled vector")
        tokens, pooled = unpack_pooled(context, self.config.pooled_projection_dim)
        with exact_attention():
            return self._tokens(x, emb, tokens, pooled)


class StagedSD3(_FlowStages, SD3Transformer2DModel):
    """`diffusers.SD3Transformer2DModel`: the network of Stable Diffusion 3, whose time counts from 0 to 1000.

    Args:
        sample_size: height and width of the states, one number where they are equal.
        config: arguments of diffusers' class; `pos_embed_max_size` is the most patches of a side.
    """

    time_scale = 1000.0

    def __init__(self, sample_size: ImageSize = 128, **config: Any):
        super().__init__(sample_size=find_square(sample_size), **config)
        self.in_channels = self.config.in_channels
        self.context_dim = self.config.joint_attention_dim
        self.patch = self.config.patch_size
        self.keep_size(sample_size)

    def _tokens(self, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        h = self.pos_embed(x).contiguous()
        emb = self.time_text_embed(t, pooled)
        text = self.context_embedder(tokens)
        for block in self.transformer_blocks:
            text, h = block(hidden_states=h, encoder_hidden_states=text, temb=emb)
        return self.norm_out(h, emb)


class StagedFlux(_FlowStages, FluxTransformer2DModel):
    """`diffusers.FluxTransformer2DModel`: the network of Flux, whose time counts from 0 to 1.

    Its states are latents `[B, C, H, W]`, cut into patches of 2 x 2 here.

    Args:
        guidance: guidance that a distilled network (`guidance_embeds`) is told, 3.5 as published.
        sample_size: height and width of the latents, one number where they are equal; larger ones of these proportions
            are taken as well.
        config: arguments of diffusers' class.
    """

    time_scale = 1.0
    patch = 2

    def __init__(self, guidance: float = 3.5, sample_size: ImageSize = 128, **config: Any):
        super().__init__(**config)
        if self.config.patch_size != 1 or self.config.in_channels % self.patch**2:
            raise ValueError(
                f"expected patch_size 1 and in_channels a multiple of {self.patch**2}, "
                f"got {self.config.patch_size} and {self.config.in_channels}"
            )
        self.in_channels = self.config.in_channels // self.patch**2
        self.out_channels = self.proj_out.out_features // self.patch**2
        self.context_dim = self.config.joint_attention_dim
        self.guidance = guidance
        self.keep_size(sample_size, guidance=guidance)

    def _tokens(self, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        cells = x.unflatten(3, (grid[1], self.patch)).unflatten(2, (grid[0], self.patch))  # [B, C, h, p, w, p]
        h = self.x_embedder(cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))  # [B, h w, D]
        given = (t.to(h.dtype) * 1000,)
        if self.config.guidance_embeds:
            given = (*given, torch.full_like(given[0], 1000 * self.guidance))
        emb = self.time_text_embed(*given, pooled)
        text = self.context_embedder(tokens)
        angles = self.pos_embed(self._positions(tokens.shape[1], grid, x.device))
        for block in self.transformer_blocks:
            text, h = block(hidden_states=h, encoder_hidden_states=text, temb=emb, image_rotary_emb=angles)
        for block in self.single_transformer_blocks:
            text, h = block(hidden_states=h, encoder_hidden_states=text, temb=emb, image_rotary_emb=angles)
        return self.norm_out(h, emb)

    @staticmethod
    def _positions(length: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Places [L + h w, 3]: zeros for text; 0, row and column for patches."""
        places = torch.cartesian_prod(torch.arange(1), torch.arange(grid[0]), torch.arange(grid[1]))
        return torch.cat([places.new_zeros(length, 3), places]).float().to(device)

    def readout(self, h: Tensor) -> Tensor:
        """Output `[B, C, H, W]` of tokens `[B, N, D]`."""
        tokens = self.proj_out(h)  # [B, N, C p p]
        cells = tokens.unflatten(1, self._grid(tokens.shape[1])).unflatten(3, (-1, self.patch, self.patch))
        return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # of [B, h, w, C, p, p]
