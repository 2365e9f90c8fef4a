"""LatentDiffusion against the published implementation: state dict, losses and gradients, stages, sampling."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from ldm.diffusion.denoiser import MappedDenoiser, NetworkDenoiser
from ldm.diffusion.samplers import ancestral, ddim, make_times, plms, run
from ldm.modules.ema import LitEma
from tests.conftest import golden_json, golden_tensors
from tests.models.ldm_small import assert_close, build, recorded

NETWORK, SAMPLER = 3e-5, 2e-4
VARIANTS = {
    "eps_l2": {},
    "x0_l2": {"parameterization": "x0"},
    "eps_l1": {"loss_type": "l1"},
    "eps_l2_elbo": {"original_elbo_weight": 0.01, "l_simple_weight": 0.5},
    "eps_l2_logvar": {"learn_logvar": True, "logvar_init": -0.3},
}
# name -> (steps, eta, scale, temperature, quantised x_0)
DDIM_RUNS = {
    "ddim10_eta0_g3": (10, 0.0, 3.0, 1.0, False),
    "ddim10_eta1_g3": (10, 1.0, 3.0, 1.0, False),
    "ddim10_eta0.5_g1": (10, 0.5, 1.0, 1.0, False),
    "ddim10_eta0_g1": (10, 0.0, 1.0, 1.0, False),
    "ddim30_eta0_g5": (30, 0.0, 5.0, 1.0, False),
    "ddim10_eta0_g3_quantx0": (10, 0.0, 3.0, 1.0, True),
    "ddim10_eta1_g3_temp0.7": (10, 1.0, 3.0, 0.7, False),
}


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def io():
    return recorded()


def test_state_dict_is_the_published_one(model):
    """Same keys in the same order, strictly loaded (`build`), so that checkpoints pass both ways."""
    assert list(model.state_dict()) == golden_json("ldm_small")["state_dict_order"]
    counts = golden_json("ldm_small")["n_params"]
    parts = {"unet": model.model, "first_stage": model.first_stage_model, "cond_stage": model.cond_stage_model}
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} == counts


def test_schedule_buffers_are_bit_equal():
    """Built from the configuration, not loaded."""
    params = golden_json("ldm_small")["config"]["params"]
    weights = golden_tensors("ldm_small_weights")
    fresh = dict(build().__class__(**params).named_buffers())
    names = [name for name in golden_json("ldm_small")["state_dict_order"] if "." not in name]
    assert len(names) == 12
    for name in names:
        assert torch.equal(fresh[name], weights[name]), name


def test_forward_process(model, io):
    t = io["q/t"]
    assert_close(model.q_sample(io["q/z0"], t, io["q/noise"]), io["q/x_t"], 1e-6)
    alpha, sigma = model.schedule.coefficients((t + 1).double(), io["q/z0"])
    assert_close(alpha * io["q/z0"], io["q/mean"], 1e-6)
    assert_close(sigma**2, io["q/variance"], 1e-6)
    assert_close((io["q/x_t"] - sigma * io["q/noise"]) / alpha, io["q/predict_start_from_noise"], 1e-5)
    shape = (-1, 1, 1, 1)
    first, second = (model.get_buffer(f"posterior_mean_coef{k}")[t].reshape(shape) for k in (1, 2))
    assert_close(first * io["q/z0"] + second * io["q/x_t"], io["q/posterior_mean"], 1e-6)
    assert_close(model.posterior_variance[t].reshape(shape), io["q/posterior_variance"], 1e-6)
    clipped = model.posterior_log_variance_clipped[t].reshape(shape)
    assert_close(clipped, io["q/posterior_log_variance_clipped"], 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients(variant, io):
    model = build(**VARIANTS[variant])
    golden = {name.removeprefix(f"p_losses/{variant}/"): value for name, value in io.items()}
    cond = model.get_learned_conditioning({"class_label": io["p_losses/labels"]})
    assert_close(cond, golden["conditioning"], 0)
    loss, parts = model.p_losses(io["q/z0"], cond, io["q/t"], noise=io["q/noise"])
    loss.backward()
    assert_close(loss, golden["loss"], NETWORK)
    for name in ("loss_simple", "loss_vlb"):
        assert_close(parts[f"val/{name}"], golden[name], NETWORK)
    output = model.apply_model(io["q/x_t"], io["q/t"], cond)
    assert_close(output, golden["model_output"], NETWORK)
    unet = model.model.diffusion_model
    assert_close(model.cond_stage_model.embedding.weight.grad, golden["grad_embedding"], NETWORK)
    assert_close(unet.out[2].weight.grad, golden["grad_unet_out_weight"], NETWORK)
    norm = torch.stack([p.grad.double().square().sum() for p in unet.parameters() if p.grad is not None]).sum().sqrt()
    assert_close(norm, golden["grad_norm_all_unet"], NETWORK)


def test_step_from_images(model, io):
    """get_input (encode), condition and loss, with the recorded draws."""
    batch = {"image": io["step/image_bhwc"], "class_label": io["step/labels"]}
    z = model.get_input(batch, "image")
    assert_close(z, io["step/z"], NETWORK)
    cond = model.embed_condition(batch, torch.ones(len(z)))
    loss, _ = model.p_losses(z, cond, io["step/t"], noise=io["step/noise"])
    assert_close(loss, io["step/loss"], NETWORK)
    draws = lambda step, samples, shape, timesteps: (io["step/t"], io["step/noise"], torch.ones(len(z)))  # noqa: E731
    assert_close(model.shared_step(batch, draws, 0, range(len(z)))[0], io["step/loss"], NETWORK)


@torch.no_grad()
def test_validation_encodes_once_for_weights_and_averages(io):
    """Both losses are those of their weights on the images, and the encoder runs once a batch."""
    model, calls = build(), []
    model.use_ema, model.model_ema = True, LitEma(model.model)
    for parameter in model.model.parameters():
        parameter.data.mul_(1.1)
    batch = {"image": io["step/image_bhwc"][:2], "class_label": io["step/labels"][:2]}
    expected = [float(model.shared_step(batch, model.validation_draws, 0, range(2))[0])]
    with model.ema_scope():
        expected.append(float(model.shared_step(batch, model.validation_draws, 0, range(2))[0]))
    model.first_stage_model.encoder.register_forward_hook(lambda *_: calls.append(1))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    items = [{name: value[place] for name, value in batch.items()} for place in range(2)]
    trainer = pl.Trainer(accelerator="cpu", **quiet)
    (found,) = trainer.validate(model, torch.utils.data.DataLoader(items, batch_size=2), verbose=False)
    assert [found["val/loss"], found["val/loss_ema"]] == pytest.approx(expected, rel=1e-6)
    assert len(calls) == 1 and expected[0] != expected[1]


@torch.no_grad()
def test_half_precision_leaves_the_draws_alone(io):
    """Under autocast the encoder rounds; the noise, which is the target, and what it is added to do not."""
    trained = build().train()
    batch = {"image": io["step/image_bhwc"], "class_label": io["step/labels"]}
    with torch.autocast("cpu", torch.bfloat16):
        z = trained.get_input(batch, "image")
        t, noise, uniform = trained.draws(3, range(len(z)), z.shape[1:], trained.num_timesteps)
        loss, _ = trained.p_losses(z, trained.embed_condition(batch, uniform), t, noise)
        assert torch.equal(trained.shared_step(batch, trained.draws, 3, range(len(z)))[0], loss)
    assert z.dtype == noise.dtype == torch.float32


@torch.no_grad()
def test_stages(model, io):
    z = io["decode/z"]
    assert_close(model.decode_first_stage(z), io["decode/image"], NETWORK)
    assert_close(model.decode_first_stage(z, force_not_quantize=True), io["decode/image_force_not_quantize"], NETWORK)
    half = build(scale_factor=0.5)
    assert_close(half.decode_first_stage(z), io["decode/image_scale_factor_0.5"], NETWORK)
    images = io["step/image_bhwc"].permute(0, 3, 1, 2)
    encoded = half.get_first_stage_encoding(half.encode_first_stage(images))
    assert_close(encoded, io["encode/z_scale_factor_0.5"], NETWORK)
    _, _, (_, _, indices) = model.first_stage_model.quantize(z)
    assert_close(model.decode_first_stage(indices.reshape(2, 8, 8), predict_cids=True), io["decode/image"], NETWORK)


def test_get_loss(model):
    pred, target = torch.tensor([[1.0, -2.0]]), torch.zeros(1, 2)
    assert model.get_loss(pred, target) == 2.5 and model.get_loss(pred, target, mean=False).tolist() == [[1, 4]]


def recorded_noise(io, name):
    draws = io.get(f"{name}/noise_each_step")
    return None if draws is None else lambda index, shape: draws[index]


@pytest.mark.parametrize("name", DDIM_RUNS)
@torch.no_grad()
def test_ddim(name, model, io):
    steps, eta, scale, temperature, quantised = DDIM_RUNS[name]
    denoiser, times = model.denoiser(io["sample/classes"], scale), model.sampling_times(steps, "published")
    if quantised:
        quantise = lambda x0: model.first_stage_model.quantize(x0)[0]  # noqa: E731
        denoiser = MappedDenoiser(denoiser, model.schedule, quantise, rederive=False)
    options = {"eta": eta, "temperature": temperature, "noise": recorded_noise(io, name)}
    seen = list(ddim(denoiser, model.schedule, io["sample/x_T"], times, **options))
    assert torch.equal(model.schedule.time_to_net(times[:-1]).flip(0).long(), io[f"{name}/ddim_timesteps_ascending"])
    assert_close(torch.stack([step.x_next for step in seen]), io[f"{name}/x_after_each_step"], SAMPLER)
    assert_close(torch.stack([step.x0 for step in seen]), io[f"{name}/pred_x0_each_step"], SAMPLER)
    assert_close(model.decode_first_stage(seen[-1].x_next), io[f"{name}/image"], SAMPLER)


@pytest.mark.parametrize(("name", "scale"), [("plms10_g3", 3.0), ("plms10_g1", 1.0)])
@torch.no_grad()
def test_plms(name, scale, model, io):
    denoiser = model.denoiser(io["sample/classes"], scale)
    seen = list(plms(denoiser, model.schedule, io["sample/x_T"], model.sampling_times(10, "published")))
    assert_close(torch.stack([step.x_next for step in seen]), io[f"{name}/x_after_each_step"], SAMPLER)
    assert_close(torch.stack([step.x0 for step in seen]), io[f"{name}/pred_x0_each_step"], SAMPLER)
    assert_close(model.decode_first_stage(seen[-1].x_next), io[f"{name}/image"], SAMPLER)


@torch.no_grad()
def test_ancestral_steps(model, io):
    """p_sample chained at t = 999, 998, 500, 1, 0: single steps from t + 1 to t, the last without noise."""
    denoiser, x = model.denoiser(io["sample/classes"]), io["sample/x_T"]
    for index, t in enumerate(io["ancestral/t"].tolist()):
        times = torch.tensor([t + 1, t], dtype=torch.float64)
        noise = lambda _, shape, draw=io["ancestral/noise"][index]: draw  # noqa: E731
        step = next(ancestral(denoiser, model.schedule, x, times, noise=noise))
        assert_close(step.x0, io["ancestral/pred_x0"][index], SAMPLER)
        assert_close(step.x_next, io["ancestral/x"][index], SAMPLER)
        x = step.x_next


@torch.no_grad()
def test_embedded_conditions_and_labels_agree(model, io):
    """apply_model on embedded classes is the network of raw labels."""
    labels, x = io["sample/classes"], io["sample/x_T"]
    embedded = model.get_learned_conditioning(labels)
    by_context = NetworkDenoiser(model.apply_model, model.schedule, model.target, embedded)
    times = make_times(model.schedule, 3)
    samples = [run(ddim(one, model.schedule, x, times)) for one in (by_context, model.denoiser(labels))]
    torch.testing.assert_close(*samples)


def test_ema_follows_the_published_rule(io):
    parameter = torch.nn.Linear(1, 3)
    parameter.bias.data.copy_(io["ema/initial"])
    average = LitEma(parameter)
    for value, shadow in zip(io["ema/param_each_update"], io["ema/shadow_each_update"], strict=True):
        parameter.bias.data.copy_(value)
        average(parameter)
        assert_close(dict(average.named_buffers())["bias"], shadow, 1e-6)


def test_ema_keys_are_the_published_ones():
    keys = golden_json("ldm_small")["ema"]["state_dict_keys_when_use_ema"]
    params = {**golden_json("ldm_small")["config"]["params"], "use_ema": True}
    ours = [name for name in build().__class__(**params).state_dict() if name.startswith("model_ema.")]
    assert len(ours) == keys["n"] and ours[: len(keys["first"])] == keys["first"]
