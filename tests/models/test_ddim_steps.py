"""Conditions in latent-diffusion's forms, single DDIM steps, and a sampler that somebody wrote for latent-diffusion."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.denoiser import join_conditions
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.diffusionmodules.util import extract_into_tensor, make_ddim_sampling_parameters, make_ddim_timesteps
from tests.conftest import tiny_config, tiny_model
from tests.models.ldm_small import assert_close

SHAPE = (1, 8, 8)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def hybrid():
    """A model that takes a class by cross-attention and an image beside the state."""
    params = tiny_config(conditioning_key="hybrid")["params"]
    params["unet_config"]["params"]["in_channels"] = 2
    model = LatentDiffusion(**params).eval()
    with torch.no_grad():
        model.model.diffusion_model.out[-1].weight.copy_(draw(*model.model.diffusion_model.out[-1].weight.shape) / 10)
    return model


def embedded(model, *labels):
    return model.get_learned_conditioning(torch.tensor(labels)).detach()


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler])
def test_a_mapping_of_lists_is_the_context_itself(kind, model):
    c, null = embedded(model, 1, 2), embedded(model, 10, 10)
    options = {"S": 4, "batch_size": 2, "shape": SHAPE, "x_T": draw(2, *SHAPE), "verbose": False}
    options["unconditional_guidance_scale"] = 3.0
    expected, _ = kind(model).sample(conditioning=c, unconditional_conditioning=null, **options)
    for form in (lambda c: {"c_crossattn": [c]}, lambda c: [c]):
        found, _ = kind(model).sample(conditioning=form(c), unconditional_conditioning=form(null), **options)
        assert torch.equal(found, expected)


@torch.no_grad()
def test_guidance_of_an_image_and_a_class_together(hybrid):
    c, null, image = embedded(hybrid, 1, 2), embedded(hybrid, 10, 10), draw(2, *SHAPE, seed=1)
    cond = {"c_crossattn": [c], "c_concat": [image]}
    uncond = {"c_crossattn": [null], "c_concat": [torch.zeros_like(image)]}
    x, t = draw(2, *SHAPE), torch.full((2,), 901)
    sampler = DDIMSampler(hybrid)
    sampler.make_schedule(10)
    guidance = {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": uncond}
    found, x0 = sampler.p_sample_ddim(x, cond, t, 9, **guidance)
    one, other = hybrid.apply_model(x, t, uncond), hybrid.apply_model(x, t, cond)
    eps = one + 5 * (other - one)
    abar, later = float(sampler.ddim_alphas[9]), float(sampler.ddim_alphas_prev[9])
    expected = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
    assert_close(x0, expected, 1e-5)
    assert_close(found, later**0.5 * expected + (1 - later) ** 0.5 * eps, 1e-5)
    whole, _ = DDIMSampler(hybrid).sample(10, 2, SHAPE, cond, x_T=x, verbose=False, **guidance)
    without, _ = DDIMSampler(hybrid).sample(10, 2, SHAPE, cond, x_T=x, verbose=False)
    assert not torch.allclose(whole, without)
    assert hybrid.p_sample_loop(cond, (1, *SHAPE), verbose=False, timesteps=2).shape == (1, *SHAPE)


def test_conditions_of_two_forms_are_refused(model):
    c = embedded(model, 1, 2)
    assert join_conditions({"a": [c], "b": None}, {"a": [c], "b": None})["b"] is None
    for null in ({"c_concat": [c]}, [c, c], c, {"c_crossattn": c}):
        with pytest.raises(ValueError, match=r"one form to be guided, got .*(mapping|tensor)"):
            join_conditions(null, {"c_crossattn": [c]})
    for wrong in ({"c_crossattn": [c[:1]]}, {"c_crossattn": "three"}, [c, c[:1]], 3):
        with pytest.raises(ValueError, match="embedded context of 2 images"):
            DDIMSampler(model).sample(2, 2, SHAPE, wrong, verbose=False)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steps_one_by_one_are_the_whole(eta, model):
    c, x = embedded(model, 1, 2), draw(2, *SHAPE)
    sampler = DDIMSampler(model, seed=4)
    expected, _ = sampler.sample(6, 2, SHAPE, c, eta=eta, x_T=x, verbose=False)
    state = x
    for index in reversed(range(6)):
        t = torch.full((2,), int(sampler.ddim_timesteps[index]))
        state, _ = DDIMSampler.p_sample_ddim(fresh(model, 6, eta), state, c, t, index)
    assert_close(state, expected, 1e-6)
    again = fresh(model, 6, eta).p_sample_ddim(x, c, t, 5, repeat_noise=True, temperature=0.5)[0]
    assert again.shape == x.shape and bool(again.isfinite().all())


def fresh(model, steps, eta):
    """A sampler that draws what the first images of seed 4 draw."""
    sampler = DDIMSampler(model, seed=4)
    sampler.make_schedule(steps, ddim_eta=eta)
    return sampler


def test_images_are_encoded_and_decoded_from_where_they_are(model):
    """All of the steps are `sample`; the state after some of them, decoded by the others, ends where `sample` does."""
    c, x = embedded(model, 1, 2), draw(2, *SHAPE)
    sampler = DDIMSampler(model)
    expected, between = sampler.sample(6, 2, SHAPE, c, x_T=x, verbose=False, log_every_t=1)
    assert torch.equal(sampler.decode(x, c, 6), expected)
    assert_close(sampler.decode(between["x_inter"][2], c, 4), expected, 1e-6)
    noise, t = draw(2, *SHAPE, seed=2), torch.tensor([3, 5])
    found = sampler.stochastic_encode(x, t, noise=noise)
    for place, step in enumerate(t.tolist()):
        abar = float(sampler.ddim_alphas[step])
        torch.testing.assert_close(found[place], abar**0.5 * x[place] + (1 - abar) ** 0.5 * noise[place])
    original = sampler.stochastic_encode(x, t, use_original_steps=True, noise=noise)
    torch.testing.assert_close(original, model.q_sample(x, t, noise), rtol=1e-5, atol=1e-6)
    assert not torch.equal(sampler.stochastic_encode(x, t), sampler.stochastic_encode(x, t))
    few = sampler.decode(x, c, 2, use_original_steps=True)
    assert few.shape == x.shape
    with pytest.raises(ValueError, match="call make_schedule"):
        DDIMSampler(model).decode(x, c, 2)


@torch.no_grad()
def test_a_sampler_written_for_latent_diffusion(model):
    """It imports the helpers, reads the tables of the model and calls `apply_model`; ours gives the same states."""
    c, x = embedded(model, 1, 2), draw(2, *SHAPE)
    times = make_ddim_timesteps("uniform", 5, model.num_timesteps, verbose=False)
    sigmas, alphas, previous = make_ddim_sampling_parameters(model.alphas_cumprod.cpu(), times, eta=0.0)
    state = x
    for index in reversed(range(5)):
        t = torch.full((2,), int(times[index]))
        eps = model.apply_model(state, t, c)
        spread = extract_into_tensor(model.sqrt_one_minus_alphas_cumprod, t, state.shape)
        x0 = (state - spread * eps) / float(alphas[index]) ** 0.5
        direction = (1 - float(previous[index]) - float(sigmas[index]) ** 2) ** 0.5
        state = float(previous[index]) ** 0.5 * x0 + direction * eps
    expected, _ = DDIMSampler(model).sample(5, 2, SHAPE, c, x_T=x, verbose=False)
    assert_close(state, expected, 2e-5)
