"""Networks that are told of augmentations: without any they are the plain ones, else the embedding moves by W a."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm import Sampling, load_model
from ldm.modules.augment_labels import split_augmented
from ldm.modules.diffusionmodules.model import Model
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.dit import DiT
from ldm.modules.parts import find_parts
from ldm.modules.uvit import UViT
from tests.training.runs import end_state, run_training
from tests.training.test_blocks import transformer_config

UNET = {"image_size": 8, "in_channels": 1, "model_channels": 32, "out_channels": 1, "num_res_blocks": 1}
UNET |= {"attention_resolutions": [], "channel_mult": [1, 2], "num_heads": 1}
DDPM = {"ch": 32, "out_ch": 1, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 1}
TOKENS = {"patch_size": 4, "depth": 2, "num_heads": 2}
DIT = {"input_size": 8, "in_channels": 1, "hidden_size": 16, **TOKENS}
UVIT = {"img_size": 8, "in_chans": 1, "embed_dim": 16, **TOKENS}
# A network of each kind: its class, its arguments, and its number of classes.
KINDS = {
    "UNet of classes": (UNetModel, {**UNET, "num_classes": 3}, 3),
    "UNet without": (UNetModel, UNET, 0),
    "DiT": (DiT, {**DIT, "num_classes": 3}, 3),
    "U-ViT of classes": (UViT, {**UVIT, "num_classes": 3}, 3),
    "U-ViT without": (UViT, UVIT, 0),
    "DDPM's UNet": (Model, {**DDPM, "resolution": 8}, 0),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=KINDS)
def both(request):
    """(plain network, the same that is told of five labels, whether there are classes), with weights of all layers."""
    kind, options, classes = KINDS[request.param]
    plain, told = kind(**options), kind(**options, augment_dim=5)
    with torch.no_grad():
        for number, parameter in enumerate(plain.parameters()):
            parameter += 0.05 * draw(*parameter.shape, seed=number)
    missing = told.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["augment_emb.weight"] and not missing.unexpected_keys
    return plain.eval(), told.eval(), classes > 0


@torch.no_grad()
def test_labels_move_the_embedding_of_the_time_and_none_is_the_plain_network(both):
    plain, told, classes = both
    x, t, changes = draw(3, 1, 8, 8), torch.tensor([3.0, 500.0, 900.0]), draw(3, 5, seed=1)
    changes[0] = 0
    labels = torch.tensor([0, 2, 1])
    y = torch.cat([labels[:, None], changes], 1) if classes else changes
    alone = (x, t, None, labels) if isinstance(told, UNetModel) and classes else None
    expected = plain(*alone) if alone else plain(x, t, *([labels] if classes else []))
    assert bool(expected.abs().sum() > 0)
    torch.testing.assert_close(told(x, t, y=y), expected, msg="W starts at zero")
    told.augment_emb.weight.copy_(draw(*told.augment_emb.weight.shape, seed=2))
    found = told(x, t, y=y)
    torch.testing.assert_close(found[0], expected[0], msg="an image that was left alone")
    assert not torch.allclose(found[1:], expected[1:], atol=1e-3)
    moved = (told.condition(t, y) - plain.condition(t, labels if classes else None)).reshape(3, -1)
    moved = moved[:, -told.augment_emb.out_features :]  # of U-ViT the token of the time, the last
    torch.testing.assert_close(moved, changes @ told.augment_emb.weight.T, rtol=1e-4, atol=1e-5)
    assert "augment_emb.*" in find_parts(told).condition


def test_labels_that_nothing_takes_are_refused(both):
    plain, told, classes = both
    x, t = torch.zeros(2, 1, 8, 8), torch.ones(2)
    with pytest.raises(ValueError, match=r"takes no augmentation labels: set augment_dim"):
        plain(x, t, y=torch.zeros(2, 5 + classes))
    with pytest.raises(ValueError, match=rf"\[B, {5 + classes}\], got \[2, 4\]"):
        told(x, t, y=torch.zeros(2, 4))


def test_labels_alone_are_what_they_are():
    labels = torch.tensor([1, 2])
    assert split_augmented(labels, 0, True)[0] is labels and split_augmented(None, 5, False) == (None, None)


def test_a_transformer_learns_what_augmentations_do_and_samples_none(tmp_path):
    """The condition of its training is the label beside the changes; that of its samples the label."""
    path = transformer_config(tmp_path)
    content = OmegaConf.load(path)
    content.model.params.cond_stage_config.target = "ldm.modules.encoders.augmented.AugmentedClassEmbedder"
    content.model.params.unet_config.params.augment_dim = 9
    transform = {"target": "ldm.data.augmentation.NonLeaky", "params": {"probability": 0.9}}
    content.data.params.train.params.transform = transform
    OmegaConf.save(content, path)
    run = run_training(path, tmp_path)
    name = "model.diffusion_model.augment_emb.weight"
    assert end_state(run)[name].abs().sum() > 0
    pipeline = load_model(run, Sampling(steps=2, scale=1.5), device="cpu")
    first = pipeline.sample([3], 1)
    with torch.no_grad():
        pipeline.model.model.diffusion_model.augment_emb.weight += 1
    assert torch.equal(pipeline.sample([3], 1), first)
