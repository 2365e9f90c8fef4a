"""Precision, layout and compiled code: the same features to what each promises, and plain code where one is missing."""

import logging
import shutil

import pytest
import torch
from torch import nn
from torch._inductor import config
from torch.func import vmap

from ldm.modules.paired import pair_layers
from ldm.pipelines import speed
from ldm.pipelines.speed import FastFeatures, speed_up, supported
from ldm.settings import Speed
from tests.conftest import tiny_model

CPU = torch.device("cpu")


def passes(**given):
    """(features as they are, features under the options) of one network."""
    unet = tiny_model().model.diffusion_model
    draws = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 1, 8, 8, generator=draws), torch.randn(4, 1, 8, generator=draws)
    emb = unet.condition(torch.tensor([10.0, 700.0]))
    with torch.no_grad():
        plain = unet.features(x, emb, context)
        keys = list(unet.state_dict())
        unet = speed_up(unet, Speed(**given), CPU)
        assert list(unet.state_dict()) == keys
        return plain, unet.features(x, emb, context), unet


def test_channels_last_is_the_same_to_rounding():
    plain, found, _ = passes(channels_last=True)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(supported("bf16", CPU) is None, reason="this CPU computes no bfloat16")
def test_bf16_keeps_two_digits_and_gives_float32():
    plain, found, _ = passes(precision="bf16")
    assert found.dtype == torch.float32
    error = (found - plain).abs().max() / plain.abs().max()
    assert 1e-5 < error < 0.05, "eight bits of mantissa: not float32 (above), and not broken (below)"


def test_a_precision_that_is_not_there_is_float32(caplog):
    with caplog.at_level(logging.WARNING):
        plain, found, _ = passes(precision="fp16")
    assert "it runs in float32" in caplog.text and torch.equal(found, plain)


def wave(x, emb, context):
    """Stands for the features of a network, which take a minute to compile."""
    return torch.sin(x) * emb + context


ARGUMENTS = torch.linspace(0, 1, 8), torch.linspace(2, 3, 8), torch.ones(1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_code_is_the_same_to_rounding():
    fast = FastFeatures(wave, CPU, "float32", True)
    with torch.no_grad():
        torch.testing.assert_close(fast(*ARGUMENTS), wave(*ARGUMENTS))
    assert fast.compiled


@config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
def test_without_a_compiler_the_code_runs_as_it_is(caplog):
    torch._dynamo.reset()
    fast = FastFeatures(wave, CPU, "float32", True)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        assert torch.equal(fast(*ARGUMENTS), wave(*ARGUMENTS))
    assert "runs as it is" in caplog.text and not fast.compiled


def test_transforms_run_the_plain_code(caplog):
    """vmap over a compiled trunk is vmap over the plain one."""
    unet = tiny_model().model.diffusion_model
    x = torch.randn(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    emb, context = torch.zeros(1, 128), torch.ones(2, 1, 8)
    with torch.no_grad():
        expected = torch.stack([unet.features(one, emb, context) for one in x])
        unet = speed_up(unet, Speed(compile=True), CPU)
        with caplog.at_level(logging.WARNING):
            found = vmap(unet.features, (0, None, None))(x, emb, context)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not caplog.text


def apart(unet, features):
    """Squared distances [5, 5] of the outputs of the rows of one image but the first."""
    outputs = unet.readout(features).double().flatten(1)[1:]
    return (outputs[:, None] - outputs[None]).square().sum(-1)


def rows_of_one_image(spread):
    """A UNet, one state, its embedding, and contexts: one far away, and five that differ by a share of theirs."""
    unet = tiny_model().model.diffusion_model
    draws = torch.Generator().manual_seed(2)
    x, context = torch.randn(1, 1, 8, 8, generator=draws), torch.randn(1, 1, 8, generator=draws)
    near = context + spread * torch.randn(5, 1, 8, generator=draws)
    return unet, x, unet.condition(torch.tensor([500.0])), torch.cat([-context, near])


@pytest.mark.skipif(supported("bf16", CPU) is None, reason="this CPU computes no bfloat16")
@pytest.mark.parametrize("spread", [0.3, 0.01, 0.001])
def test_bf16_keeps_how_far_rows_of_one_image_are_apart(spread, monkeypatch):
    """Rounded together they are off by the type's own error, 2^-8; each by itself by that of the numbers."""
    unet, *given = rows_of_one_image(spread)
    others = ~torch.eye(5, dtype=torch.bool)
    errors = {}
    with torch.no_grad():
        exact = apart(unet, unet.features(*given))[others]
        for ways in (3, 1000):
            monkeypatch.setattr(speed, "PAIRED_WAYS", ways)
            fast = speed_up(unet, Speed(precision="bf16"), CPU)
            errors[ways] = float((apart(unet, fast.features(*given))[others] / exact - 1).abs().max())
    assert errors[3] < 0.05
    assert spread > 0.1 or errors[1000] > 1, "the control: more noise than distance"


def test_rows_of_one_image_are_paired_exactly_in_float32():
    """Without half precision the sums of products of differences are products, in every kind of layer and stride."""
    draws = torch.Generator().manual_seed(3)
    layers = [nn.Linear(3, 4), nn.Conv1d(3, 4, 1), nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.Conv2d(3, 4, 3, padding=1)]
    for layer in layers:
        size = {nn.Linear: (5, 3), nn.Conv1d: (3, 5)}.get(type(layer), (3, 6, 6))
        x = torch.randn(8, *size, generator=draws)
        paired, rows = pair_layers(nn.Sequential(layer))
        for rows.total, rows.ways in [(8, 4), (8, 1), (16, 4)]:
            torch.testing.assert_close(paired(x), layer(x))
        assert paired[0].weight is layer.weight
