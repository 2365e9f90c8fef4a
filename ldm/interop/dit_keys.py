"""DiT in diffusers' words: `DiTTransformer2DModel`, whose blocks each hold the embeddings of time and class."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.interop.converted import Converted, require, tensors_below
from ldm.modules.dit import DiT, DiTBlock, grid_positions

_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}


def convert_dit(transformer: DiT) -> Converted:
    """Return a DiT as diffusers' class, apart from the frequencies of its times.

    diffusers divides the exponents of the frequencies by 127 where DiT (Peebles & Xie 2023) divides by 128, whatever
    its arguments. The config's `time_frequency_shift: 0`, which diffusers ignores, says so; see `StagedDiT`.

    Raises:
        ValueError: if the blocks are wider or narrower inside than theirs, or the positions were trained.
    """
    width = transformer.x_embedder.proj.out_channels
    hidden = transformer.blocks[0].mlp.fc1.out_features
    require(hidden == 4 * width, f"mlp_ratio must be 4, got {hidden / width}")
    across, down = transformer.grid
    require(across == down, f"its states are not square, {across} x {down} patches")
    positions = grid_positions(width, across).to(transformer.pos_embed)
    require(torch.allclose(transformer.pos_embed[0], positions, atol=1e-5), "its positions are no sines and cosines")
    heads = transformer.blocks[0].attn.heads
    state = {
        **tensors_below(transformer.x_embedder.proj, "pos_embed.proj"),
        **tensors_below(transformer.final_layer.adaLN_modulation[1], "proj_out_1"),
        **tensors_below(transformer.final_layer.linear, "proj_out_2"),
    }
    for index, block in enumerate(transformer.blocks):
        state |= _block(transformer, block, f"transformer_blocks.{index}")
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": transformer.in_channels,
        "out_channels": transformer.out_channels,
        "num_layers": len(transformer.blocks),
        "sample_size": across * transformer.patch_size,
        "patch_size": transformer.patch_size,
        "num_embeds_ada_norm": transformer.num_classes,
        "activation_fn": "gelu-approximate",
        "norm_eps": transformer.blocks[0].norm2.eps,
        "time_frequency_shift": 0,
    }
    return Converted("DiTTransformer2DModel", config, state)


def _block(transformer: DiT, block: DiTBlock, name: str) -> dict[str, Tensor]:
    modules = dict(block.named_modules())
    state: dict[str, Tensor] = {}
    for ours, theirs in _BLOCK.items():
        state |= tensors_below(modules[ours], f"{name}.{theirs}")
    for kind, tensor in (("weight", block.attn.qkv.weight), ("bias", block.attn.qkv.bias)):
        for letter, value in zip("qkv", tensor.chunk(3), strict=True):
            state[f"{name}.attn1.to_{letter}.{kind}"] = value
    embedding = f"{name}.norm1.emb"
    for number, layer in ((1, transformer.t_embedder.mlp[0]), (2, transformer.t_embedder.mlp[2])):
        state |= tensors_below(layer, f"{embedding}.timestep_embedder.linear_{number}")
    table = transformer.y_embedder.embedding_table.weight
    if len(table) == transformer.num_classes:  # theirs always has a null class; this network never met it
        table = torch.cat([table, torch.zeros_like(table[:1])])
    return {**state, f"{embedding}.class_embedder.embedding_table.weight": table}
