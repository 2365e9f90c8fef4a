"""Time embeddings, attention, class embedder and averages against closed forms and published numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.modules.attention import BasicTransformerBlock, CrossAttention, attend
from ldm.modules.diffusionmodules.util import normalization, split_last_layer, timestep_embedding
from ldm.modules.ema import LitEma
from ldm.modules.encoders.modules import ClassEmbedder
from tests.conftest import golden_json, golden_tensors


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [32, 33, 192])
def test_timestep_embeddings_match_published_ones(dim):
    golden = golden_tensors("schedules")
    t = golden["timestep_embedding/t"]
    rounding = 999 * 2**-24  # of a frequency in float32, times the largest time: kernels of exp differ by that
    torch.testing.assert_close(timestep_embedding(t, dim), golden[f"timestep_embedding/{dim}"], rtol=0, atol=rounding)


def test_attention_formula_equals_the_fused_kernel():
    query, key, value = randn(2, 3, 5, 4), randn(2, 3, 7, 4, seed=1), randn(2, 3, 7, 4, seed=2)
    formula = torch.func.vmap(attend)(*(a[None] for a in (query, key, value)))[0]
    torch.testing.assert_close(formula, attend(query, key, value))


def test_one_token_closed_form_equals_the_general_path():
    attention = CrossAttention(24, 10, heads=3, dim_head=5).double()
    x, context = randn(2, 6, 24).double(), randn(2, 1, 10, seed=1).double()
    torch.testing.assert_close(attention.of_one_token(context, 6), attention(x, context), rtol=1e-12, atol=1e-14)


def test_block_with_one_token_is_the_same_frozen_and_trained():
    block = BasicTransformerBlock(12, 2, 6, context_dim=5).double()
    x, context = randn(2, 4, 12).double(), randn(2, 1, 5, seed=1).double()
    trained = block(x, context)
    trained.sum().backward()
    assert block.attn2.to_q.weight.grad.abs().max() < 1e-12  # one key: the query cannot matter
    assert block.attn2.to_v.weight.grad.abs().max() > 0
    block.requires_grad_(False)
    torch.testing.assert_close(block(x, context), trained.detach(), rtol=1e-12, atol=1e-14)


def test_norm_is_computed_in_single_precision():
    x = 1000 + randn(2, 32, 8, 8)
    half = normalization(32).half()(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), normalization(32)(x.half().float()), rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="multiple of 32"):
        normalization(33)


def test_split_of_a_sequential():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    phi, layer = split_last_layer(net, "2")
    assert torch.equal(layer(phi(randn(5, 3))), net(randn(5, 3)))
    with pytest.raises(ValueError, match="no `backbone`"):
        split_last_layer(nn.Linear(2, 2), "weight")


def test_class_embedder_gives_rows_and_drops_to_the_last():
    embedder = ClassEmbedder(4, n_classes=6, key="class_label", ucg_rate=0.25)
    table, labels = embedder.embedding.weight, torch.tensor([3, 0, 5])
    assert embedder.null_class == 5
    assert torch.equal(embedder({"class_label": labels})[:, 0], table[labels])
    assert torch.equal(embedder({"other": labels}, key="other"), embedder.embed(labels))
    dropped = embedder({"class_label": labels}, drop=torch.tensor([True, False, False]))
    assert torch.equal(dropped[:, 0], table[[5, 0, 5]])
    uniform = torch.tensor([0.1, 0.25, 0.9])
    assert embedder.drop_labels(labels, uniform).tolist() == [5, 0, 5]
    assert embedder.eval().drop_labels(labels, uniform).tolist() == [3, 0, 5]
    assert [name for name, _ in embedder.named_parameters()] == ["embedding.weight"]


def test_class_embedder_rejects_what_it_cannot_embed():
    embedder = ClassEmbedder(4, n_classes=6)
    with pytest.raises(ValueError, match=r"0\.\.5 \(null class 5\), got 2\.\.6"):
        embedder.embed(torch.tensor([2, 6]))
    with pytest.raises(ValueError, match="keys are"):
        embedder({"label": torch.tensor([1])})
    with pytest.raises(ValueError, match=r"shape \[B\]"):
        embedder.embed(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="probability"):
        ClassEmbedder(4, ucg_rate=1.5)
    with pytest.raises(ValueError, match="rank must be"):
        ClassEmbedder(4, lora=True, rank=0)


def test_low_rank_rows_are_the_table_plus_the_product():
    embedder = ClassEmbedder(4, n_classes=6, key="class_label", lora=True, rank=2)
    table, labels = embedder.embedding.weight, torch.tensor([3, 0, 5])
    shapes = {name: tuple(value.shape) for name, value in embedder.named_parameters()}
    assert shapes == {"embedding.weight": (6, 4), "lora_A": (2, 6), "lora_B": (4, 2)}
    assert [name for name, value in embedder.named_parameters() if value.requires_grad] == ["lora_A", "lora_B"]
    assert torch.equal(embedder.embed(labels)[:, 0], table[labels]), "B starts at zero"
    with torch.no_grad():
        embedder.lora_B.copy_(randn(4, 2))
    whole = table + (embedder.lora_B @ embedder.lora_A).T
    torch.testing.assert_close(embedder.embed(labels)[:, 0], whole[labels])
    sizes = ClassEmbedder(512, n_classes=1001, lora=True)
    assert sum(value.numel() for value in sizes.parameters() if value.requires_grad) == 24_208, "as published"


def test_an_embedder_without_a_null_class():
    embedder = ClassEmbedder(4, n_classes=6, null_class=False)
    labels = torch.tensor([5, 0])
    assert embedder.null_class is None
    assert torch.equal(embedder.embed(labels)[:, 0], embedder.embedding.weight[labels])
    assert torch.equal(embedder.drop_labels(labels, torch.zeros(2)), labels)
    with pytest.raises(ValueError, match=r"0\.\.5 \(no null class\), got 6\.\.6"):
        embedder.embed(torch.tensor([6]))
    with pytest.raises(ValueError, match="no null class"):
        embedder({"class": labels}, drop=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="set it to 0"):
        ClassEmbedder(4, n_classes=6, ucg_rate=0.1, null_class=False)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.out = nn.Linear(2, 1)


def test_ema_follows_the_published_numbers():
    golden = golden_tensors("ldm_small_io")
    assert golden_json("ldm_small")["ema"]["parameter"].endswith("bias")
    model = nn.Module()
    model.bias = nn.Parameter(golden["ema/initial"].clone())
    ema = LitEma(model)
    for value, expected in zip(golden["ema/param_each_update"], golden["ema/shadow_each_update"], strict=True):
        model.bias.data.copy_(value)
        ema(model)
        torch.testing.assert_close(ema.bias, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("counts", "ramp"), [(True, "counts"), (True, "power"), (False, "counts")])
def test_ema_of_all_tensors_at_once_is_the_rule_of_each(counts, ramp):
    source, model = torch.Generator().manual_seed(0), Pair()
    ema = LitEma(model, decay=0.3, use_num_updates=counts, ramp=ramp)
    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    for update in range(1, 6):
        grown = (1 + update) / (10 + update) if ramp == "counts" else 1 - (1 + update) ** (-2 / 3)
        decay = min(0.3, grown) if counts else 0.3
        for name, value in model.named_parameters():
            value.data.add_(torch.randn(value.shape, generator=source))
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
        ema(model)
    for name, value in expected.items():
        torch.testing.assert_close(ema.get_buffer(name.replace(".", "")), value, rtol=1e-5, atol=1e-6)
    assert int(ema.num_updates) == (5 if counts else -1)


def test_ema_keys_frozen_parameters_and_round_trip():
    model = Pair()
    model.body.requires_grad_(False)
    ema = LitEma(model, decay=0.5, use_num_updates=False)
    assert list(ema.state_dict()) == ["decay", "num_updates", "outweight", "outbias"]
    assert ema.decay.dtype == torch.float32 and ema.num_updates.dtype == torch.int32
    before = model.out.weight.detach().clone()
    model.out.weight.data += 1
    ema.update(model)
    torch.testing.assert_close(ema.outweight, before + 0.5)
    assert ema.num_updates == -1
    ema.store(model.parameters())
    ema.copy_to(model)
    torch.testing.assert_close(model.out.weight.detach(), before + 0.5)
    ema.restore(model.parameters())
    torch.testing.assert_close(model.out.weight.detach(), before + 1)
    with pytest.raises(ValueError, match="call store first"):
        ema.restore(model.parameters())
    with pytest.raises(ValueError, match="lacks 2 averaged"):
        ema.update(nn.Linear(1, 1))
