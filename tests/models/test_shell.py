"""CompVis' sampler classes against their published runs, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import dpm_solver_2m, run
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.util import derive_seed
from tests.conftest import tiny_config
from tests.models.ldm_small import assert_close, build, recorded

SHAPE = (3, 8, 8)
RUNS = {
    "ddim10_eta0_g3": (DDIMSampler, {"S": 10, "unconditional_guidance_scale": 3.0}),
    "ddim10_eta0_g1": (DDIMSampler, {"S": 10}),
    "ddim30_eta0_g5": (DDIMSampler, {"S": 30, "unconditional_guidance_scale": 5.0, "ddim_discretize": "published"}),
    "ddim10_eta0_g3_quantx0": (DDIMSampler, {"S": 10, "unconditional_guidance_scale": 3.0, "quantize_x0": True}),
    "plms10_g3": (PLMSSampler, {"S": 10, "unconditional_guidance_scale": 3.0}),
    "plms10_g1": (PLMSSampler, {"S": 10}),
}


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def io():
    return recorded()


@pytest.fixture
def arguments(model, io):
    """What every call shares: embedded classes and null classes, x_T."""
    return {
        "batch_size": 2,
        "shape": SHAPE,
        "conditioning": model.get_learned_conditioning({"class_label": io["sample/classes"]}).detach(),
        "unconditional_conditioning": model.get_learned_conditioning(
            {"class_label": io["sample/null_classes"]}
        ).detach(),
        "x_T": io["sample/x_T"],
        "verbose": False,
    }


@pytest.mark.parametrize("name", RUNS)
def test_published_runs(name, model, io, arguments):
    kind, options = RUNS[name]
    sampler = kind(model)
    samples, intermediates = sampler.sample(**arguments, **options, log_every_t=1)
    assert_close(samples, io[f"{name}/latent"], 2e-4)
    assert_close(torch.stack(intermediates["x_inter"][1:]), io[f"{name}/x_after_each_step"], 2e-4)
    assert_close(torch.stack(intermediates["pred_x0"][1:]), io[f"{name}/pred_x0_each_step"], 2e-4)
    assert torch.equal(intermediates["x_inter"][0], io["sample/x_T"])
    assert np.array_equal(sampler.ddim_timesteps, io[f"{name}/ddim_timesteps_ascending"].numpy())
    for ours in ("ddim_alphas", "ddim_alphas_prev", "ddim_sigmas"):
        # The published tables come from float32 alphas_cumprod.
        torch.testing.assert_close(getattr(sampler, ours), io[f"{name}/{ours}"], rtol=1e-6, atol=1e-9)


def test_schedule_with_noise(model, io):
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, ddim_eta=1.0)
    torch.testing.assert_close(sampler.ddim_sigmas, io["ddim10_eta1_g3/ddim_sigmas"], rtol=1e-5, atol=0)
    sampler.make_schedule(20, "quad")
    assert len(sampler.ddim_timesteps) == 20 and sampler.alphas_cumprod is model.alphas_cumprod
    assert sampler.ddpm_num_timesteps == 1000


def test_2m_is_the_sampler(model, io, arguments):
    samples, _ = DPMSolverSampler(model).sample(S=10, unconditional_guidance_scale=3.0, **arguments)
    denoiser = model.denoiser(io["sample/classes"], 3.0)
    expected = run(dpm_solver_2m(denoiser, model.schedule, io["sample/x_T"], model.sampling_times(10)))
    # Two orders of the same float32 operations: the last bits of numbers of this size, on some processors.
    torch.testing.assert_close(samples, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler, DPMSolverSampler])
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_that_the_published_grid_cannot_take(kind, steps, model, arguments):
    sampler = kind(model)
    samples, intermediates = sampler.sample(S=steps, **arguments)
    assert bool(samples.isfinite().all()) and len(sampler.ddim_timesteps) == steps
    assert len(intermediates["x_inter"]) == min(steps, 2) + 1


def test_any_number_of_steps_has_its_schedule(model):
    sampler = DDIMSampler(model)
    for steps in (1, 3, 27, 350, 501, 999, 1000):
        sampler.make_schedule(steps, ddim_eta=1.0)
        assert len(sampler.ddim_timesteps) == len(sampler.ddim_sigmas) == steps
        assert sampler.ddim_timesteps.max() <= 999 and bool(sampler.ddim_sigmas.isfinite().all())


def test_intermediates_and_callbacks_follow_compvis(model, arguments):
    """x_T, the first step, then every step whose count from the end is a multiple of log_every_t."""
    seen, images = [], []
    _, intermediates = DDIMSampler(model).sample(
        S=10, **arguments, log_every_t=4, callback=seen.append, img_callback=lambda x0, i: images.append((i, x0))
    )
    assert len(intermediates["x_inter"]) == len(intermediates["pred_x0"]) == 1 + 4  # steps 0, 1, 5, 9
    assert seen == [i for i, _ in images] == list(range(10))
    assert torch.equal(images[5][1], intermediates["pred_x0"][3])


def test_draws_are_named_by_seed_and_image(model, arguments):
    del arguments["x_T"]
    options = {"S": 2, "eta": 1.0, **arguments}
    one, other = DDIMSampler(model, seed=3), DDIMSampler(model, seed=3)
    first, second = one.sample(**options)[0], one.sample(**options)[0]
    assert not torch.equal(first, second)
    assert torch.equal(other.sample(**options)[0], first) and torch.equal(other.sample(**options)[0], second)
    assert torch.equal(one.sample(**options, seed=3)[0], first)
    single = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    alone = DDIMSampler(model, seed=3).sample(**{**single, "batch_size": 1})[0]
    torch.testing.assert_close(alone, first[:1])


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_inpainting_keeps_the_known_part(kind, model, io, arguments):
    """Known everywhere: the last step starts from x0 with little noise, so it ends near x0."""
    mask, x0 = torch.ones(2, 1, 8, 8), io["ddim10_eta0_g3/latent"]
    samples, _ = kind(model).sample(S=20, mask=mask, x0=x0, **arguments)
    noise = float(model.schedule.sigma(2.0))
    assert (samples - x0).std() < 3 * noise
    half = mask.clone()
    half[..., 4:] = 0
    samples, _ = kind(model).sample(S=20, mask=half, x0=x0, **arguments)
    assert (samples - x0)[..., :4].std() < 3 * noise and bool(samples.isfinite().all())
    free, _ = kind(model).sample(S=20, mask=0 * mask, x0=x0, **arguments)
    assert torch.equal(free, kind(model).sample(S=20, **arguments)[0])


@torch.no_grad()
def test_inpainting_is_the_published_loop(model, io, arguments):
    """Before every step the known part is x0 at that step's time; DDIM's formulas from the schedule's attributes."""
    sampler, x0 = DDIMSampler(model, seed=5), io["ddim10_eta0_g3/latent"]
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :3] = 1
    samples, _ = sampler.sample(S=10, mask=mask, x0=x0, **arguments)
    noise = ImageNoise(derive_seed("inpainting", 5), (0, 1))
    x = arguments["x_T"]
    for index in range(10):
        k = 9 - index
        abar, later = float(sampler.ddim_alphas[k]), float(sampler.ddim_alphas_prev[k])
        known = abar**0.5 * x0 + (1 - abar) ** 0.5 * noise(index, x0.shape)
        x = mask * known + (1 - mask) * x
        t = torch.full((2,), int(sampler.ddim_timesteps[k]))
        eps = model.apply_model(x, t, arguments["conditioning"])
        x = later**0.5 * (x - (1 - abar) ** 0.5 * eps) / abar**0.5 + (1 - later) ** 0.5 * eps
    assert_close(samples, x, 2e-5)


def test_a_network_that_learns_its_variance():
    """The half of its output that is regressed is what is sampled; a continuous schedule is refused in words."""
    params = tiny_config(learned_variance="hybrid")["params"]
    params["unet_config"]["params"]["out_channels"] = 2
    model, labels = LatentDiffusion(**params).eval(), torch.tensor([3, 8])
    with torch.no_grad():
        model.model.diffusion_model.out[-1].weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    samples, _ = DDIMSampler(model, seed=4).sample(
        5, 2, (1, 8, 8), model.get_learned_conditioning(labels), verbose=False
    )
    assert_close(samples, model.sample(labels, ImageNoise(4, (0, 1)), model.sampling_times(5)), 1e-5)
    flow = tiny_config(path_config={"target": "ldm.diffusion.schedule.FlowSchedule"}, parameterization="velocity")
    with pytest.raises(ValueError, match="continuous schedule"):
        DDIMSampler(LatentDiffusion(**flow["params"]))


def test_what_is_not_supported_is_refused(model, io, arguments):
    ddim, plms = DDIMSampler(model), PLMSSampler(model)
    for option in ({"score_corrector": object()}, {"noise_dropout": 0.1}, {"normals_sequence": torch.zeros(2)}):
        with pytest.raises(ValueError, match=f"DDIMSampler does not support {next(iter(option))}"):
            ddim.sample(S=2, **arguments, **option)
    with pytest.raises(ValueError, match="PLMSSampler does not support quantize_x0"):
        plms.sample(S=2, **arguments, quantize_x0=True)
    with pytest.raises(ValueError, match="PLMS has no eta"):
        plms.sample(S=2, **arguments, eta=0.5)
    with pytest.raises(ValueError, match="both mask and x0"):
        ddim.sample(S=2, **arguments, mask=torch.ones(1))
    with pytest.raises(ValueError, match="embedded context of 2 images"):
        ddim.sample(S=2, **{**arguments, "conditioning": {"c_crossattn": []}})
    with pytest.raises(ValueError, match="x_T must be"):
        ddim.sample(S=2, **{**arguments, "x_T": io["sample/x_T"][:1]})
    with pytest.raises(ValueError, match="null class"):
        ddim.sample(S=2, **{**arguments, "unconditional_conditioning": None}, unconditional_guidance_scale=2.0)
    with pytest.raises(TypeError):
        ddim.sample(S=2, **arguments, ddim_step=3)
    with pytest.raises(ValueError, match="schedule must be"):
        DDIMSampler(model, schedule="cosine")
