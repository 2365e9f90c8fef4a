"""EDM's configs: every published key, a released pickle into a pipeline, training on classes and augmentations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm import Sampling, load_model
from ldm.checkpoint import save_checkpoint
from ldm.diffusion.denoiser import NetworkDenoiser, Target
from ldm.diffusion.samplers import heun, run
from ldm.diffusion.schedule import EDMSchedule, VESchedule
from ldm.diffusion.times import edm_times, make_times
from ldm.settings import Scaling
from ldm.training.config import load_config
from ldm.util import instantiate_from_config
from tests.conftest import golden_json
from tests.persistence import Persistent, write_published

FOLDER = Path(__file__).parents[2] / "configs" / "edm"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))
UNET = "model.params.unet_config.params"
TINY = [f"{UNET}.model_channels=16", f"{UNET}.channel_mult=[1,2]", f"{UNET}.num_blocks=1", f"{UNET}.img_resolution=8",
        f"{UNET}.attn_resolutions=[4]", f"{UNET}.dropout=0.0", "model.params.image_size=8",
        "model.params.use_ema=false"]  # fmt: skip


def read_model_config(name, changes=()):
    return load_config([str(FOLDER / f"{name}.yaml")], list(changes)).model


def published_keys(name):
    keys = golden_json("keys_edm")["keys"]
    listed = keys[name]
    if isinstance(listed, list):
        return {key: tuple(shape) for key, shape in listed}
    left = {key: shape for key, shape in published_keys(listed["as"]).items() if key not in listed["absent"]}
    return left | {key: tuple(shape) for key, shape in [*listed["added"], *listed["changed"]]}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_builds_the_released_network(name):
    spec = golden_json("keys_edm")
    assert sorted(spec["config"]) == NAMES
    config = read_model_config(name)
    with torch.device("meta"):
        net = instantiate_from_config(config.params.unet_config)
    assert {f"model.{key}": tuple(value.shape) for key, value in net.state_dict().items()} == published_keys(name)
    assert sum(value.numel() for value in net.parameters()) == spec["counts"][name]["parameters"]
    assert sum(value.numel() for value in net.buffers()) == spec["counts"][name]["buffers"]
    published = spec["config"][name]
    classes = config.params.cond_stage_config.get("params", {}).get("n_classes", 0)
    assert (config.params.image_size, classes) == (published["img_resolution"], published["label_dim"])
    assert config.params.unet_config.params.dropout == published["dropout"]


@pytest.mark.parametrize("name", ["cifar10-32x32-cond-vp", "ffhq-64x64-uncond-ve", "imagenet-64x64-cond-adm"])
def test_the_loss_is_finite_and_knows_the_condition(name):
    model = instantiate_from_config(read_model_config(name, TINY))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    batch = {"image": torch.zeros(2, 8, 8, 3), "class_label": torch.tensor([1, 2])}
    plain, _ = model.eval().shared_step(batch, model.draws, 0, range(2))
    others, _ = model.shared_step({**batch, "class_label": torch.tensor([3, 2])}, model.draws, 0, range(2))
    told, _ = model.shared_step({**batch, "augment_labels": torch.ones(2, 9)}, model.draws, 0, range(2))
    assert plain.isfinite()
    assert (plain != others) == ("-cond-" in name)
    assert (plain != told) == ("imagenet" not in name)


@pytest.fixture
def released(tmp_path):
    """A file as NVIDIA publishes its networks, of a tiny network by class, and that network."""
    net = nn.Module()
    net.model = instantiate_from_config(read_model_config("cifar10-32x32-cond-vp", TINY).params.unet_config)
    source = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=source)
    path = write_published({"ema": Persistent(net, "EDMPrecond")}, tmp_path / "edm.pkl")
    return path, net.model.eval()


@torch.no_grad()
def test_a_released_pickle_is_a_pipeline(released, tmp_path):
    path, net = released
    config = tmp_path / "tiny.yaml"
    OmegaConf.save(load_config([str(FOLDER / "cifar10-32x32-cond-vp.yaml")], TINY), config)
    sampling = Sampling(sampler="Heun", steps=18, scaling=Scaling(b="published"))
    pipeline = load_model(base=config, ckpt=path, sampling=sampling, device="cpu")
    assert (pipeline.n_classes, pipeline.model.null_class) == (10, None)
    assert pipeline.wrappers.scaling.b == 1.0006
    plain = load_model(base=config, ckpt=path, sampling=Sampling(sampler="Heun", steps=3), device="cpu")
    found = plain.sample_latents([3, 7], [0, 1])
    # The same by hand: the raw network on one-hot labels.
    schedule, hot = EDMSchedule(), torch.eye(10)[[3, 7]]
    denoiser = NetworkDenoiser(lambda x, t, y: net(x, t, y), schedule, Target("edm"), hot)
    x = plain.initial(plain.noise([0, 1]))
    torch.testing.assert_close(found, run(heun(denoiser, schedule, x, edm_times(schedule, 3))).float())


def test_a_pickle_of_another_preconditioner_is_refused(released, tmp_path):
    _, net = released
    wrapped = nn.Module()
    wrapped.model = net
    path = write_published({"ema": Persistent(wrapped, "VPPrecond")}, tmp_path / "vp.pkl")
    model = instantiate_from_config(read_model_config("cifar10-32x32-cond-vp", TINY))
    with pytest.raises(ValueError, match="VPPrecond, which is parameterization: eps, and the config says edm"):
        model.init_from_ckpt(str(path))


def test_times_of_a_variance_exploding_schedule_are_its_noise_levels():
    """Its u is sigma^2, and Karras' grid is of sigma."""
    times = make_times(VESchedule(), 5)
    torch.testing.assert_close(VESchedule().sigma(times), edm_times(EDMSchedule(0.02, 100.0), 5))


@pytest.mark.parametrize("null_class", [False, True])
def test_members_train_the_class_table_that_the_network_holds(null_class, tmp_path):
    """A head of classes is the columns of `map_label`; the null class, weights of zero, is no column of it."""
    embedder = "model.params.cond_stage_config.params"
    changes = [
        *TINY,
        "model.params.heads.names=[class_embedding]",
        f"{embedder}.null_class={null_class}",
        f"{embedder}.n_classes={10 + null_class}",
    ]
    config = read_model_config("cifar10-32x32-cond-ve", changes)
    base = instantiate_from_config(config)
    for parameter in base.model.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_checkpoint({"state_dict": base.state_dict()}, tmp_path / "base.ckpt")
    model = instantiate_from_config(config)
    model.pretrained_path = str(tmp_path / "base.ckpt")
    model.start_from_pretrained(0, 3)
    (name,) = (name for name, value in model.named_parameters() if value.requires_grad and value.numel())
    assert name == "model.diffusion_model.map_label.weight"
    batch = {"image": torch.zeros(2, 8, 8, 3), "class_label": torch.tensor([1, 4])}
    loss, _ = model.train().shared_step(batch, model.draws, 0, range(2))
    loss.backward()
    moved = model.get_parameter(name).grad.abs().sum(0)
    assert moved.nonzero().flatten().tolist() == [1, 4]
    assert not torch.equal(model.get_parameter(name), base.get_parameter(name))
