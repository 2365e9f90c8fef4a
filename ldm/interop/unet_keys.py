"""The UNet of latent-diffusion and ADM in diffusers' words: `UNet2DModel`, or `UNet2DConditionModel` with a context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ldm.interop.converted import Converted, as_linear, renamed, require, tensors_below
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.blocks import AttentionBlock, ResBlock
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import ImageSize

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}


def convert_unet(unet: UNetModel, sample_size: ImageSize) -> Converted:
    """Return our UNet as a class of diffusers that computes the same.

    Args:
        unet: `ldm.modules.diffusionmodules.openaimodel.UNetModel`.
        sample_size: height and width of its states.

    Raises:
        ValueError: for a UNet that none of diffusers' classes computes, saying why.
    """
    placed = list(_placed(unet))
    _check(unet, placed)
    state = {
        **tensors_below(unet.input_blocks[0][0], "conv_in"),
        **tensors_below(unet.time_embed[0], "time_embedding.linear_1"),
        **tensors_below(unet.time_embed[2], "time_embedding.linear_2"),
        **tensors_below(unet.out[0], "conv_norm_out"),
        **tensors_below(unet.out[2], "conv_out"),
    }
    if unet.num_classes is not None:
        state |= tensors_below(unet.label_emb, "class_embedding")
    for name, module in placed:
        state |= _tensors(module, name)
    return Converted(_class_name(unet), {**_config(unet, placed), "sample_size": sample_size}, state)


def _class_name(unet: UNetModel) -> str:
    return "UNet2DModel" if unet.context_dim is None else "UNet2DConditionModel"


def _placed(unet: UNetModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name in diffusers, module of ours) of every block, attention and change of size."""
    levels = len(unet.channel_mult)
    blocks = iter(unet.input_blocks[1:])
    for level in range(levels):
        name = f"down_blocks.{level}"
        for index in range(unet.num_res_blocks):
            yield from _pair(next(blocks), name, index)
        if level < levels - 1:
            yield f"{name}.downsamplers.0", next(blocks)[0]
    first, attention, last = unet.middle_block
    yield "mid_block.resnets.0", first
    yield "mid_block.attentions.0", attention
    yield "mid_block.resnets.1", last
    blocks = iter(unet.output_blocks)
    for level in range(levels):
        name = f"up_blocks.{level}"
        for index in range(unet.num_res_blocks + 1):
            layers = next(blocks)
            yield from _pair(layers, name, index)
        if level < levels - 1:
            yield f"{name}.upsamplers.0", layers[-1]


def _pair(layers: nn.Sequential, name: str, index: int) -> Iterator[tuple[str, nn.Module]]:
    yield f"{name}.resnets.{index}", layers[0]
    if len(layers) > 1 and isinstance(layers[1], AttentionBlock | SpatialTransformer):
        yield f"{name}.attentions.{index}", layers[1]


def _tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    if isinstance(module, ResBlock):
        shortcut = {} if isinstance(module.skip_connection, nn.Identity) else {"skip_connection": "conv_shortcut"}
        return renamed(module, _RESIDUAL | shortcut, name)
    if isinstance(module, AttentionBlock):
        return _attention(module, name)
    if isinstance(module, SpatialTransformer):
        return tensors_below(module, name)
    layer = module.op if hasattr(module, "op") else module.conv
    return tensors_below(layer, f"{name}.conv")


def _attention(module: AttentionBlock, name: str) -> dict[str, Tensor]:
    """Tensors of self-attention; the rows of `qkv` lie head by head, or with the new order query by query."""
    state = {**tensors_below(module.norm, f"{name}.group_norm"), **as_linear(module.proj_out, f"{name}.to_out.0")}
    for kind, tensor in (("weight", module.qkv.weight.flatten(1)), ("bias", module.qkv.bias)):
        if module.use_new_attention_order:
            rows = tensor.unflatten(0, (3, -1)).unbind(0)
        else:
            rows = [part.flatten(0, 1) for part in tensor.unflatten(0, (module.num_heads, 3, -1)).unbind(1)]
        for letter, value in zip("qkv", rows, strict=True):
            state[f"{name}.to_{letter}.{kind}"] = value
    return state


def _config(unet: UNetModel, placed: list[tuple[str, nn.Module]]) -> dict[str, Any]:
    modules = dict(placed)
    levels = range(len(unet.channel_mult))
    down = [f"down_blocks.{level}" for level in levels]
    up = [f"up_blocks.{level}" for level in levels]
    width = [int(mult * unet.model_channels) for mult in unet.channel_mult]
    residual = modules["mid_block.resnets.0"]
    config = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": width,
        "layers_per_block": unet.num_res_blocks,
        "norm_num_groups": residual.in_layers[0].num_groups,
        "norm_eps": residual.in_layers[0].eps,
        "num_class_embeds": unet.num_classes,
        "dropout": residual.out_layers[2].p,
        "resnet_time_scale_shift": "scale_shift" if residual.use_scale_shift_norm else "default",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if unet.context_dim is None:
        updown = any(isinstance(module, ResBlock) for name, module in placed if "samplers" in name)
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if updown else ("DownBlock2D", "UpBlock2D")
        kinds = (*plain, "AttnDownBlock2D", "AttnUpBlock2D")
        heads = modules["mid_block.attentions.0"]
        config |= {
            "attention_head_dim": width[-1] // heads.num_heads,
            "attn_norm_num_groups": heads.norm.num_groups,
            "downsample_type": "resnet" if updown else "conv",
            "upsample_type": "resnet" if updown else "conv",
        }
    else:
        kinds = ("DownBlock2D", "UpBlock2D", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
        middle = modules["mid_block.attentions.0"]
        attentions = [modules.get(f"{name}.attentions.0", middle) for name in down]
        config |= {
            "cross_attention_dim": unet.context_dim,
            # Their name; they mean the number of heads.
            "attention_head_dim": [_cross_heads(attention) for attention in attentions],
            "transformer_layers_per_block": [len(attention.transformer_blocks) for attention in attentions],
            "use_linear_projection": False,
        }
    config["down_block_types"] = [kinds[2 * (f"{name}.attentions.0" in modules)] for name in down]
    config["up_block_types"] = [kinds[2 * (f"{name}.attentions.0" in modules) + 1] for name in up]
    return config


def _cross_heads(attention: SpatialTransformer) -> int:
    return attention.transformer_blocks[0].attn1.heads


def _check(unet: UNetModel, placed: list[tuple[str, nn.Module]]) -> None:
    """Check that diffusers' blocks compute what ours do.

    Raises:
        ValueError: naming what they do not.
    """
    require(unet.n_embed is None, "it predicts codes (n_embed)")
    require(unet.channel_mult[0] == 1, f"channel_mult must begin with 1, got {list(unet.channel_mult)}")
    require(unet.input_blocks[0][0].weight.ndim == 4, "it is not of two dimensions")
    cross = unet.context_dim is not None
    for name, module in placed:
        if isinstance(module, ResBlock):
            require(not (cross and "samplers" in name), "residual blocks that resample, beside a context")
        elif isinstance(module, SpatialTransformer):
            attention = module.transformer_blocks[0].attn1
            inner = attention.to_q.out_features
            require(inner == attention.to_q.in_features == module.norm.num_channels, f"{name} is narrower inside")
        elif isinstance(module, AttentionBlock):
            require(not cross, "attention to a context on some levels only")
        else:
            require(hasattr(module, "op") or getattr(module, "use_conv", False), f"{name} resamples without convolving")
            require(not hasattr(module, "op") or isinstance(module.op, nn.Conv2d), f"{name} averages")
    if not cross:
        widths = {
            module.norm.num_channels // module.num_heads for _, module in placed if isinstance(module, AttentionBlock)
        }
        require(len(widths) == 1, f"attention heads must be equally wide on all levels, got widths {sorted(widths)}")
