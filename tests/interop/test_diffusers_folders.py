"""Models of diffusers here: their networks in stages, their folders through `load_model`, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch.func import functional_call, jvp, vmap

from ldm import Sampling, load_model
from ldm.diffusion.denoiser import make_target
from ldm.diffusion.schedule import VPSchedule
from ldm.interop.pooled import pack_pooled, unpack_pooled
from ldm.interop.schedulers import read_scheduler
from ldm.modules.parts import find_parts
from ldm.util import get_obj_from_str
from tests.interop.models import (
    THEIR_CROSS_UNET,
    THEIR_DIT,
    THEIR_FLUX,
    THEIR_SD3,
    THEIR_UNET,
    filled,
    flux_output,
    randn,
    relative,
)

diffusers = pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")

TIMES = torch.tensor([3.0, 981.0])
LABELS = torch.tensor([1, 9])
TOKENS, POOLED = randn(2, 5, 16, seed=2), randn(2, 24, seed=3)
NETWORKS = {
    "UNet2DModel": {**THEIR_UNET, "num_class_embeds": 11},
    "UNet2DConditionModel": THEIR_CROSS_UNET,
    "DiTTransformer2DModel": THEIR_DIT,
    "SD3Transformer2DModel": THEIR_SD3,
    "FluxTransformer2DModel": {**THEIR_FLUX, "guidance_embeds": True},
}


def their_output(network, kind, x):
    """What their own class gives, called as their pipelines call it."""
    if kind == "UNet2DModel":
        return network(x, TIMES, class_labels=LABELS).sample
    if kind == "UNet2DConditionModel":
        return network(x, TIMES, encoder_hidden_states=TOKENS).sample
    if kind == "DiTTransformer2DModel":
        return network(x, TIMES, class_labels=LABELS).sample
    if kind == "SD3Transformer2DModel":
        return network(x, TOKENS, POOLED, TIMES).sample
    return flux_output(network, x, TOKENS, POOLED, TIMES / 1000, guidance=torch.full((2,), 3.5))


def our_arguments(kind):
    if "Flux" in kind or "SD3" in kind:
        return (TIMES / 1000 if "Flux" in kind else TIMES, pack_pooled(TOKENS, POOLED))
    return (TIMES, TOKENS) if kind == "UNet2DConditionModel" else (TIMES, None, LABELS)


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_networks_in_stages_are_theirs_under_every_transform(kind):
    """The same numbers as a whole, by stages, by vmap over members and with a derivative; parts are where they say."""
    ours = filled(get_obj_from_str(f"diffusers.{kind}")(**NETWORKS[kind])).double()
    theirs = getattr(diffusers, kind)(**NETWORKS[kind]).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x, arguments = randn(2, ours.in_channels, 8, 8), our_arguments(kind)
    expected = their_output(theirs, kind, x)
    found, change = jvp(lambda state: ours(state, *arguments), (x,), (randn(*x.shape, seed=5),))
    assert relative(ours(x, *arguments), expected) < 1e-12
    assert relative(found, expected) < 1e-12
    assert change.abs().max() > 1e-3
    parts = find_parts(ours)
    names = dict(ours.named_parameters())
    assert all(ours.get_submodule(name) for name in (parts.last_layer, *parts.taps.values()))
    inner = next(name for name in names if name.endswith(("resnets.0.conv1.weight", "to_q.weight")))
    chosen = [f"{parts.last_layer}.weight", inner, *parts.class_tables]
    stacked = {name: torch.stack([names[name], 1.1 * names[name]]) for name in chosen}
    members = vmap(lambda own: functional_call(ours, own, (x, *arguments)))(stacked)
    assert relative(members[0], expected) < 1e-12
    assert relative(members[1], expected) > 1e-3


@torch.no_grad()
def test_transformers_take_states_that_are_wider_than_high():
    """SD3 is theirs; DiT, which is square there, has the places of the first rows of the square that holds it."""
    given = {**THEIR_SD3, "pos_embed_max_size": 9}
    wide = filled(get_obj_from_str("diffusers.SD3Transformer2DModel")(**{**given, "sample_size": [8, 16]})).double()
    theirs = diffusers.SD3Transformer2DModel(**{**given, "sample_size": 16}).double().eval()
    theirs.load_state_dict(wide.state_dict())
    x = randn(2, 4, 8, 16)
    assert relative(wide(x, TIMES, pack_pooled(TOKENS, POOLED)), theirs(x, TOKENS, POOLED, TIMES).sample) < 1e-12
    with pytest.raises(ValueError, match=r"\[B, 4, 1 S, 2 S\] with sides that are multiples of 2"):
        wide(x.movedim(3, 2), TIMES, pack_pooled(TOKENS, POOLED))
    dit = filled(get_obj_from_str("diffusers.DiTTransformer2DModel")(**{**THEIR_DIT, "sample_size": [8, 16]})).double()
    x = randn(2, 3, 8, 16)
    square = dit.pos_embed(torch.nn.functional.pad(x, (0, 0, 0, 8)))
    assert relative(dit._embed_patches(x), square[:, : 4 * 8]) < 1e-12
    assert dit(x, TIMES, y=LABELS).shape == (2, 3, 8, 16)
    assert dit.further_config["sample_size"] == (8, 16)


def test_pooled_vectors_travel_with_their_tokens():
    tokens, pooled = unpack_pooled(pack_pooled(TOKENS, POOLED), 24)
    assert torch.equal(tokens, TOKENS)
    assert torch.equal(pooled, POOLED)
    with pytest.raises(ValueError, match="ends with 2 rows"):
        unpack_pooled(TOKENS[:, :2], 24)


def saved(folder, **parts):
    """A folder of parts, as a pipeline of theirs writes them."""
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **index}))
    return folder


@torch.no_grad()
def their_samples(scheduler, predict, noise, steps):
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x).prev_sample
    return x


def test_pixel_pipeline_is_loaded_and_sampled_as_theirs(tmp_path):
    """DDPM's published layout: everything at the top of the folder, clipping, times without an offset."""
    unet = filled(diffusers.UNet2DModel(**{**THEIR_UNET, "freq_shift": 1, "flip_sin_to_cos": False}))
    scheduler = diffusers.DDIMScheduler()
    unet.save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path)
    pipeline = load_model(str(tmp_path), Sampling(steps="ddim20"))
    assert pipeline.model.clip_denoised
    noise = randn(2, 3, 8, 8).float()
    found = pipeline.with_(clip=False).sample_latents(None, range(2), noise)
    scheduler.register_to_config(clip_sample=False)
    assert relative(found, their_samples(scheduler, lambda x, t: unet(x, t).sample, noise, 20)) < 1e-5


@pytest.mark.parametrize(("prediction", "steps"), [("epsilon", 20), ("v_prediction", 4), ("sample", 4)])
def test_latent_pipeline_is_loaded_and_sampled_as_theirs(prediction, steps, tmp_path):
    unet = filled(diffusers.UNet2DModel(**THEIR_UNET))
    stage = filled(diffusers.VQModel(block_out_channels=(32, 32), num_vq_embeddings=16, scaling_factor=0.5,
                                     down_block_types=("DownEncoderBlock2D",) * 2,
                                     up_block_types=("UpDecoderBlock2D",) * 2))  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    pipeline = load_model(diffusers=saved(tmp_path, unet=unet, vqvae=stage, scheduler=scheduler))
    pipeline = pipeline.with_(steps=steps)
    assert pipeline.sampling.spacing == "published"
    noise = randn(2, 3, 8, 8).float()
    expected = their_samples(scheduler, lambda x, t: unet(x, t).sample, noise, steps)
    found = pipeline.sample_latents(None, range(2), noise)
    assert relative(found, expected) < 1e-5
    with torch.no_grad():
        images = stage.decode(expected / 0.5).sample.clamp(-1, 1)
    torch.testing.assert_close(pipeline.decode(found), images, rtol=0, atol=1e-3)


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


def test_times_that_are_not_taken_over_are_named(caplog):
    read_scheduler({"_class_name": "DDIMScheduler", "beta_schedule": "linear", "timestep_spacing": "linspace"})
    assert "timestep_spacing linspace is not taken over" in caplog.text


def test_noise_says_nothing_of_pure_noise(tmp_path):
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="goes with prediction_type v_prediction or sample"):
        load_model(diffusers=saved(tmp_path, unet=diffusers.UNet2DModel(**THEIR_UNET), scheduler=scheduler))
    with pytest.raises(ValueError, match="takes the targets v and x0; got 'eps'"):
        make_target(VPSchedule(torch.tensor([0.1, 0.5, 1.0])), "eps")


def test_dit_pipeline_is_loaded_and_sampled_as_theirs(tmp_path):
    """Learned variance, whose half DDIM leaves alone, and guidance of all channels."""
    network = filled(diffusers.DiTTransformer2DModel(**{**THEIR_DIT, "in_channels": 4, "out_channels": 8}))
    stage = filled(diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4))
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    folder = saved(tmp_path, transformer=network, vae=stage, scheduler=scheduler)
    pipeline = load_model(diffusers=folder, sampling=Sampling(steps=20, scale=4.0))
    assert (pipeline.n_classes, pipeline.null_class) == (10, 10)
    labels, noise = torch.tensor([1, 9]), randn(2, 4, 8, 8).float()

    def predict(x, t):
        with_class = network(x, t.expand(2), labels).sample
        without = network(x, t.expand(2), torch.tensor([10, 10])).sample
        return (without + 4 * (with_class - without))[:, :4]

    expected = their_samples(scheduler, predict, noise, 20)
    assert relative(pipeline.sample_latents(labels.tolist(), range(2), noise), expected) < 1e-4


def test_only_listed_classes_are_taken_and_nothing_is_executed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "os.system", "_diffusers_version": "0.30.0"}))
    with pytest.raises(ValueError, match=r"expected one of diffusers' classes AutoencoderKL, .* got 'os.system'"):
        load_model(diffusers=tmp_path)
    with pytest.raises(ValueError, match="of diffusers' classes a config may name"):
        get_obj_from_str("diffusers.StableDiffusionPipeline")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_model(diffusers=tmp_path / "absent")


def test_variants_with_further_conditions_are_refused_by_name():
    with pytest.raises(ValueError, match="addition_embed_type of a UNet of diffusers must be one of"):
        get_obj_from_str("diffusers.UNet2DConditionModel")(
            **THEIR_CROSS_UNET, addition_embed_type="text", encoder_hid_dim=64
        )


def test_file_of_theirs_as_checkpoint_says_what_takes_it(tmp_path):
    diffusers.UNet2DModel(**THEIR_UNET).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a network of diffusers .* by --run FOLDER"):
        load_model(base="configs/latent-diffusion/digits.yaml", ckpt=tmp_path / "diffusion_pytorch_model.safetensors")


def test_missing_library_names_its_extra(tmp_path, monkeypatch):
    from tests.comparisons import hide

    hide(monkeypatch, "diffusers")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"need the extra `diffusers`: pip install 'decu-uncertainty\[diffusers\]'"):
        load_model(diffusers=tmp_path)
