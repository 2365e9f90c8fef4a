"""latent-diffusion's own methods of sampling against its recorded numbers, and the samplers that they must equal."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.noise import CountedNoise, ImageNoise
from ldm.diffusion.samplers import ancestral, run
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.conftest import tiny_config, tiny_model
from tests.models.ldm_small import assert_close, build, recorded

NETWORK, SAMPLER = 3e-5, 2e-4
SHAPE = (3, 1, 8, 8)
NOISE = ImageNoise(0, (0, 1, 2))


@pytest.fixture(scope="module")
def golden():
    return build(), recorded()


@pytest.fixture
def model():
    return tiny_model(timesteps=12, guidance_scale=1.0)


def test_what_the_table_says_is_the_published(golden):
    model, io = golden
    z0, t, noise = (io[f"q/{name}"] for name in ("z0", "t", "noise"))
    x_t = model.q_sample(z0, t, noise)
    expected = ("mean", "variance", "log_variance")
    for name, value in zip(expected, model.q_mean_variance(z0, t), strict=True):
        assert_close(value, io[f"q/{name}"], NETWORK)
    expected = ("posterior_mean", "posterior_variance", "posterior_log_variance_clipped")
    for name, value in zip(expected, model.q_posterior(z0, x_t, t), strict=True):
        assert_close(value, io[f"q/{name}"], NETWORK)
    assert_close(model.predict_start_from_noise(x_t, t, noise), io["q/predict_start_from_noise"], NETWORK)
    alpha, sigma = model.levels(t, z0)
    v = alpha * noise - sigma * z0
    assert_close(model.predict_start_from_z_and_v(x_t, t, v), z0, NETWORK)
    assert_close(model.predict_eps_from_z_and_v(x_t, t, v), noise, NETWORK)
    assert model.parameterization == "eps", "samplers written for latent-diffusion ask for it"


def test_single_steps_are_the_published(golden):
    model, io = golden
    c = model.get_learned_conditioning({"class_label": io["sample/classes"]}).detach()
    x = io["sample/x_T"]
    for step, time in enumerate(io["ancestral/t"].tolist()):
        t = torch.full((2,), int(time))
        given = {"noise": io["ancestral/noise"][step], "return_x0": True}
        x, x0 = model.p_sample(x, c, t, clip_denoised=False, **given)
        assert_close(x, io["ancestral/x"][step], SAMPLER)
        assert_close(x0, io["ancestral/pred_x0"][step], SAMPLER)
    mean, variance, log_variance, x0 = model.p_mean_variance(x, c, t, True, quantize_denoised=True, return_x0=True)
    torch.testing.assert_close(log_variance.exp(), variance.clamp(min=1e-20))
    assert mean.shape == x.shape
    assert_close(model.first_stage_model.quantize(x0)[0], x0, 1e-6)


def test_all_times_are_the_ancestral_sampler(model):
    labels = torch.tensor([0, 1, 2])
    c = model.get_learned_conditioning(labels).detach()
    times = torch.arange(12, -1, -1, dtype=torch.float64)
    x = NOISE.initial(SHAPE)
    expected = run(ancestral(model.denoiser(labels), model.schedule, x, times, noise=NOISE))
    called, pictures = [], []
    found, states = model.p_sample_loop(
        c, SHAPE, return_intermediates=True, verbose=False, log_every_t=4, callback=called.append
    )
    assert_close(found, expected, 1e-5)
    assert len(states) == 1 + 4 and called == list(range(11, -1, -1))  # x_T, then after 11, 8, 4 and 0
    assert torch.equal(states[0], x) and torch.equal(states[-1], found)
    model.sampling_draws = CountedNoise()
    again, predictions = model.progressive_denoising(
        c, SHAPE[1:], verbose=False, batch_size=3, log_every_t=4, img_callback=lambda image, t: pictures.append(t)
    )
    assert torch.equal(again, found) and len(predictions) == 4 and pictures == called
    other = model.p_sample_loop(c, SHAPE, verbose=False)
    assert not torch.equal(other, found), "a second call draws other images"
    short = model.p_sample_loop(c, SHAPE, verbose=False, x_T=x, timesteps=5, return_intermediates=True)[1]
    assert len(short) == 3  # x_T, after 4 and after 0


def test_temperature_start_and_known_parts(model):
    c = model.get_learned_conditioning(torch.tensor([0, 1, 2, 3])).detach()  # one more than there are images
    options = {"verbose": False, "x_T": torch.ones(SHAPE), "start_T": 6}
    cold, _ = model.progressive_denoising(c, SHAPE, temperature=0.0, **options)
    assert torch.equal(cold, model.progressive_denoising(c, SHAPE, temperature=[0.0] * 12, **options)[0])
    x0, mask = torch.zeros(SHAPE), torch.ones(3, 1, 8, 8)
    mask[..., 4:] = 0
    found = model.p_sample_loop(c, SHAPE, mask=mask, x0=x0, verbose=False)
    level = float(model.schedule.sigma(1.0))
    assert float((found - x0)[..., :4].std()) < 4 * level < float((found - x0)[..., 4:].std())
    with pytest.raises(ValueError, match="both mask and x0"):
        model.p_sample_loop(c, SHAPE, mask=mask)
    for option in ({"noise_dropout": 0.1}, {"score_corrector": object()}):
        with pytest.raises(ValueError, match=f"does not support {next(iter(option))}"):
            model.progressive_denoising(c, SHAPE, **option)
    with pytest.raises(ValueError, match="return_codebook_ids"):
        model.p_sample(x0, c[:3], torch.zeros(3, dtype=torch.long), return_codebook_ids=True)


def test_draws_are_counted_over_all_that_draws(model):
    z, t = torch.zeros(SHAPE), torch.tensor([3, 4, 5])
    first, second = model.q_sample(z, t), model.q_sample(z, t)
    assert not torch.equal(first, second)
    model.sampling_draws = CountedNoise()
    assert torch.equal(model.q_sample(z, t), first) and model.sampling_draws.drawn == 3
    c = model.get_learned_conditioning(torch.tensor([0, 1, 2])).detach()
    x = torch.ones(SHAPE)
    same = model.p_sample(x, c[:1].expand(3, -1, -1), t, repeat_noise=True) - model.p_mean_variance(x, c, t, False)[0]
    assert torch.isfinite(same).all() and model.sampling_draws.drawn == 6


def test_logged_samples_by_either_way(model):
    c = model.get_learned_conditioning(torch.tensor([0, 1, 2])).detach()
    by_ddim, intermediates = model.sample_log(c, 3, True, 5, eta=0.5)
    expected, _ = DDIMSampler(model).sample(5, 3, SHAPE[1:], c, eta=0.5, verbose=False)
    assert torch.equal(by_ddim, expected) and "x_inter" in intermediates
    again, _ = model.sample_log(c, 3, True, 5, eta=0.5)
    assert not torch.equal(again, by_ddim)
    by_all, states = model.sample_log(c, 3, False, 0, verbose=False)
    assert by_all.shape == SHAPE and len(states) == 3


def test_a_learned_variance_is_that_of_the_ancestral_sampler():
    params = tiny_config(timesteps=20, learned_variance="hybrid")["params"]
    params["unet_config"]["params"]["out_channels"] = 2
    learned = LatentDiffusion(**params).eval()
    x, labels, t = torch.ones(SHAPE), torch.tensor([0, 1, 2]), torch.full((3,), 4)
    with torch.no_grad():
        learned.model.diffusion_model.out[-1].weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        mean, variance, log_variance = learned.p_mean_variance(x, learned.get_learned_conditioning(labels), t, False)
        times = torch.arange(5, -1, -1, dtype=torch.float64)
        steps = ancestral(learned.denoiser(labels), learned.schedule, x, times, variance="learned_range", noise=NOISE)
        expected = next(steps).distribution
    assert_close(mean, expected.mean, 1e-5)
    assert_close(variance, expected.var, 1e-5)
    torch.testing.assert_close(variance, log_variance.exp())


def test_stages_are_built_by_methods_that_may_be_replaced():
    built = []

    class Mine(LatentDiffusion):
        def instantiate_cond_stage(self, config):
            built.append(config["target"])
            super().instantiate_cond_stage(config)

    Mine(**tiny_config()["params"])
    assert built == ["ldm.modules.encoders.modules.ClassEmbedder"]
