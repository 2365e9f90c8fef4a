"""The transformer of PixArt from diffusers, in the stages that networks have here.

The class is diffusers' own with its constructor, modules and key names.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from ldm.interop.pooled import unpack_masked
from ldm.interop.transformers import TransformerStages, find_square
from ldm.interop.transforms import exact_attention
from ldm.modules.parts import Parts
from ldm.util import ImageSize

FILLING_BIAS = -10000.0  # Added to attention where a token does not count, as diffusers does.
LATENT_PIXELS = 8  # Pixels of a side of a latent, by which diffusers' pipelines say the size of an image.


class StagedPixArt(TransformerStages, PixArtTransformer2DModel):
    """`diffusers.PixArtTransformer2DModel`: blocks that attend to a text, of which some tokens count and others do not.

    Tokens and mask come as one context, see `pack_masked`. Networks of 1024 pixels are also told the size of the image.

    Args:
        sample_size: height and width of the latents, one number where they are equal; images of other sizes and these
            proportions are taken as well. The table of places is that of the square that holds them.
        config: arguments of diffusers' class.
    """

    def __init__(self, sample_size: ImageSize = 128, **config: Any):
        super().__init__(sample_size=find_square(sample_size), **config)
        self.in_channels = self.config.in_channels
        self.context_dim = self.config.caption_channels or self.config.cross_attention_dim
        self.patch = self.config.patch_size
        self.keep_size(sample_size)

    @property
    def parts(self) -> Parts:
        """Where the transformer keeps its parts, by diffusers' names."""
        time = ("adaln_single.*",)
        return Parts(time_embedding=time, output=("proj_out.*",), last_layer="proj_out", taps=self.taps)

    def condition(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The times `[B]` as they are, since what embeds them also reads the size of the states.

        Raises:
            ValueError: if there are labels: a text is the condition.
        """
        if y is not None:
            raise ValueError("this transformer takes a context (embedded text), and no labels")
        return timesteps

    def features(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        """The input `[B, N, D]` of the last layer at times `[B]`, for a context of tokens and mask.

        Raises:
            ValueError: for an image of other proportions, or without a context.
        """
        self._check_states(x)
        if context is None:
            raise ValueError("this transformer takes a context: embedded tokens, packed with their mask")
        tokens, mask = unpack_masked(context)
        hidden = FILLING_BIAS * (1 - mask)[:, None]  # [B, 1, L]
        text = tokens if self.caption_projection is None else self.caption_projection(tokens)
        h = self.pos_embed(x)
        given, embedded = self.adaln_single(emb, self._describe(x), batch_size=len(x), hidden_dtype=h.dtype)
        with exact_attention():
            for block in self.transformer_blocks:
                h = block(h, encoder_hidden_states=text, encoder_attention_mask=hidden, timestep=given)
        shift, scale = (self.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        return self.norm_out(h) * (1 + scale) + shift

    def _describe(self, x: Tensor) -> dict[str, Tensor] | None:
        """The size of the image in pixels and its proportions, of networks that are told them."""
        if not self.use_additional_conditions:
            return None
        size = torch.tensor([[float(LATENT_PIXELS * side) for side in x.shape[2:]]], dtype=x.dtype, device=x.device)
        return {"resolution": size.expand(len(x), 2), "aspect_ratio": (size[:, :1] / size[:, 1:]).expand(len(x), 1)}
