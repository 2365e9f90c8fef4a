"""Blocks that are compiled once: which they are, how often code is made, and where it is kept."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from ldm.modules.compiled import KEPT_AT, compile_blocks, compile_rows, keep_compiled_code, name_blocks
from ldm.modules.dit import DiT
from ldm.modules.uvit import UViT
from ldm.pipelines import load_ensemble
from ldm.pipelines.information import measure_classes
from ldm.pipelines.speed import speed_up, supported
from ldm.settings import Sampling, Speed
from tests.conftest import tiny_model
from tests.ensembles import write_ensemble


@pytest.fixture
def graphs(monkeypatch, tmp_path):
    """How many graphs were made so far; torch's own backend `eager` runs them, which takes no C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setenv(KEPT_AT, str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_blocks_are_what_networks_name():
    blocks = name_blocks(tiny_model().model.diffusion_model)
    kinds = {type(block).__name__ for block in blocks.values()}
    assert kinds == {"ResBlock", "SpatialTransformer"} and "middle_block.1" in blocks
    assert list(name_blocks(DiT(4, 2, 1, 16, 2, 2, num_classes=3))) == ["blocks.0", "blocks.1"]
    assert name_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == {}


def make_rows(rows, width=3):
    return torch.linspace(-1, 1, rows * width).reshape(rows, width)


def test_all_numbers_of_rows_are_one_graph(graphs):
    def product(x, emb, context):
        return torch.tanh(x * emb) + context.sum(1)

    compiled = compile_rows(product)
    for rows, of_emb, of_x in [(6, 6, 6), (4, 1, 4), (1, 1, 1), (9, 3, 9), (12, 6, 6)]:
        x, emb, context = make_rows(of_x), make_rows(of_emb), make_rows(rows, 6).reshape(rows, 2, 3)
        wide, of_rows = x.repeat(rows // of_x, 1), emb.repeat(rows // of_emb, 1)
        torch.testing.assert_close(compiled(x, emb, context), product(wide, of_rows, context))
    assert graphs() == 1


def test_a_block_of_each_kind_is_compiled_and_the_network_is_left(graphs):
    torch.manual_seed(0)
    net = DiT(4, 2, 1, 16, 3, 2, num_classes=3).eval().requires_grad_(False)
    nn.init.normal_(net.blocks[1].adaLN_modulation[1].weight)
    fast = compile_blocks(net)
    x, emb = torch.ones(2, 1, 4, 4), net.condition(torch.tensor([3.0, 9.0]), torch.tensor([0, 2]))
    torch.testing.assert_close(fast.features(x, emb), net.features(x, emb))
    assert graphs() == 1, "three blocks of one kind"
    assert list(fast.state_dict()) == list(net.state_dict())
    assert fast.blocks[0].mlp.fc1.weight is net.blocks[0].mlp.fc1.weight
    assert "forward" not in vars(net.blocks[0])


@pytest.mark.slow
def test_classes_of_a_report_make_no_code_anew(graphs, tmp_path):
    """A loop over ten classes, three at once and one left over, and then with other noises and members."""
    pipeline = load_ensemble(str(write_ensemble(tmp_path)), Sampling(steps=3), device="cpu")
    fast = pipeline.with_(speed=Speed(compile=True))
    plan = pipeline.make_plan(2)
    labels = range(10)
    measured = measure_classes(fast, labels, plan, 3)
    found = [next(measured)]
    made = graphs()
    assert made > 3
    found += list(measured)
    expected = measure_classes(pipeline, labels, plan, 3)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.mi, plain.mi, rtol=1e-3, atol=1e-6)
    list(measure_classes(fast, [0], pipeline.make_plan(1), 1))
    list(measure_classes(fast, [3, 5], pipeline.make_plan(7), 2))
    assert graphs() == made


@pytest.mark.slow
@pytest.mark.skipif(supported("bf16", torch.device("cpu")) is None, reason="this CPU computes no bfloat16")
def test_rows_that_are_rounded_together_make_no_code(graphs):
    """Passes of several rows an image, of any number of images, are those of the network that is not compiled."""
    unet = tiny_model().model.diffusion_model
    fast, plain = (speed_up(unet, Speed(precision="bf16", compile=one), torch.device("cpu")) for one in (True, False))
    emb = unet.condition(torch.tensor([500.0]))
    with torch.no_grad():
        fast.features(make_rows(2, 64).reshape(2, 1, 8, 8), emb, make_rows(4, 8).reshape(4, 1, 8))
        made = graphs()
        for images, ways in [(2, 4), (3, 4), (1, 6)]:
            given = make_rows(images, 64).reshape(images, 1, 8, 8), emb, make_rows(images * ways, 8).reshape(-1, 1, 8)
            assert torch.equal(fast.features(*given), plain.features(*given))
    assert made > 0 and graphs() == made


def test_code_is_kept_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.delenv(KEPT_AT, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_compiled_code() == str(tmp_path / "decu" / "compiled")
    monkeypatch.setenv(KEPT_AT, "elsewhere")
    assert keep_compiled_code() == "elsewhere"


def test_transformers_with_skips_have_blocks():
    net = UViT(4, 2, 1, embed_dim=16, depth=2, num_heads=2)
    assert all(len(list(block.parameters())) > 4 for block in name_blocks(net).values()) and len(name_blocks(net)) >= 3
