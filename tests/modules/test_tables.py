"""What samplers and networks written for latent-diffusion import, against its recorded numbers and torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules import util
from ldm.util import count_params, default, exists, isimage, ismap, log_txt_as_img, mean_flat
from tests.conftest import golden_json, golden_tensors

STEPS = (10, 20, 30, 50, 100, 200, 250, 500)
# What public code that was written for latent-diffusion imports from here by name.
NAMES = {
    "ldm.modules.diffusionmodules.util": (
        "SiLU avg_pool_nd betas_for_alpha_bar checkpoint conv_nd extract_into_tensor linear make_beta_schedule "
        "make_ddim_sampling_parameters make_ddim_timesteps mean_flat noise_like normalization scale_module "
        "timestep_embedding zero_module"
    ),
    "ldm.util": "count_params default exists get_obj_from_str instantiate_from_config isimage ismap log_txt_as_img",
    "ldm.modules.diffusionmodules.openaimodel": (
        "AttentionBlock Downsample EncoderUNetModel ResBlock TimestepEmbedSequential UNetModel Upsample"
    ),
    "ldm.modules.attention": "BasicTransformerBlock CrossAttention FeedForward SpatialTransformer default exists",
    "ldm.modules.distributions.distributions": "DiagonalGaussianDistribution normal_kl",
    "ldm.modules.ema": "LitEma",
    "ldm.models.autoencoder": "AutoencoderKL IdentityFirstStage VQModel VQModelInterface",
    "ldm.models.diffusion.ddpm": "DDPM DiffusionWrapper LatentDiffusion",
    "ldm.models.diffusion.ddim": "DDIMSampler",
    "ldm.models.diffusion.plms": "PLMSSampler",
    "ldm.models.diffusion.dpm_solver": "DPMSolverSampler",
    "main": "instantiate_from_config",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_that_others_import(module):
    found = __import__(module, fromlist=["any"])
    assert [name for name in NAMES[module].split() if not callable(getattr(found, name, None))] == []


def test_tables_are_the_published():
    golden = golden_tensors("schedules")
    for name, settings in golden_json("schedules")["beta_kwargs"].items():
        betas = util.make_beta_schedule(**settings)
        assert betas.dtype == np.float64
        np.testing.assert_allclose(betas, golden[f"betas/{name}"].numpy(), rtol=1e-12, atol=1e-15)
    cosine = util.betas_for_alpha_bar(1000, lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2)
    np.testing.assert_allclose(cosine, golden["betas/cosine"].numpy(), rtol=1e-9)


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_parameters_of_ddim_are_the_published(kind):
    golden = golden_tensors("schedules")
    table = np.cumprod(1 - util.make_beta_schedule("linear", 1000, 0.0015, 0.0195)).astype(np.float32)
    table = torch.from_numpy(table) if kind == "tensor" else table
    for steps in STEPS:
        times = util.make_ddim_timesteps("uniform", steps, 1000, verbose=False)
        recorded = {name: golden[f"ddim_uniform/{steps}/{name}"].numpy() for name in ("timesteps", "alphas_prev")}
        np.testing.assert_array_equal(times, recorded["timesteps"])
        for eta in (0, 1):
            sigmas, alphas, previous = util.make_ddim_sampling_parameters(table, times, eta, verbose=False)
            assert isinstance(alphas, torch.Tensor) == isinstance(sigmas, torch.Tensor) == (kind == "tensor")
            expected = golden[f"ddim_uniform/{steps}/eta{eta}/sigmas"].numpy()
            np.testing.assert_allclose(np.asarray(sigmas), expected, rtol=2e-5, atol=1e-9)
            np.testing.assert_allclose(previous, recorded["alphas_prev"], rtol=1e-6)
    quadratic = [steps for steps in STEPS if f"ddim_quad/{steps}/timesteps" in golden]
    for steps in quadratic:
        recorded_times = golden[f"ddim_quad/{steps}/timesteps"].numpy()
        np.testing.assert_array_equal(util.make_ddim_timesteps("quad", steps, 1000), recorded_times)
    with pytest.raises(ValueError, match="uniform or quad"):
        util.make_ddim_timesteps("karras", 10, 1000)
    with pytest.raises(ValueError, match=r"1\.\.1000, got 0"):
        util.make_ddim_timesteps("uniform", 0, 1000)


def test_small_helpers():
    t = torch.tensor([2, 0])
    assert util.extract_into_tensor(torch.tensor([5.0, 6.0, 7.0]), t, (2, 3, 8, 8)).tolist() == [[[[7.0]]], [[[5.0]]]]
    source = torch.Generator().manual_seed(3)
    alone, shared = (util.noise_like((4, 2, 8, 8), "cpu", repeat, source) for repeat in (False, True))
    assert alone.std() == pytest.approx(1, abs=0.1) and not torch.equal(alone[0], alone[1])
    assert torch.equal(shared[0], shared[3]) and shared.shape == (4, 2, 8, 8)
    assert util.timestep_embedding(t, 3, repeat_only=True).tolist() == [[2, 2, 2], [0, 0, 0]]
    layer = util.scale_module(util.linear(2, 1, bias=False), 0.0)
    assert layer.weight.tolist() == [[0.0, 0.0]] and count_params(layer) == 2
    assert mean_flat(torch.arange(6.0).reshape(2, 3)).tolist() == [1.0, 4.0]
    assert (exists(0), exists(None), default(0, 1), default(None, lambda: 2)) == (True, False, 0, 2)
    picture, latent = torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 8, 8)
    assert (isimage(picture), ismap(picture), isimage(latent), ismap(latent)) == (True, False, False, True)
    captions = log_txt_as_img((64, 32), ["a handwritten three", ""])
    assert captions.shape == (2, 3, 32, 64) and captions[0].min() < 0 and bool((captions[1] == 1).all())


def test_checkpoint_takes_the_published_call():
    """`checkpoint(function, inputs, parameters, flag)`: the gradients are those without it."""
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    layer(x).tanh().sum().backward()
    expected = layer.weight.grad.clone()
    for flag in (True, False):
        layer.zero_grad()
        util.checkpoint(lambda x: layer(x).tanh(), (x,), layer.parameters(), flag).sum().backward()
        torch.testing.assert_close(layer.weight.grad, expected)
