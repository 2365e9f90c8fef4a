"""Models of diffusers here: their networks in stages, their folders through `load_model`, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch.func import functional_call, jvp, vmap

from ldm import Sampling, load_model
from ldm.commands.export import Export
from ldm.diffusion.denoiser import make_target
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.schedule import VPSchedule
from ldm.interop.pooled import pack_masked, pack_pooled, unpack_masked, unpack_pooled
from ldm.interop.schedulers import read_scheduler
from ldm.modules.parts import find_parts
from ldm.util import get_obj_from_str
from tests.interop.models import (
    THEIR_CROSS_UNET,
    THEIR_DIT,
    THEIR_FLUX,
    THEIR_PIXART,
    THEIR_SD3,
    THEIR_UNET,
    filled,
    flux_output,
    latent_diffusion,
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
    "PixArtTransformer2DModel": {**THEIR_PIXART, "use_additional_conditions": True},
}
MASK = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


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
    if kind == "PixArtTransformer2DModel":
        size = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
        return network(x, TOKENS, TIMES, size, encoder_attention_mask=MASK).sample
    return flux_output(network, x, TOKENS, POOLED, TIMES / 1000, guidance=torch.full((2,), 3.5))


def our_arguments(kind):
    if "Flux" in kind or "SD3" in kind:
        return (TIMES / 1000 if "Flux" in kind else TIMES, pack_pooled(TOKENS, POOLED))
    if kind == "PixArtTransformer2DModel":
        return (TIMES, pack_masked(TOKENS, MASK))
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
def test_blocks_of_the_upscaler_pass_under_every_transform():
    """Their norms read an embedding, and their attention leaves tokens in another memory layout."""
    blocks = {"down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"), "mid_block_type": None}
    blocks |= {"up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"), "block_out_channels": (64, 64)}
    given = {**THEIR_CROSS_UNET, **blocks, "norm_num_groups": None, "attention_head_dim": 8, "time_embedding_dim": 64}
    ours = filled(get_obj_from_str("diffusers.UNet2DConditionModel")(**given)).double()
    theirs = diffusers.UNet2DConditionModel(**given).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x, expected = randn(2, 4, 8, 8), theirs(randn(2, 4, 8, 8), TIMES, encoder_hidden_states=TOKENS).sample
    found, _ = jvp(lambda state: ours(state, TIMES, TOKENS), (x,), (randn(2, 4, 8, 8, seed=5),))
    assert relative(found, expected) < 1e-12
    inner = next(name for name in dict(ours.named_parameters()) if name.endswith("to_q.weight"))
    stacked = {inner: torch.stack([ours.get_parameter(inner)] * 2)}
    members = vmap(lambda own: functional_call(ours, own, (x, TIMES, TOKENS)))(stacked)
    assert relative(members[1], expected) < 1e-12


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


@pytest.mark.parametrize("length", [1, 5, 16, 17, 34])
def test_masks_travel_with_their_tokens(length):
    tokens, mask = randn(2, length, 16), (randn(2, length, seed=2) > 0).double()
    found = unpack_masked(pack_masked(tokens, mask))
    assert torch.equal(found[0], tokens) and torch.equal(found[1], mask)
    with pytest.raises(ValueError, match="a mask"):
        pack_masked(tokens, mask[:1])


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


@pytest.mark.parametrize("steps", [20, 7])
def test_pixel_pipeline_is_loaded_and_sampled_as_theirs(steps, tmp_path):
    """DDPM's published layout: everything at the top of the folder; DDIM as it is where nothing is said of it."""
    unet = filled(diffusers.UNet2DModel(**{**THEIR_UNET, "freq_shift": 1, "flip_sin_to_cos": False}))
    scheduler = diffusers.DDIMScheduler()
    unet.save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path)
    pipeline = load_model(str(tmp_path), Sampling(steps=steps))
    assert (pipeline.model.clip_denoised, pipeline.describe_sampling()["spacing"]) == ("x0_only", "leading")
    drawn = pipeline.model.sample(None, ImageNoise(42, (0, 1)), pipeline.times)
    assert torch.equal(drawn, pipeline.sample_latents(None, range(2)))
    model, noise = pipeline.model.double(), randn(2, 3, 8, 8)  # a random network under clipping is chaotic
    unet.double()
    scheduler.alphas_cumprod = torch.cumprod(1 - model.schedule.betas, 0)

    def predict(x, t):
        return unet(x, t).sample

    expected = their_samples(scheduler, predict, noise, steps)
    assert relative(pipeline.sample_latents(None, range(2), noise), expected) < 1e-7
    assert relative(pipeline.with_(clip=True).sample_latents(None, range(2), noise), expected) > 1e-3
    scheduler.register_to_config(clip_sample=False)
    unclipped = pipeline.with_(clip=False).sample_latents(None, range(2), noise)
    assert relative(unclipped, their_samples(scheduler, predict, noise, steps)) < 1e-7


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


@pytest.mark.parametrize(("prediction", "steps"), [("epsilon", 20), ("epsilon", 7), ("v_prediction", 4), ("sample", 4)])
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
    assert pipeline.describe_sampling()["spacing"] == "leading_offset"
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


def test_networks_that_do_not_fit_are_refused_when_they_are_built(tmp_path):
    """A first stage is no network, and one output channel would be spread over three."""
    build = {"target": "diffusers.AutoencoderKL", "params": {"block_out_channels": [32], "latent_channels": 3}}
    with pytest.raises(ValueError, match=r"is called as network\(x, t\), and a StagedAutoencoderKL takes \(x\)"):
        latent_diffusion(build)
    unet = diffusers.UNet2DModel(**{**THEIR_UNET, "out_channels": 1})
    folder = saved(tmp_path / "unet", unet=unet, scheduler=diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="channels is 3, and the network gives 1 channels"):
        load_model(diffusers=folder)
    with pytest.raises(FileNotFoundError, match=r"is a folder, and a checkpoint is a file: .* --run"):
        load_model(base="configs/latent-diffusion/digits.yaml", ckpt=folder)


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
    index = json.loads((folder / "model_index.json").read_text())
    names = {str(label): f"thing {label}" for label in reversed(range(10))}
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": names}))
    pipeline = load_model(diffusers=folder, sampling=Sampling(steps=20, scale=4.0))
    assert (pipeline.n_classes, pipeline.null_class) == (10, 10)
    assert pipeline.choose_classes(["thing 7", "3"]) == [7, 3]
    labels, noise = torch.tensor([1, 9]), randn(2, 4, 8, 8).float()

    def predict(x, t):
        with_class = network(x, t.expand(2), labels).sample
        without = network(x, t.expand(2), torch.tensor([10, 10])).sample
        return (without + 4 * (with_class - without))[:, :4]

    expected = their_samples(scheduler, predict, noise, 20)
    assert relative(pipeline.sample_latents(labels.tolist(), range(2), noise), expected) < 1e-4


def test_published_transformers_have_a_former_name(tmp_path, caplog):
    """facebook/DiT-XL-2-256 and PixArt-XL-2-512x512 say Transformer2DModel, with the arguments that it had."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    for kind, config in (("DiTTransformer2DModel", THEIR_DIT), ("PixArtTransformer2DModel", THEIR_PIXART)):
        network = filled(getattr(diffusers, kind)(**config))
        file = saved(tmp_path / kind, transformer=network, scheduler=scheduler) / "transformer" / "config.json"
        former = {"num_vector_embeds": None, "double_self_attention": False, "_class_name": "Transformer2DModel"}
        file.write_text(json.dumps(json.loads(file.read_text()) | former))
        found = load_model(diffusers=tmp_path / kind).model.model.diffusion_model
        assert type(found) is get_obj_from_str(f"diffusers.{kind}")
        last = found.parts.last_layer
        assert torch.equal(found.get_submodule(last).weight, network.get_submodule(last).weight)
    assert not caplog.text
    file.write_text(json.dumps(json.loads(file.read_text()) | {"norm_type": "layer_norm"}))
    with pytest.raises(ValueError, match="got 'Transformer2DModel'"):
        load_model(diffusers=tmp_path / kind)


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
