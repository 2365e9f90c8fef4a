"""First stages of latent-diffusion in diffusers' words: `VQModel` and `AutoencoderKL`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ldm.interop.converted import Converted, as_linear, renamed, require, tensors_below
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.resnet import AttnBlock, LinAttnBlock, ResnetBlock
from ldm.util import ImageSize

_RESIDUAL = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}


def convert_first_stage(stage: VQModel | AutoencoderKL, scale: float, sample_size: ImageSize) -> Converted:
    """Return a first stage as a class of diffusers that computes the same.

    Args:
        stage: of ours.
        scale: what its latents are multiplied by before they are noised.
        sample_size: height and width of an image.

    Raises:
        ValueError: for a first stage that none of diffusers' classes computes, saying why.
    """
    encoder, decoder = stage.encoder, stage.decoder
    _check(encoder, decoder)
    state = {**_coder(encoder, "encoder"), **_coder(decoder, "decoder")}
    for name in ("quant_conv", "post_quant_conv"):
        state |= tensors_below(getattr(stage, name), name)
    config = {**_config(encoder, decoder), "scaling_factor": scale, "sample_size": sample_size}
    latent = decoder.conv_in.in_channels
    if isinstance(stage, VQModel):
        state |= tensors_below(stage.quantize.embedding, "quantize.embedding")
        require(stage.quantize.remap is None, "its codes are renamed (remap)")
        codes = {"num_vq_embeddings": stage.n_embed, "vq_embed_dim": stage.embed_dim}
        return Converted("VQModel", {**config, **codes, "latent_channels": latent}, state)
    require(stage.embed_dim == latent, f"embed_dim {stage.embed_dim} must equal z_channels {latent}")
    return Converted("AutoencoderKL", {**config, "latent_channels": latent}, state)


def _coder(coder: Encoder | Decoder, name: str) -> dict[str, Tensor]:
    """Tensors of an encoder or a decoder below its name; a decoder's levels count from the smallest size there."""
    down = isinstance(coder, Encoder)
    levels = list(coder.down) if down else list(reversed(coder.up))
    state = renamed(coder, {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}, name)
    for index, level in enumerate(levels):
        place = f"{name}.{'down' if down else 'up'}_blocks.{index}"
        for number, block in enumerate(level.block):
            state |= renamed(block, _RESIDUAL, f"{place}.resnets.{number}")
        for number, block in enumerate(level.attn):
            state |= _attention(block, f"{place}.attentions.{number}")
        for ours, theirs in (("downsample", "downsamplers"), ("upsample", "upsamplers")):
            if hasattr(level, ours):
                state |= tensors_below(getattr(level, ours).conv, f"{place}.{theirs}.0.conv")
    state |= renamed(coder.mid.block_1, _RESIDUAL, f"{name}.mid_block.resnets.0")
    state |= renamed(coder.mid.block_2, _RESIDUAL, f"{name}.mid_block.resnets.1")
    return state | _attention(coder.mid.attn_1, f"{name}.mid_block.attentions.0")


def _attention(block: nn.Module, name: str) -> dict[str, Tensor]:
    if not isinstance(block, AttnBlock):
        return {}
    state = tensors_below(block.norm, f"{name}.group_norm")
    for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        state |= as_linear(getattr(block, ours), f"{name}.{theirs}")
    return state


def _config(encoder: Encoder, decoder: Decoder) -> dict[str, Any]:
    down, up = list(encoder.down), list(reversed(decoder.up))
    return {
        "in_channels": encoder.in_channels,
        "out_channels": decoder.conv_out.out_channels,
        "block_out_channels": [level.block[-1].conv2.out_channels for level in down],
        "layers_per_block": len(down[0].block),
        "norm_num_groups": encoder.norm_out.num_groups,
        "down_block_types": ["AttnDownEncoderBlock2D" if _attends(level) else "DownEncoderBlock2D" for level in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if _attends(level) else "UpDecoderBlock2D" for level in up],
        "mid_block_add_attention": isinstance(encoder.mid.attn_1, AttnBlock),
    }


def _attends(level: nn.Module) -> bool:
    return any(isinstance(block, AttnBlock) for block in level.attn)


def _check(encoder: Encoder, decoder: Decoder) -> None:
    first: ResnetBlock = encoder.down[0].block[0]
    widths = (encoder.conv_in.out_channels, first.conv2.out_channels)
    require(widths[0] == widths[1], f"ch_mult must begin with 1, got widths {widths}")
    require(not (decoder.tanh_out or decoder.give_pre_end), "its decoder ends otherwise (tanh_out, give_pre_end)")
    linear = [one for coder in (encoder, decoder) for one in coder.modules() if isinstance(one, LinAttnBlock)]
    require(not linear, "its attention is linear (attn_type)")
    resampled = [level.downsample for level in encoder.down if hasattr(level, "downsample")]
    resampled += [level.upsample for level in decoder.up if hasattr(level, "upsample")]
    require(all(hasattr(one, "conv") for one in resampled), "it resamples without convolving (resamp_with_conv)")
