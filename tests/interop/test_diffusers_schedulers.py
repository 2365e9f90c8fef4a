"""Schedulers of diffusers here: their tables, times, clipping and last steps, and what is not taken over."""

from __future__ import annotations

import pytest
import torch

from ldm import Sampling, load_model
from ldm.commands.export import Export
from ldm.diffusion.denoiser import make_target
from ldm.diffusion.schedule import VPSchedule
from ldm.interop.schedulers import read_scheduler
from tests.interop.models import THEIR_UNET, filled, randn, relative, saved, their_samples

diffusers = pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")


@pytest.mark.parametrize(("spacing", "sampler"), [("leading", "DDIM"), ("trailing", "DDPM"), ("leading", "DDPM")])
def test_where_nothing_is_said_a_scheduler_decides(spacing, sampler, tmp_path):
    """The times and the variance are the folder's, whatever else is said of sampling, and stay in its config."""
    unet = filled(diffusers.UNet2DModel(**THEIR_UNET))
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large", timestep_spacing=spacing)
    folder = saved(tmp_path / "folder", unet=unet, scheduler=scheduler)
    found = load_model(folder, Sampling(steps=5, sampler=sampler))
    scheduler.set_timesteps(5)
    assert (found.times[:-1] - 1).tolist() == scheduler.timesteps.tolist()
    given = {"steps": 5, "sampler": sampler, "spacing": spacing}
    said = Sampling(**given, variance="fixed_large" if sampler == "DDPM" else None)
    assert torch.equal(found.sample_latents(None, [3]), found.with_(sampling=said).sample_latents(None, [3]))
    base = Export(str(folder), str(tmp_path / "base.ckpt")).run()
    again = load_model(base=base.with_suffix(".yaml"), ckpt=base, sampling=Sampling(steps=5, sampler=sampler))
    assert torch.equal(found.sample_latents(None, [3]), again.sample_latents(None, [3]))
    assert again.describe_sampling()["spacing"] == spacing


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_table_that_ends_in_pure_noise_is_sampled_as_theirs(prediction, tmp_path):
    unet = filled(diffusers.UNet2DModel(**THEIR_UNET))
    given = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, **given)
    pipeline = load_model(diffusers=saved(tmp_path, unet=unet, scheduler=scheduler)).with_(steps=4)
    assert float(pipeline.model.alphas_cumprod[-1]) == 0
    noise = randn(2, 3, 8, 8).float()
    expected = their_samples(scheduler, lambda x, t: unet(x, t).sample, noise, 4)
    assert relative(pipeline.sample_latents(None, range(2), noise), expected) < 1e-5
    for sampler, spacing in (("LMS", "trailing"), ("Heun", "trailing"), ("DDIM", "karras")):
        found = pipeline.with_(sampler=sampler, spacing=spacing).sample_latents(None, range(2), noise)
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0)])
def test_steps_lie_and_end_where_theirs_do(spacing, offset, clean, tmp_path):
    unet = filled(diffusers.UNet2DModel(**THEIR_UNET))
    scheduler = diffusers.DDIMScheduler(
        timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=clean, clip_sample=False
    )
    pipeline = load_model(diffusers=saved(tmp_path, unet=unet, scheduler=scheduler), sampling=Sampling(steps=4))
    noise = randn(2, 3, 8, 8).float()
    expected = their_samples(scheduler, lambda x, t: unet(x, t).sample, noise, 4)
    assert relative(pipeline.sample_latents(None, range(2), noise), expected) < 1e-5


def test_a_last_step_that_stands_and_clips_is_named(tmp_path, caplog):
    """Their states before it are ours; their last step takes the time of the first entry to itself, and clips there."""
    unet = filled(diffusers.UNet2DModel(**THEIR_UNET))
    scheduler = diffusers.DDIMScheduler(set_alpha_to_one=False)
    pipeline = load_model(diffusers=saved(tmp_path, unet=unet, scheduler=scheduler), sampling=Sampling(steps=4))
    assert "stays at the first entry of the table" in caplog.text
    model, noise, states = pipeline.model.double(), randn(2, 3, 8, 8), []  # a random network under clipping is chaotic
    unet.double()
    scheduler.alphas_cumprod = torch.cumprod(1 - model.schedule.betas, 0)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]

    def predict(x, t):
        states.append(x)
        return unet(x, t).sample

    expected = their_samples(scheduler, predict, noise, 4)
    found = pipeline.sample_latents(None, range(2), noise)
    assert relative(found, states[-1]) < 1e-7
    assert relative(found, expected) > 1e-4


TAKEN = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}
LEFT_OUT = [
    ("DDIMScheduler", {"timestep_spacing": "linspace"}, "timestep_spacing linspace"),
    ("DDIMScheduler", {"steps_offset": 2}, "steps_offset 2, last step to clean data: False"),
    ("EulerDiscreteScheduler", {}, "timestep_spacing linspace"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, "karras levels of Euler"),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 0}, "of DPMSolverMultistep"),
    ("DDPMScheduler", {"thresholding": True, "steps_offset": 0}, "not taken over: thresholding True"),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True, "timestep_spacing": "trailing"}, "use_beta_sigmas True"),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type 'sigma_min'"),
    ("PNDMScheduler", {"prediction_type": "v_prediction"}, "PNDMScheduler averages v"),
    ("LCMScheduler", {}, "LCMScheduler has steps of its own"),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting True"),
]


@pytest.mark.parametrize(("name", "changes", "words"), LEFT_OUT)
def test_what_is_not_taken_over_is_named(name, changes, words, caplog):
    read_scheduler({"_class_name": name, "beta_schedule": "linear", **TAKEN, **changes})
    assert words in caplog.text


@pytest.mark.parametrize(
    ("name", "changes", "spacing"),
    [
        ("DDIMScheduler", {}, "leading_offset"),
        ("PNDMScheduler", {"skip_prk_steps": True}, "leading_offset"),
        ("DDIMScheduler", {"steps_offset": 0}, "leading_first"),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, "trailing_first"),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": True}, "trailing"),
        ("PNDMScheduler", {"timestep_spacing": "trailing"}, "trailing_first"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, "leading_offset_clean"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 0}, "leading"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, "karras"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "linspace"}, "karras"),
        ("HeunDiscreteScheduler", {"use_exponential_sigmas": True}, "exponential"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "auto"),
    ],
)
def test_what_is_taken_over_needs_no_words(name, changes, spacing, caplog):
    assert read_scheduler({"_class_name": name, "beta_schedule": "linear", **TAKEN, **changes}).spacing == spacing
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type .* must be discrete here"),
        ("CogVideoXDDIMScheduler", {"snr_shift_scale": 3.0}, "snr_shift_scale"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas"),
        ("DDPMScheduler", {"variance_type": "learned"}, "must be learned_range"),
        ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 2.0}, "clip_sample_range must be 1"),
        ("IPNDMScheduler", {"beta_schedule": None, "trained_betas": None}, "neither of a table of betas nor of a flow"),
    ],
)
def test_another_process_is_refused(name, changes, words):
    with pytest.raises(ValueError, match=words):
        read_scheduler({"_class_name": name, "beta_schedule": "linear", **TAKEN, **changes})


def test_noise_says_nothing_of_pure_noise(tmp_path):
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="goes with prediction_type v_prediction or sample"):
        load_model(diffusers=saved(tmp_path, unet=diffusers.UNet2DModel(**THEIR_UNET), scheduler=scheduler))
    with pytest.raises(ValueError, match="takes the targets v and x0; got 'eps'"):
        make_target(VPSchedule(torch.tensor([0.1, 0.5, 1.0])), "eps")
