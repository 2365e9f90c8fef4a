"""Precision, layout and compiled code: the same features to what each promises, and plain code where one is missing."""

import logging
import shutil

import pytest
import torch
from torch._inductor import config
from torch.func import vmap

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
