"""Models of ours in diffusers' classes: outputs and samples by numbers, in float64."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch

from ldm.diffusion.samplers import ddim, run
from ldm.interop.dit_keys import convert_dit
from ldm.interop.first_stage_keys import convert_first_stage
from ldm.interop.unet_keys import convert_unet
from ldm.models.autoencoder import AutoencoderKL, VQModelInterface
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.dit import DiT
from tests.interop.models import CODER, F64, UNET, filled, latent_diffusion, randn, relative

diffusers = pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")

TIMES = torch.tensor([3, 981])
# diffusers computes its sinusoids and its table of alphas in float32, whatever the network's type.
CLOSE = 1e-5
CONTEXT = {"use_spatial_transformer": True, "context_dim": 24}
CLASSES = {"n_classes": 6, "key": "class_label"}
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 16,
        "ddconfig": {**CODER, "double_z": False},
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}


def built(converted):
    """Their class with converted weights, every key strictly."""
    config = {key: value for key, value in converted.config.items() if key != "time_frequency_shift"}
    module = getattr(diffusers, converted.class_name)(**config)
    module.load_state_dict(converted.state)
    return module.double().eval()


UNETS = {
    "plain": {},
    "adm": {
        "num_classes": 7,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "use_new_attention_order": True,
        "channel_mult": [1, 1],
        "num_head_channels": 16,
    },
    "context": {**CONTEXT, "attention_resolutions": [1, 2], "num_heads": 2},
    "deep": {**CONTEXT, "attention_resolutions": [1], "num_heads": 4, "transformer_depth": 2, "num_classes": 7},
}


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unets_give_the_same(name):
    unet = filled(UNetModel(**{**UNET, **UNETS[name]})).double()
    theirs = built(convert_unet(unet, 8))
    x = randn(2, 3, 8, 8)
    labels = None if unet.num_classes is None else torch.tensor([1, 6])
    context = None if unet.context_dim is None else randn(2, 2, 24, seed=2)
    given = {} if context is None else {"encoder_hidden_states": context}
    assert relative(theirs(x, TIMES, class_labels=labels, **given).sample, unet(x, TIMES, context, labels)) < CLOSE


@torch.no_grad()
def test_dit_gives_the_same_at_its_own_frequencies():
    ours = filled(DiT(input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=10)).double()
    theirs = built(convert_dit(ours))
    x, labels = randn(2, 3, 8, 8), torch.tensor([1, 10])
    expected = ours(x, TIMES, labels)
    assert relative(theirs(x, TIMES, labels).sample, expected) > 1e-2  # divides by 127, see docs/diffusers.md
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert relative(theirs(x, TIMES, labels).sample, expected) < CLOSE


@pytest.mark.parametrize("kind", ["VQModel", "AutoencoderKL"])
@torch.no_grad()
def test_first_stages_give_the_same(kind):
    given = {"lossconfig": {"target": "torch.nn.Identity"}, "embed_dim": 3}
    if kind == "VQModel":
        ours = filled(VQModelInterface(ddconfig={**CODER, "double_z": False}, n_embed=16, **given)).double()
    else:
        ours = filled(AutoencoderKL(ddconfig=CODER, **given)).double()
    theirs = built(convert_first_stage(ours, 0.5, 16))
    images = randn(2, 3, 16, 16)
    encoded = theirs.encode(images)
    if kind == "VQModel":
        z = ours.encode(images)
        assert relative(encoded.latents, z) < CLOSE
    else:
        z = ours.encode(images).mode()
        assert relative(encoded.latent_dist.mean, z) < CLOSE
        assert relative(encoded.latent_dist.std, ours.encode(images).std) < CLOSE
    assert relative(theirs.decode(z).sample, ours.decode(z)) < CLOSE


@pytest.fixture(scope="module")
def class_model():
    """The layout of cin256: classes as contexts of a latent model, the last row the null class."""
    return latent_diffusion(
        {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {**UNET, **CONTEXT}},
        first_stage_config=VQ,
        conditioning_key="crossattn",
        cond_stage_key="class_label",
        cond_stage_config={
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {**CLASSES, "embed_dim": 24},
        },
    )


@pytest.fixture(scope="module")
def class_folder(class_model, tmp_path_factory):
    from ldm.interop.export import export_folder

    return export_folder(class_model, tmp_path_factory.mktemp("cin256") / "folder")


@torch.no_grad()
def test_class_conditional_ldm_samples_the_same_by_the_lines_of_its_page(class_model, class_folder, monkeypatch):
    """20 steps of DDIM at guidance 7.5 from the same noise: what the folder's README says, with their classes alone."""
    monkeypatch.chdir(class_folder)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", (class_folder / "README.md").read_text(), re.S)[1], names)
    names["network"].double()
    names["table"] = names["table"].double()
    noise, labels = randn(3, 3, 8, 8), torch.tensor([0, 2, 4])
    theirs = names["sample"](labels, noise, 20, 7.5)
    model = class_model.double()
    ours = run(ddim(model.denoiser(labels, 7.5), model.schedule, noise, model.sampling_times(20)))
    model.float()
    assert relative(theirs, ours) < CLOSE


def test_folder_of_a_class_conditional_ldm_opens_here(class_model, class_folder):
    from ldm import Sampling, load_model

    pipeline = load_model(diffusers=class_folder, sampling=Sampling(steps=4, scale=3.0))
    assert (pipeline.n_classes, pipeline.null_class) == (5, 5)
    state = class_model.state_dict()
    assert torch.equal(pipeline.model.cond_stage_model.embedding.weight, state["cond_stage_model.embedding.weight"])
    noise, labels = randn(2, 3, 8, 8).float(), [1, 3]
    found = pipeline.sample_latents(labels, range(2), noise)
    with torch.no_grad():
        denoiser = class_model.float().denoiser(torch.tensor(labels), 3.0)
        expected = run(ddim(denoiser, class_model.schedule, noise, pipeline.times))
        images = class_model.decode_first_stage(expected).clamp(-1, 1)
    assert relative(found, expected) < 1e-4
    torch.testing.assert_close(pipeline.decode(found), images, rtol=0, atol=1e-2)


def test_what_no_class_of_theirs_computes_is_refused_with_its_reason(tmp_path):
    from ldm.interop.export import export_folder

    unet = {**UNET, "num_heads": 4, "attention_resolutions": [1, 2]}
    with pytest.raises(ValueError, match="equally wide on all levels, got widths"):
        convert_unet(UNetModel(**unet), 8)
    with pytest.raises(ValueError, match="must begin with 1"):
        convert_unet(UNetModel(**{**UNET, "channel_mult": [2, 2]}), 8)
    model = latent_diffusion(
        {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET}, unit_time=True
    )
    with pytest.raises(ValueError, match="unit_time"):
        export_folder(model, tmp_path / "out")
    assert not os.path.exists(tmp_path / "out")


@torch.no_grad()
def test_pixel_model_samples_the_same_by_their_pipeline(tmp_path):
    """`DDIMPipeline.from_pretrained` of the folder, 20 steps, clipped: images from the same noise."""
    from ldm.interop.export import export_folder

    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET}
    model = latent_diffusion(unet, clip_denoised=True, beta_schedule="cosine")
    folder = export_folder(model, tmp_path / "pixels")
    assert (
        json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["beta_schedule"] == "squaredcos_cap_v2"
    )
    pipeline = diffusers.DDIMPipeline.from_pretrained(folder)
    pipeline.unet.double()
    pipeline.set_progress_bar_config(disable=True)
    draws = torch.Generator().manual_seed(4)
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=F64)
    theirs = pipeline(generator=draws, num_inference_steps=20, output_type="np", use_clipped_model_output=True).images
    from ldm.diffusion.denoiser import clipped

    model.double()
    denoiser = clipped(model.denoiser(), model.schedule)
    ours = run(ddim(denoiser, model.schedule, noise, model.sampling_times(20)))
    expected = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert relative(torch.from_numpy(theirs), expected) < 1e-4
