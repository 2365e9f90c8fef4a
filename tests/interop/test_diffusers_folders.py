"""Folders of diffusers through `load_model`: pipelines sampled as theirs, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from ldm import Sampling, load_model
from ldm.diffusion.noise import ImageNoise
from ldm.util import get_obj_from_str
from tests.interop.models import (
    THEIR_DIT,
    THEIR_PIXART,
    THEIR_UNET,
    filled,
    latent_diffusion,
    randn,
    relative,
    saved,
    their_samples,
)

diffusers = pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")


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
