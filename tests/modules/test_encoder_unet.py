"""The noisy classifier's encoder: published key names, its pools against their formulas, errors."""

import pytest
import torch

from ldm.modules.diffusionmodules.encoder_unet import AttentionPool2d
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, UNetModel

TINY = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}


def drawn(net, seed=0):
    """Every parameter drawn anew, zero-initialised layers included."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(
                torch.randn(value.shape, generator=source) * (0.1 if value.ndim < 2 else value[0].numel() ** -0.5)
            )
    return net.eval().double()


def batch(seed=1):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 16, 16, generator=source, dtype=torch.float64), torch.tensor([3.0, 700.0])


def test_attention_pool_is_softmax_attention_of_the_mean():
    pool = drawn(AttentionPool2d(4, 64, 32, 7))
    x = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens = x.reshape(2, 64, 16)
    tokens = torch.cat([tokens.mean(-1, keepdim=True), tokens], -1) + pool.positional_embedding
    weight, bias = pool.qkv_proj.weight[:, :, 0], pool.qkv_proj.bias
    q, k, v = (torch.einsum("oc,bcn->bno", weight, tokens) + bias).chunk(3, -1)  # queries, keys, values: [B, N, C]
    heads = []
    for part in (slice(0, 32), slice(32, 64)):
        scores = torch.softmax(q[:, 0, None, part] @ k[:, :, part].mT / 32**0.5, -1)  # [B, 1, N]
        heads.append((scores @ v[:, :, part])[:, 0])
    expected = torch.cat(heads, -1) @ pool.c_proj.weight[:, :, 0].T + pool.c_proj.bias
    torch.testing.assert_close(pool(x), expected)
    with pytest.raises(ValueError, match="image_size of its config"):
        pool(x[..., :2])


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_torso_is_the_unets_and_pools_read_it(pool):
    """The way down equals that of a UNet with the same weights; each pool is computed again from its states."""
    net = drawn(EncoderUNetModel(**TINY, out_channels=5, pool=pool))
    unet = UNetModel(**TINY, out_channels=3).eval().double()
    own = {name: value for name, value in net.state_dict().items() if not name.startswith("out.")}
    assert own.keys() == {n for n in unet.state_dict() if n.startswith(("time_embed", "input_blocks", "middle_block"))}
    unet.load_state_dict({**unet.state_dict(), **own})
    x, t = batch()
    emb, h, states = unet.condition(t), x, []
    for block in (*unet.input_blocks, unet.middle_block):
        h = block(h, emb)
        states.append(h.mean((2, 3)))
    if pool.startswith("spatial"):
        expected = net.out(torch.cat(states, 1))
    else:
        normalised = torch.nn.functional.silu(net.out[0](h))
        if pool == "attention":
            expected = net.out[2](normalised)
        else:
            expected = normalised.mean((2, 3)) @ net.out[3].weight[:, :, 0, 0].T + net.out[3].bias
    torch.testing.assert_close(net(x, t), expected)
    assert expected.shape == (2, 5) and (expected[0] - expected[1]).abs().max() > 1e-3


def test_published_key_names_of_the_pool():
    names = EncoderUNetModel(**TINY, out_channels=5, pool="attention").state_dict().keys()
    assert {"out.0.weight", "out.2.positional_embedding", "out.2.qkv_proj.weight", "out.2.c_proj.bias"} <= names
    assert "out.3.weight" in EncoderUNetModel(**TINY, out_channels=5).state_dict()


def test_half_precision_stays_close():
    """float16 in the torso, float32 logits."""
    net = drawn(EncoderUNetModel(**TINY, out_channels=5, pool="attention")).float()
    x, t = batch()
    expected = net(x.float(), t).detach()
    net.convert_to_fp16()
    found = net(x.float(), t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


def test_wrong_pools_and_images():
    with pytest.raises(ValueError, match="pool must be one of"):
        EncoderUNetModel(**TINY, out_channels=5, pool="max")
    with pytest.raises(ValueError, match="needs num_head_channels"):
        EncoderUNetModel(**{**TINY, "num_head_channels": -1}, out_channels=5, pool="attention")
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\]"):
        EncoderUNetModel(**TINY, out_channels=5)(torch.zeros(1, 1, 16, 16), torch.zeros(1))
