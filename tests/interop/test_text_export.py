"""Text models of ours as folders that diffusers' own text-to-image pipelines open, and sample alike."""

from __future__ import annotations

import json

import pytest
import torch

from ldm import Sampling, load_model
from ldm.diffusion.samplers import ddim, run
from ldm.interop.export import export_folder
from ldm.modules.encoders.modules import BERTEmbedder, FrozenCLIPEmbedder
from tests.comparisons import package
from tests.interop.models import CODER, UNET, latent_diffusion, randn, relative
from tests.interop.test_diffusers_text import PROMPTS, save_text_encoder
from tests.texts import text_params

diffusers = pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")

CLIP = {
    "vocab_size": 54,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}
BERT = {"n_embed": 16, "n_layer": 2, "vocab_size": 12}


def text_latents(stage_levels, embedder, params):
    """A tiny latent model of texts: KL first stage of some levels, UNet with a context of 16."""
    unet = {**UNET, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "context_dim": 16}
    coder = {**CODER, "z_channels": 4, "double_z": True, "ch_mult": [1] * stage_levels}
    coder |= {"resolution": 8 * 2 ** (stage_levels - 1), "attn_resolutions": []}
    stage = {"embed_dim": 4, "ddconfig": coder, "lossconfig": {"target": "torch.nn.Identity"}}
    return latent_diffusion(
        {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        channels=4,
        scale_factor=0.5,
        first_stage_config={"target": "ldm.models.autoencoder.AutoencoderKL", "params": stage},
        conditioning_key="crossattn",
        cond_stage_key="txt",
        cond_stage_config={"target": f"ldm.modules.encoders.modules.{embedder.__name__}", "params": params},
    )


def our_images(model, tokens, noise, scale):
    """20 steps of DDIM from noise, decoded to [0, 1]."""
    with torch.no_grad():
        z = run(ddim(model.denoiser(tokens, scale), model.schedule, noise, model.sampling_times(20)))
        return (model.decode_first_stage(z) / 2 + 0.5).clamp(0, 1)


def save_words(folder):
    """A folder of BERT's tokenizer that knows twelve pieces of words, as text."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"athre", "eight"]))
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    with package("transformers") as transformers:
        save_text_encoder(transformers, folder)
    return folder / "tokenizer"


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "LDMTextToImagePipeline"])
def test_their_pipeline_of_the_folder_samples_the_same(kind, tokenizer, tmp_path):
    """Guidance 7.5, 20 steps from the same noise; the encoder, the tokenizer and the first stage are the folder's."""
    if not diffusers.utils.is_transformers_available():
        pytest.skip("diffusers has these pipelines with the extra `text` alone")
    if kind == "StableDiffusionPipeline":
        given = {"version": None, "params": CLIP, "max_length": 12, "tokenizer": str(tokenizer)}
        model = text_latents(2, FrozenCLIPEmbedder, given)
        model.load_state_dict(model.state_dict())  # it asks for weights before it embeds
    else:
        model = text_latents(4, BERTEmbedder, {**BERT, "tokenizer": save_words(tmp_path / "words")})
    with package("transformers"):
        folder = export_folder(model, tmp_path / "out")
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == kind
        pipeline = getattr(diffusers, kind).from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        tokens = model.cond_stage_model.tokenize(PROMPTS)
        noise = randn(2, 4, 8, 8).float()
        side = 8 * model.first_stage_model.encoder.factor
        sizes = {"height": side, "width": side, "latents": noise}
        theirs = pipeline(PROMPTS, num_inference_steps=20, guidance_scale=7.5, output_type="np", **sizes).images
    ours = our_images(model, tokens, noise, 7.5).movedim(1, -1)
    torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=2e-3)
    if kind == "StableDiffusionPipeline":
        with package("transformers"):
            again = load_model(diffusers=folder, sampling=Sampling(steps=20, scale=7.5)).with_prompts(PROMPTS)
        assert (
            relative((again.decode(again.sample_latents([0, 1], range(2), noise)) + 1) / 2, ours.movedim(-1, 1)) < 1e-2
        )


def test_latent_diffusions_text_folder_opens_again(tmp_path):
    """LDMBertModel's weights under their names are ours again; a text encoder of other heads is refused."""
    model = text_latents(4, BERTEmbedder, {**BERT, "tokenizer": save_words(tmp_path / "words")})
    with package("transformers"):
        folder = export_folder(model, tmp_path / "out")
        tokens = model.cond_stage_model.tokenize(PROMPTS)
        again = load_model(diffusers=folder, sampling=Sampling(steps=20, scale=7.5)).with_prompts(PROMPTS)
    noise = randn(2, 4, 8, 8).float()
    found = again.decode(again.sample_latents([0, 1], range(2), noise)) / 2 + 0.5
    assert relative(found, our_images(model, tokens, noise, 7.5)) < 1e-4
    config = folder / "bert" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "encoder_attention_heads": 4}))
    with pytest.raises(ValueError, match="encoder_attention_heads must be 8 here, got 4"):
        load_model(diffusers=folder)


def test_what_has_no_class_there_is_named(tokenizer, tmp_path):
    words = text_params()["cond_stage_config"]["params"]
    with pytest.raises(ValueError, match="no class for this model's tokenizer: BertTokenizer"):
        export_folder(text_latents(4, BERTEmbedder, {**words, "n_embed": 16}), tmp_path / "out")
    given = {**BERT, "tokenizer": str(tokenizer), "max_seq_len": 12}
    with pytest.raises(ValueError, match=r"latents of 8 x 8 pixels; .* 12 ids and 2"):
        export_folder(text_latents(2, BERTEmbedder, given), tmp_path / "out")
    hub = {"params": CLIP, "max_length": 12}
    with pytest.raises(ValueError, match="clip-vit-large-patch14 is no folder with its files"):
        export_folder(text_latents(2, FrozenCLIPEmbedder, hub), tmp_path / "out")
    assert not (tmp_path / "out").exists()
