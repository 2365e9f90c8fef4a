"""DDAE's configs: they build the published networks, train from a few images, and are told the published times."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import save_checkpoint
from ldm.commands.line import load_command, parse
from ldm.diffusion.denoiser import NetworkDenoiser, Prediction, clipped
from ldm.diffusion.samplers import ddim, heun, make_sampler, run
from ldm.diffusion.schedule import EDMSchedule, VPSchedule
from ldm.diffusion.times import edm_times
from ldm.evaluation.taps import resolve_taps
from ldm.modules.ema import LitEma
from ldm.pipelines import load_weights
from ldm.pipelines.features import make_backbone
from ldm.training.config import learning_rate, load_config, shared_batch
from ldm.util import instantiate_from_config
from tests.conftest import golden_json, golden_tensors, recipe_weights
from tests.test_docs import read_calls

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "ddae").glob("[!_]*dd*.yaml"))
NARROW = ["model.params.unet_config.params.n_channels=32"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_its_network_and_its_loss_is_finite(path):
    config = load_config([str(path)])
    with torch.device("meta"):
        net = instantiate_from_config(config.model.params.unet_config)
    published = golden_json("ddae_keys")["networks"].get(path.stem)
    if published is not None:
        assert sum(parameter.numel() for parameter in net.parameters()) == published["n_params"]
    model = instantiate_from_config(load_config([str(path)], NARROW).model)
    size = model.image_size
    batch = {"image": torch.zeros(2, size, size, 3), "augment_labels": torch.zeros(2, 9)}
    loss, _ = model.shared_step(batch, model.draws, 0, range(2))
    assert loss.isfinite()


@pytest.mark.parametrize("path", sorted(CONFIGS[0].parent.glob("[!_]*.yaml")), ids=lambda path: path.stem)
def test_rate_and_batch_do_not_depend_on_the_number_of_devices(path):
    config = load_config([str(path)])
    assert learning_rate(config, True, 8, 1) == learning_rate(config, True, 1, 2) == config.model.learning_rate
    assert shared_batch(config, 4).data.params.batch_size == config.data.params.global_batch_size // 4


def small_model(name, **params):
    """The golden's small network in the model of a config."""
    spec = golden_json("ddae_small_ddpm")
    config = OmegaConf.to_container(load_config([str(CONFIGS[0].parent / name)]).model, resolve=True)
    config["params"] |= {"image_size": 8, "use_ema": False, **params}
    config["params"]["unet_config"]["params"] = spec["config"]
    model = instantiate_from_config(config)
    model.model.diffusion_model.load_state_dict(recipe_weights(spec))
    return model.eval()


@torch.no_grad()
def test_published_ddpm_loss_and_samples():
    io, model = golden_tensors("ddae_small_ddpm_io"), small_model("DDPM_ddpm.yaml")
    x0 = 2 * io["ddpm/image01"] - 1
    loss, _ = model.p_losses(x0, None, io["ddpm/loss_t"] - 1, io["ddpm/loss_noise"])
    torch.testing.assert_close(loss, io["ddpm/loss"], rtol=1e-4, atol=0)
    # The published DDIM has a table of its own, T + 1 betas, and visits every 100th of its entries from 1.
    schedule = VPSchedule(torch.linspace(1e-4, 0.02, 1001, dtype=torch.float64))
    table = io["ddpm/ddim_sche_alphabar_t"].double()
    torch.testing.assert_close(schedule.log_abar[1:].exp(), table, rtol=1e-4, atol=0)
    times = torch.tensor([*range(902, 0, -100), 1.0], dtype=torch.float64)

    def network(x, t, cond):
        return model.network(x, t / 1000, cond)  # t counts entries from 0, as theirs does

    denoiser = clipped(NetworkDenoiser(network, schedule, model.target), schedule)
    samples = (run(ddim(denoiser, schedule, io["ddpm/ddim10_xT"], times)) + 1) / 2
    torch.testing.assert_close(samples, io["ddpm/ddim10_sample01"], rtol=0, atol=1e-4)


def test_the_documented_ancestral_command_has_the_published_variance():
    """DDAE's `--mode DDPM` draws noise of variance beta_t at each of the 1,000 steps, and none in the last."""
    (words,) = (words for line, _, words in read_calls("docs/ddae.md") if "--sampler DDPM" in line)
    sampling = parse(load_command("sample model"), words, "sample model").sampling
    model = small_model("DDPM_ddpm.yaml")
    times = model.sampling_times(sampling.steps, sampling.spacing)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    sampler = make_sampler(sampling.sampler, variance=sampling.variance)
    silent = partial(sampler, noise=lambda index, shape: torch.zeros(shape))
    steps = list(silent(lambda x, u: Prediction(x, x), model.schedule, x, times))
    found = torch.stack([step.transition.w for step in steps])
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).flip(0)
    torch.testing.assert_close(found[:-1], betas[:-1], rtol=1e-9, atol=0)
    assert len(found) == 1000 and found[-1] == 0


@torch.no_grad()
def test_published_edm_loss_and_samples():
    io, model = golden_tensors("ddae_small_ddpm_io"), small_model("EDM_ddpm.yaml")
    x0, each_time = 2 * io["ddpm/image01"] - 1, (-1.2 + 1.2 * io["edm/loss_rnd_normal"].double().flatten()).exp()
    loss, _ = model.p_losses(x0, None, each_time, io["edm/loss_noise"])
    torch.testing.assert_close(loss, io["edm/loss"], rtol=1e-4, atol=0)
    schedule = EDMSchedule()
    torch.testing.assert_close(edm_times(schedule, 18), io["edm/schedule18"], rtol=1e-6, atol=0)
    denoiser = clipped(NetworkDenoiser(model.network, schedule, model.target, dtype=torch.float32), schedule)
    times = edm_times(schedule, 6)
    x = io["edm/sample6_xT"].double() * times[0]
    samples = (run(heun(denoiser, schedule, x, times)) + 1) / 2
    torch.testing.assert_close(samples, io["edm/sample6_01"], rtol=0, atol=1e-4)


def test_ramps_of_averages():
    layer = torch.nn.Linear(1, 1, bias=False)
    for ramp, first in (("counts", 2 / 11), ("power", 1 - 2 ** (-2 / 3)), ("half_life", 2.0**-20)):
        torch.nn.init.zeros_(layer.weight)
        averages = LitEma(layer, 0.9993, ramp=ramp)
        torch.nn.init.ones_(layer.weight)
        averages(layer)
        assert float(averages.weight) == pytest.approx(1 - first, rel=1e-6)
        averages.num_updates.fill_(10**6)
        averages(layer)
        assert float(averages.weight) == pytest.approx(1 - 0.9993 * first, rel=1e-5)


def test_a_global_batch_must_divide():
    config = load_config([str(CONFIGS[0])])
    with pytest.raises(ValueError, match="does not divide by 7"):
        shared_batch(config, 7)
    config.data.params.batch_size = 4
    with pytest.raises(ValueError, match="not both"):
        shared_batch(config, 2)


def published_file(folder, average):
    """A file as DDAE's training writes it: weights under DDP, online and averaged copies, tables, the optimiser."""
    raw = {name: value + 1 for name, value in average.items()}
    copies = {f"online_model.nn_model.{name}": value for name, value in raw.items()}
    copies |= {f"ema_model.nn_model.{name}": value for name, value in average.items()}
    copies |= {"initted": torch.tensor(True), "step": torch.tensor(7), "ema_model.alphabar_t": torch.ones(1001)}
    trained = {f"module.nn_model.{name}": value for name, value in raw.items()} | {
        "module.alphabar_t": torch.ones(1001)
    }
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    save_checkpoint({"MODEL": trained, "EMA": copies, "opt": adam.state_dict()}, folder / "model_800.pth")
    return folder / "model_800.pth"


@torch.no_grad()
def test_a_published_file_opens_with_its_averages_and_gives_the_published_features(tmp_path):
    weights, io = recipe_weights(golden_json("ddae_small_ddpm")), golden_tensors("ddae_small_ddpm_io")
    model, file = small_model("DDPM_ddpm.yaml"), published_file(tmp_path, weights)
    load_weights(model, file, averaged=False)
    assert torch.equal(model.model.diffusion_model.image_proj.bias, weights["image_proj.bias"] + 1)
    load_weights(model, file)
    trunk, x0 = make_backbone(model), 2 * io["ddpm/image01"] - 1
    for tap, found in trunk.read(resolve_taps(trunk.network, ["all"]), x0, io["ddpm/feature_noise"], 11.0).items():
        if tap.startswith("out"):
            torch.testing.assert_close(found, io[f"ddpm/feature_t11/{tap}"], rtol=0, atol=1e-4)


def test_what_a_published_file_lacks_is_listed(tmp_path):
    weights, model = recipe_weights(golden_json("ddae_small_ddpm")), small_model("DDPM_ddpm.yaml")
    del weights["up.0.res.conv1.weight"]
    with pytest.raises(ValueError, match=r"missing from the file: .*up.0.res.conv1.weight"):
        load_weights(model, published_file(tmp_path, weights))
    save_checkpoint({"MODEL": {"module.conv_in.weight": torch.ones(1)}, "EMA": {}, "opt": {}}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"first layer of DDAE's networks; it holds 1 entries, among them: module.conv"
    ):
        load_weights(model, tmp_path / "other.pth", averaged=False)
