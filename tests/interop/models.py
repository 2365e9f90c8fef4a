"""Tiny models of ours and of diffusers, with weights that are no zeros."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

F64 = torch.float64
UNET = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "num_heads": 1,
}
CODER = {
    "ch": 32,
    "out_ch": 3,
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "in_channels": 3,
    "resolution": 16,
    "z_channels": 3,
    "ch_mult": [1, 2],
}
BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8}
THEIR_UNET = {
    **BLOCKS,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 32,
}
THEIR_CROSS_UNET = {
    **BLOCKS,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
THEIR_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 3,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
THEIR_SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 16,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 6,
}
THEIR_FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}

THEIR_PIXART = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "cross_attention_dim": 48,
    "caption_channels": 16,
}


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in evaluation mode, its parameters drawn again so that no layer gives zeros; positions stay."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("pos_embed"):
                continue
            draw = torch.randn(parameter.shape, generator=draws)
            if parameter.ndim > 1:
                parameter.copy_(draw / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * draw + (name.endswith("weight")))
    return module.eval()


def randn(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def latent_diffusion(unet: dict[str, Any], **params: Any) -> nn.Module:
    """A `LatentDiffusion` with latent-diffusion's table of betas, filled."""
    from ldm.pipelines import build_model

    given = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "image_size": 8,
        "channels": 3,
        "use_ema": False,
        "unet_config": unet,
        "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "cond_stage_config": "__is_unconditional__",
        "clip_denoised": False,
        **params,
    }
    return filled(build_model({"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": given}}))


def flux_output(network: nn.Module, x: Tensor, tokens: Tensor, pooled: Tensor, t: Tensor, **given: Tensor) -> Tensor:
    """Flux's network on latents [B, C, 8, 8] as its pipeline calls it: patches of 2 x 2 with their rows and columns."""
    batch, channels = x.shape[:2]
    patches = x.view(batch, channels, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, 16, 4 * channels)
    places = torch.zeros(4, 4, 3)
    places[..., 1] += torch.arange(4)[:, None]
    places[..., 2] += torch.arange(4)
    ids = {"img_ids": places.reshape(16, 3), "txt_ids": torch.zeros(tokens.shape[1], 3)}
    output = network(patches, tokens, pooled, t, **ids, **given).sample
    return output.view(batch, 4, 4, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, 8, 8)


def saved(folder: Path, **parts: Any) -> Path:
    """A folder of parts, as a pipeline of theirs writes them."""
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **index}))
    return folder


@torch.no_grad()
def their_samples(scheduler: Any, predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """What a loop over a scheduler of theirs gives."""
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x).prev_sample
    return x
