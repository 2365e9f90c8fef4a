"""Every method on every network: heads to a report, last-layer posteriors and maps, probes, exposure bias.

The models are tiny and random, on 8x8 digits; each cell runs what a user runs, in a few steps.
"""

import copy
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from ldm import Branching, Sampling, load_ensemble, load_model
from ldm.checkpoint import save_checkpoint
from ldm.data.digits import Digits
from ldm.diffusion.epsilon_scaling import EpsilonScaling
from ldm.evaluation.taps import Reading, resolve_taps
from ldm.experiments.exposure import Chains
from ldm.interop.pooled import pack_masked, pack_pooled
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.pipelines import ModelPipeline, PosteriorPipeline, build_model
from ldm.pipelines.features import make_backbone
from ldm.pipelines.fitting import LaplacePlan
from ldm.pipelines.loading import make_pipeline
from ldm.util import generator

UNET = {
    "image_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "model_channels": 32,
    "attention_resolutions": [1],
    "num_res_blocks": 1,
    "channel_mult": [1],
    "num_heads": 1,
    "use_scale_shift_norm": True,
}
CONTEXT = {"use_spatial_transformer": True, "context_dim": 8}
EDM = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 10, "model_channels": 16}
EDM |= {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
SKIPS = {"encoder_type": "residual", "decoder_type": "skip", "resample_filter": [1, 3, 3, 1]}
WIDE = {"model_channels": 64, "channel_mult": [1], "attn_resolutions": [8]}  # a head of attention has 64 channels
VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 11}
DIT = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
DDPM = {"ch": 32, "out_ch": 1, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "in_channels": 1}
BLOCKS = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [32, 32]}
PIXELS = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
TEXTS = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
TRANSFORMER = {"sample_size": 8, "in_channels": 1, "out_channels": 2, "num_layers": 1, "num_embeds_ada_norm": 10}
TRANSFORMER |= {"num_attention_heads": 2, "attention_head_dim": 8}
SD3 = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2, "pos_embed_max_size": 4}
SD3 |= {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
PIXART = {"sample_size": 8, "in_channels": 1, "out_channels": 2, "num_layers": 1, "caption_channels": 8}
PIXART |= {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
FLUX = {"sample_size": 8, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": [4, 6, 6]}
FLUX |= {"attention_head_dim": 16, "num_attention_heads": 2}
POOLED = {"joint_attention_dim": 8, "pooled_projection_dim": 8}
OURS = "ldm.modules."
FLOW = {"schedule_config": {"target": "ldm.diffusion.schedule.FlowSchedule"}, "parameterization": "velocity"}
SIGMAS = {"schedule_config": {"target": "ldm.diffusion.schedule.EDMSchedule"}, "parameterization": "edm"}
LEARNED = {"learned_variance": "hybrid"}
# {network: (target, its arguments, how classes reach it, arguments of the model)}
NETWORKS = {
    "LDM": (f"{OURS}diffusionmodules.openaimodel.UNetModel", UNET | CONTEXT, "crossattn", {}),
    "ADM": (
        f"{OURS}diffusionmodules.openaimodel.UNetModel",
        UNET | {"num_classes": 11, "out_channels": 2},
        "adm",
        LEARNED,
    ),
    "DDAE": (
        f"{OURS}ddpmpp.UNet",
        {"image_shape": [1, 8, 8], "n_channels": 32, "ch_mults": [1, 1], "is_attn": [False, True], "n_blocks": 1},
        None,
        {"unit_time": True},
    ),
    "DDPM++": (
        f"{OURS}ddpmpp.UNet",
        {"image_shape": [1, 8, 8], "n_channels": 32, "ch_mults": [1, 1], "is_attn": [False, True], "n_blocks": 1}
        | {"use_res_for_updown": True},
        None,
        {"unit_time": True},
    ),
    "DDPM": (f"{OURS}diffusionmodules.ddpm_unet.Model", DDPM | {"resolution": 8}, None, {}),
    "SongUNet": (f"{OURS}edm.SongUNet", EDM, "adm", SIGMAS),
    "SongUNet with skips": (f"{OURS}edm.SongUNet", EDM | SKIPS, "adm", SIGMAS),
    "DhariwalUNet": (f"{OURS}edm.DhariwalUNet", EDM | WIDE, "adm", SIGMAS),
    "flow": (f"{OURS}diffusionmodules.openaimodel.UNetModel", UNET | CONTEXT, "crossattn", FLOW),
    "DiT": (f"{OURS}dit.DiT", DIT | {"num_classes": 10}, "adm", LEARNED),
    "U-ViT": (f"{OURS}uvit.UViT", VIT | {"conv": False}, "adm", {"first_time": 1}),
    "U-ViT with a convolution": (f"{OURS}uvit.UViT", VIT, "adm", {"first_time": 1}),
    "UNet2DModel": ("diffusers.UNet2DModel", BLOCKS | PIXELS | {"num_class_embeds": 11}, "adm", {}),
    "UNet2DConditionModel": ("diffusers.UNet2DConditionModel", BLOCKS | TEXTS, "crossattn", {}),
    "DiTTransformer2DModel": ("diffusers.DiTTransformer2DModel", TRANSFORMER, "adm", LEARNED),
    "SD3Transformer2DModel": ("diffusers.SD3Transformer2DModel", SD3 | POOLED, "pooled", FLOW),
    "FluxTransformer2DModel": ("diffusers.FluxTransformer2DModel", FLUX | POOLED, "pooled", FLOW),
    "PixArtTransformer2DModel": ("diffusers.PixArtTransformer2DModel", PIXART, "masked", LEARNED),
    "a module of one's own": (None, {}, None, {}),
}
# Last layers that make tokens, whose arrangement is found by a probe.
TOKENS = ("DiT", "U-ViT", "DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel",
          "PixArtTransformer2DModel")  # fmt: skip


class Own(nn.Module):
    """A network that knows nothing of this package."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(8, 1, 3, padding=1)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.rows = nn.Embedding(11, 8)
        self.attention = nn.Linear(8, 8)

    def forward(self, x, t, y):
        hidden = self.first(x).movedim(1, 3) + (self.rows(y) + (t / 1000)[:, None])[:, None, None]
        return self.last(torch.tanh(self.attention(torch.tanh(hidden))).movedim(3, 1))


class TokenAndPooled(ClassEmbedder):
    """A row of two vectors a class: one token, and what stands for the whole text."""

    def embed(self, labels):
        rows = super().embed(labels).unflatten(2, (2, -1))[:, 0]
        return pack_pooled(rows[:, :1], rows[:, 1])


class TokenAndMask(ClassEmbedder):
    """A row of one token a class, which counts."""

    def embed(self, labels):
        row = super().embed(labels)
        return pack_masked(row, torch.ones_like(row[..., 0]))


def make_config(kind):
    target, arguments, key, options = NETWORKS[kind]
    width = {"crossattn": 8, "masked": 8, "pooled": 16}.get(key, 0)
    classes = {"n_classes": 11, "embed_dim": width, "key": "class_label", "ucg_rate": 0.1}
    embedder = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": classes}
    if key in ("pooled", "masked"):
        name = "TokenAndPooled" if key == "pooled" else "TokenAndMask"
        embedder["target"] = f"tests.test_cross_table.{name}"
        key = "crossattn"
    params = {
        "unet_config": {"target": target, "params": arguments},
        "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "cond_stage_config": "__is_unconditional__" if key is None else embedder,
        "cond_stage_key": "class_label",
        "cond_stage_trainable": True,
        "conditioning_key": key,
        "image_size": 8,
        "channels": 1,
        "use_ema": False,
        **options,
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


@cache
def load(kind):
    """The pipeline of a tiny model whose weights are drawn, none of them zero."""
    sampling = Sampling(steps=2)
    if NETWORKS[kind][0] is None:
        given = {"schedule": "ddpm", "shape": (1, 8, 8), "condition": "class", "n_classes": 10, "null_class": 10}
        return load_model(network=fill(Own()), sampling=sampling, taps={"mid": "attention"}, device="cpu", **given)
    if kind.endswith("Model"):
        pytest.importorskip("diffusers")
    config = make_config(kind)
    return make_pipeline(ModelPipeline, fill(build_model(config)), config, None, sampling, None, "cpu")


def fill(module):
    source = generator("cross table")
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 and parameter.numel() else 4
            parameter.copy_(torch.randn(parameter.shape, generator=source) * fan_in**-0.5)
    return module


@cache
def digits():
    return [Digits("test")[index] for index in range(4)]


def batch():
    images = torch.stack([torch.as_tensor(item["image"]) for item in digits()])
    return {"image": images, "class_label": torch.tensor([int(item["class_label"]) for item in digits()])}


def train_members(kind, folder, heads):
    """The heads of two members after one step each, by name."""
    save_checkpoint({"state_dict": load(kind).model.state_dict()}, folder / "base.ckpt")
    members = []
    for index in range(2):
        model = copy.deepcopy(load(kind).model)
        model.pretrained_path = str(folder / "base.ckpt")
        model.head_options = heads
        model.start_from_pretrained(index, index)
        model.seed_draws(index, index)
        model.learning_rate = 1e-2
        optimiser = model.train().configure_optimizers()
        before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
        model.shared_step(batch(), model.draws, 0, range(4))[0].backward()
        optimiser.step()
        assert any(not torch.equal(model.get_parameter(name), value) for name, value in before.items())
        saved = {"state_dict": dict(model.state_dict())}
        model.on_save_checkpoint(saved)
        assert saved["state_dict"].keys() == before.keys()
        members.append({name: value.detach() for name, value in saved["state_dict"].items()})
    return members


@pytest.mark.parametrize("kind", NETWORKS)
def test_heads_to_information(kind, tmp_path):
    """Class rows, where there are classes, and corrections of attention of low rank, together."""
    pipeline = load(kind)
    assert ("class_embedding" in pipeline.model.head_patterns) == bool(pipeline.n_classes)
    names = ["lora", *(["class_embedding"] if pipeline.n_classes else [])]
    layers = ["*attention"] if kind == "a module of one's own" else ["attention"]
    heads = {"names": names, "lora": {"layers": layers, "rank": 2}, "noise": 1.0}
    members = train_members(kind, tmp_path, heads)
    base = replace(pipeline, model=copy.deepcopy(pipeline.model))  # members' factors are added to it
    ensemble = load_ensemble(model=base, members=members)
    chosen = [3, 5] if pipeline.n_classes else None
    found = ensemble.information(chosen, n=2, branching=Branching(at=0.0))
    assert found.mi.shape == ((2, 2) if chosen else (1, 2))
    assert bool(found.mi.isfinite().all()) and float(found.mi.min()) > 0
    assert float(found.mi.max()) <= math.log(2) + 1e-6
    assert chosen or ensemble.classes.names == ("all images",)
    maps = ensemble.pixel_information(chosen).maps["image"]
    assert maps.shape[-2:] == (8, 8) and float(maps.max()) > 0


@pytest.mark.parametrize("kind", NETWORKS)
def test_posterior_and_maps(kind):
    pipeline = load(kind)
    laplace = LaplacePlan(draws=1).fit(pipeline, digits(), range(4))
    assert (laplace.arrangement is not None) == (kind in TOKENS)
    posterior = PosteriorPipeline(pipeline, laplace, draws=2, particles=2)
    labels = [3, 5] if pipeline.n_classes else None
    for method in ("persistent", "bayesdiff"):
        *_, last = posterior.steps(method, labels, [0, 1])
        assert last.var.shape == (2, 1, 8, 8) and bool(last.var.isfinite().all()) and float(last.var.min()) >= 0
        assert float(last.var.mean()) > 0


@pytest.mark.parametrize("kind", NETWORKS)
def test_probe(kind):
    backbone = make_backbone(load(kind).model)
    taps = resolve_taps(backbone.network, ["all"])
    u = 0.3 * load(kind).model.schedule.end
    found = backbone.features(batch()["image"].movedim(3, 1).float(), range(4), Reading((u,), taps))
    assert len(found) == len(taps)
    for value in found.values():
        assert value.shape[0] == 4 and bool(value.isfinite().all()) and float(value.var(0).max()) > 0


@pytest.mark.parametrize("kind", NETWORKS)
def test_exposure(kind):
    pipeline = load(kind)
    found = Chains(pipeline, digits(), {"plain": EpsilonScaling()}).measure(range(2))
    assert {"training", "plain", "plain/states", "data"} <= set(found)
