"""Pictures of other sizes than a model was trained on, where its network takes them."""

from __future__ import annotations

import copy

from torch import nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import shorten_size


def find_factor(stage: nn.Module) -> int:
    """Return the side, in pixels, of what one latent pixel of a first stage stands for; 1 where there is none."""
    encoder = getattr(stage, "encoder", None)
    widths = getattr(getattr(stage, "config", None), "block_out_channels", None)
    if widths is not None:  # a class of diffusers
        return 2 ** (len(widths) - 1)
    return int(getattr(encoder, "factor", getattr(stage, "factor", 1)))


def resize_states(model: LatentDiffusion, height: int, width: int) -> LatentDiffusion:
    """Return a model, of the same weights, whose states are those of pictures [height, width] in pixels.

    Raises:
        ValueError: for another size of a network that has a fixed one, or a size that is not divided evenly.
    """
    factor = find_factor(model.first_stage_model)
    own = tuple(factor * side for side in model.latent_shape[1:])
    if (height, width) == own:
        return model
    network = model.model.diffusion_model
    multiple = getattr(network, "size_multiple", None)
    if multiple is None:
        raise ValueError(
            f"pictures of {height} x {width} pixels: {type(network).__name__} takes those of its config only, "
            f"{own[0]} x {own[1]}"
        )
    step = factor * multiple
    if height < 1 or width < 1 or height % step or width % step:
        raise ValueError(
            f"pictures of {height} x {width} pixels: height and width must be multiples of {step}, which the network "
            f"({multiple}) and the first stage ({factor}) halve them by"
        )
    resized = copy.copy(model)
    resized.image_size = shorten_size((height // factor, width // factor))
    return resized
