"""Networks of diffusers here: in stages, under every transform, and what travels with their tokens."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, jvp, vmap

from ldm.interop.pooled import pack_masked, pack_pooled, unpack_masked, unpack_pooled
from ldm.modules.parts import find_parts
from ldm.util import get_obj_from_str
from tests.interop.models import (
    THEIR_CROSS_UNET,
    THEIR_DIT,
    THEIR_FLUX,
    THEIR_PIXART,
    THEIR_SD3,
    THEIR_UNET,
    filled,
    flux_output,
    randn,
    relative,
)

diffusers = pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")

TIMES = torch.tensor([3.0, 981.0])
LABELS = torch.tensor([1, 9])
TOKENS, POOLED = randn(2, 5, 16, seed=2), randn(2, 24, seed=3)
NETWORKS = {
    "UNet2DModel": {**THEIR_UNET, "num_class_embeds": 11},
    "UNet2DConditionModel": THEIR_CROSS_UNET,
    "DiTTransformer2DModel": THEIR_DIT,
    "SD3Transformer2DModel": THEIR_SD3,
    "FluxTransformer2DModel": {**THEIR_FLUX, "guidance_embeds": True},
    "PixArtTransformer2DModel": {**THEIR_PIXART, "use_additional_conditions": True},
}
MASK = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def their_output(network, kind, x):
    """What their own class gives, called as their pipelines call it."""
    if kind == "UNet2DModel":
        return network(x, TIMES, class_labels=LABELS).sample
    if kind == "UNet2DConditionModel":
        return network(x, TIMES, encoder_hidden_states=TOKENS).sample
    if kind == "DiTTransformer2DModel":
        return network(x, TIMES, class_labels=LABELS).sample
    if kind == "SD3Transformer2DModel":
        return network(x, TOKENS, POOLED, TIMES).sample
    if kind == "PixArtTransformer2DModel":
        size = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
        return network(x, TOKENS, TIMES, size, encoder_attention_mask=MASK).sample
    return flux_output(network, x, TOKENS, POOLED, TIMES / 1000, guidance=torch.full((2,), 3.5))


def our_arguments(kind):
    if "Flux" in kind or "SD3" in kind:
        return (TIMES / 1000 if "Flux" in kind else TIMES, pack_pooled(TOKENS, POOLED))
    if kind == "PixArtTransformer2DModel":
        return (TIMES, pack_masked(TOKENS, MASK))
    return (TIMES, TOKENS) if kind == "UNet2DConditionModel" else (TIMES, None, LABELS)


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_networks_in_stages_are_theirs_under_every_transform(kind):
    """The same numbers as a whole, by stages, by vmap over members and with a derivative; parts are where they say."""
    ours = filled(get_obj_from_str(f"diffusers.{kind}")(**NETWORKS[kind])).double()
    theirs = getattr(diffusers, kind)(**NETWORKS[kind]).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x, arguments = randn(2, ours.in_channels, 8, 8), our_arguments(kind)
    expected = their_output(theirs, kind, x)
    found, change = jvp(lambda state: ours(state, *arguments), (x,), (randn(*x.shape, seed=5),))
    assert relative(ours(x, *arguments), expected) < 1e-12
    assert relative(found, expected) < 1e-12
    assert change.abs().max() > 1e-3
    parts = find_parts(ours)
    names = dict(ours.named_parameters())
    assert all(ours.get_submodule(name) for name in (parts.last_layer, *parts.taps.values()))
    inner = next(name for name in names if name.endswith(("resnets.0.conv1.weight", "to_q.weight")))
    chosen = [f"{parts.last_layer}.weight", inner, *parts.class_tables]
    stacked = {name: torch.stack([names[name], 1.1 * names[name]]) for name in chosen}
    members = vmap(lambda own: functional_call(ours, own, (x, *arguments)))(stacked)
    assert relative(members[0], expected) < 1e-12
    assert relative(members[1], expected) > 1e-3


@torch.no_grad()
def test_blocks_of_the_upscaler_pass_under_every_transform():
    """Their norms read an embedding, and their attention leaves tokens in another memory layout."""
    blocks = {"down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"), "mid_block_type": None}
    blocks |= {"up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"), "block_out_channels": (64, 64)}
    given = {**THEIR_CROSS_UNET, **blocks, "norm_num_groups": None, "attention_head_dim": 8, "time_embedding_dim": 64}
    ours = filled(get_obj_from_str("diffusers.UNet2DConditionModel")(**given)).double()
    theirs = diffusers.UNet2DConditionModel(**given).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x, expected = randn(2, 4, 8, 8), theirs(randn(2, 4, 8, 8), TIMES, encoder_hidden_states=TOKENS).sample
    found, _ = jvp(lambda state: ours(state, TIMES, TOKENS), (x,), (randn(2, 4, 8, 8, seed=5),))
    assert relative(found, expected) < 1e-12
    inner = next(name for name in dict(ours.named_parameters()) if name.endswith("to_q.weight"))
    stacked = {inner: torch.stack([ours.get_parameter(inner)] * 2)}
    members = vmap(lambda own: functional_call(ours, own, (x, TIMES, TOKENS)))(stacked)
    assert relative(members[1], expected) < 1e-12


@torch.no_grad()
def test_transformers_take_states_that_are_wider_than_high():
    """SD3 is theirs; DiT, which is square there, has the places of the first rows of the square that holds it."""
    given = {**THEIR_SD3, "pos_embed_max_size": 9}
    wide = filled(get_obj_from_str("diffusers.SD3Transformer2DModel")(**{**given, "sample_size": [8, 16]})).double()
    theirs = diffusers.SD3Transformer2DModel(**{**given, "sample_size": 16}).double().eval()
    theirs.load_state_dict(wide.state_dict())
    x = randn(2, 4, 8, 16)
    assert relative(wide(x, TIMES, pack_pooled(TOKENS, POOLED)), theirs(x, TOKENS, POOLED, TIMES).sample) < 1e-12
    with pytest.raises(ValueError, match=r"\[B, 4, 1 S, 2 S\] with sides that are multiples of 2"):
        wide(x.movedim(3, 2), TIMES, pack_pooled(TOKENS, POOLED))
    dit = filled(get_obj_from_str("diffusers.DiTTransformer2DModel")(**{**THEIR_DIT, "sample_size": [8, 16]})).double()
    x = randn(2, 3, 8, 16)
    square = dit.pos_embed(torch.nn.functional.pad(x, (0, 0, 0, 8)))
    assert relative(dit._embed_patches(x), square[:, : 4 * 8]) < 1e-12
    assert dit(x, TIMES, y=LABELS).shape == (2, 3, 8, 16)
    assert dit.further_config["sample_size"] == (8, 16)


def test_pooled_vectors_travel_with_their_tokens():
    tokens, pooled = unpack_pooled(pack_pooled(TOKENS, POOLED), 24)
    assert torch.equal(tokens, TOKENS)
    assert torch.equal(pooled, POOLED)
    with pytest.raises(ValueError, match="ends with 2 rows"):
        unpack_pooled(TOKENS[:, :2], 24)


@pytest.mark.parametrize("length", [1, 5, 16, 17, 34])
def test_masks_travel_with_their_tokens(length):
    tokens, mask = randn(2, length, 16), (randn(2, length, seed=2) > 0).double()
    found = unpack_masked(pack_masked(tokens, mask))
    assert torch.equal(found[0], tokens) and torch.equal(found[1], mask)
    with pytest.raises(ValueError, match="a mask"):
        pack_masked(tokens, mask[:1])


def test_variants_with_further_conditions_are_refused_by_name():
    with pytest.raises(ValueError, match="addition_embed_type of a UNet of diffusers must be one of"):
        get_obj_from_str("diffusers.UNet2DConditionModel")(
            **THEIR_CROSS_UNET, addition_embed_type="text", encoder_hid_dim=64
        )
