"""Text-to-image folders of diffusers: prompts by their own encoders, guidance, flows, and uncertainty per prompt."""

from __future__ import annotations

import json

import pytest
import torch

from ldm import Sampling, load_model
from ldm.interop.pooled import pack_pooled
from ldm.modules.choices import Choices
from tests.comparisons import package
from tests.interop.models import (
    THEIR_CROSS_UNET,
    THEIR_FLUX,
    THEIR_PIXART,
    THEIR_SD3,
    filled,
    flux_output,
    randn,
    relative,
    saved,
    their_samples,
)

diffusers = pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")

PROMPTS = ["a three", "an eight"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_text_encoder(transformers, folder):
    """A CLIP of two layers and a tokenizer that knows letters, as Stable Diffusion's folders hold them."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (tokenizer / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, "pad_token": "<|endoftext|>"})
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(
        **sizes,
        vocab_size=len(words),
        max_position_embeddings=12,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    encoder = filled(transformers.CLIPTextModel(config))
    encoder.save_pretrained(folder / "text_encoder")
    return encoder, transformers.CLIPTokenizer.from_pretrained(tokenizer)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A tiny Stable Diffusion: (folder, UNet, scheduler, contexts of the prompts and of the empty prompt)."""
    folder = tmp_path_factory.mktemp("stable") / "diffusion"
    with package("transformers") as transformers:
        encoder, tokenizer = save_text_encoder(transformers, folder)
        ids = tokenizer([*PROMPTS, ""], padding="max_length", max_length=12, truncation=True, return_tensors="pt")
        with torch.no_grad():
            contexts = encoder(ids.input_ids).last_hidden_state
    unet = filled(diffusers.UNet2DConditionModel(**THEIR_CROSS_UNET))
    stage = filled(diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4))
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return saved(folder, unet=unet, vae=stage, scheduler=scheduler), unet, scheduler, contexts


def test_prompts_guide_as_theirs(stable_diffusion):
    """Guidance 7.5, 20 steps from the same noise; the folder's encoder embeds the prompts."""
    from ldm.interop.prompts import encode_prompts

    folder, unet, scheduler, contexts = stable_diffusion
    with package("transformers"):
        choices = encode_prompts(folder, PROMPTS)
    torch.testing.assert_close(choices.context, contexts, rtol=1e-6, atol=1e-6)
    pipeline = load_model(diffusers=folder, sampling=Sampling(steps=20, scale=7.5)).with_choices(choices)
    assert pipeline.class_names == tuple(PROMPTS)

    def predict(x, t):
        with_text = unet(x, t, contexts[:2]).sample
        without = unet(x, t, contexts[2:].expand(2, -1, -1)).sample
        return without + 7.5 * (with_text - without)

    noise = randn(2, 4, 8, 8).float()
    expected = their_samples(scheduler, predict, noise, 20)
    assert relative(pipeline.sample_latents([0, 1], range(2), noise), expected) < 1e-4
    with package("transformers"):  # the same by the model's own copy of the encoder, which members may change
        prompted = load_model(diffusers=folder, sampling=pipeline.sampling).with_prompts(PROMPTS)
    assert relative(prompted.sample_latents([0, 1], range(2), noise), expected) < 1e-4


def test_prompts_are_asked_for_where_there_are_none(stable_diffusion):
    pipeline = load_model(diffusers=stable_diffusion[0], sampling=Sampling(steps=4))
    with pytest.raises(ValueError, match="prompts"):
        pipeline.sample(n=1)


@pytest.mark.parametrize("kind", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_flows_are_loaded_and_sampled_as_theirs(kind, tmp_path):
    """The caller's embeddings with their pooled vectors; shifted times, Euler's steps, guidance of SD3."""
    sd3 = kind.startswith("SD3")
    network = filled(getattr(diffusers, kind)(**(THEIR_SD3 if sd3 else THEIR_FLUX)))
    stage = filled(
        diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, scaling_factor=1.5, shift_factor=0.1)
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    folder = saved(tmp_path, transformer=network, vae=stage, scheduler=scheduler)
    if not sd3:  # Flux's config does not say the size of its latents
        config = json.loads((folder / "transformer" / "config.json").read_text())
        (folder / "transformer" / "config.json").write_text(json.dumps({**config, "sample_size": 8}))
    tokens, pooled = randn(3, 5, 16, seed=2).float(), randn(3, 24, seed=3).float()
    scale = 4.0 if sd3 else 1.0
    sampling = Sampling(sampler="Euler", steps=6, scale=scale)
    choices = Choices(tuple(PROMPTS), context=pack_pooled(tokens, pooled), null=True)
    loaded = load_model(diffusers=folder, sampling=sampling)
    with pytest.raises(ValueError, match="its folder has no text encoder: embed them yourself"):
        loaded.with_prompts(PROMPTS)
    pipeline = loaded.with_choices(choices)

    def of(x, t, rows):
        if sd3:
            return network(x, tokens[rows], pooled[rows], t.expand(2)).sample
        return flux_output(network, x, tokens[rows], pooled[rows], t.expand(2) / 1000)

    def predict(x, t):
        with_text = of(x, t, [0, 1])
        return with_text if scale == 1 else torch.lerp(of(x, t, [2, 2]), with_text, scale)

    noise = randn(2, 4, 8, 8).float()
    found = pipeline.sample_latents([0, 1], range(2), noise)
    expected = their_samples(scheduler, predict, noise, 6)
    assert relative(found, expected) < 1e-4
    with torch.no_grad():
        images = stage.decode(expected / 1.5 + 0.1).sample.clamp(-1, 1)
    torch.testing.assert_close(pipeline.decode(found), images, rtol=0, atol=2e-3)


def save_t5(transformers, folder):
    """A T5 of one layer and a tokenizer that knows letters, as PixArt's folders hold them."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = transformers.T5Tokenizer(vocab=words, extra_ids=0, model_max_length=12)
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": len(words)}
    encoder = filled(transformers.T5EncoderModel(transformers.T5Config(**sizes)))
    encoder.save_pretrained(folder / "text_encoder")
    return encoder, tokenizer


def test_pixart_attends_to_the_tokens_that_count(tmp_path):
    """The folder's T5 embeds prompts of different lengths; guidance 4.5, 20 steps, the learned variance left alone."""
    from ldm.interop.prompts import encode_prompts

    network = filled(diffusers.PixArtTransformer2DModel(**THEIR_PIXART))
    stage = filled(diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4))
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    with package("transformers") as transformers:
        encoder, tokenizer = save_t5(transformers, tmp_path)
        read = tokenizer(["a bold three", "an eight", ""], padding="max_length", max_length=16, return_tensors="pt")
        with torch.no_grad():
            tokens = encoder(read.input_ids, attention_mask=read.attention_mask).last_hidden_state
        folder = saved(tmp_path, transformer=network, vae=stage, scheduler=scheduler)
        choices = encode_prompts(folder, ["a bold three", "an eight"], t5_length=16)
        loaded = load_model(diffusers=folder, sampling=Sampling(steps=20, scale=4.5))
        prompted = loaded.with_prompts(["a bold three", "an eight"])  # of 120 tokens, most of which only fill
    assert read.attention_mask.sum(1).unique().numel() > 1
    pipeline = loaded.with_choices(choices)

    def predict(x, t):
        of = [network(x, tokens[rows], t.expand(2), encoder_attention_mask=read.attention_mask[rows]).sample[:, :4]
              for rows in ([0, 1], [2, 2])]  # fmt: skip
        return torch.lerp(of[1], of[0], 4.5)

    noise = randn(2, 4, 8, 8).float()
    expected = their_samples(scheduler, predict, noise, 20)
    assert relative(pipeline.sample_latents([0, 1], range(2), noise), expected) < 1e-4
    assert relative(prompted.sample_latents([0, 1], range(2), noise), expected) < 1e-4
