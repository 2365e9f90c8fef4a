"""Continuous schedules in LatentDiffusion: times against scipy's quantiles, losses against the papers' own formulas."""

import math

import pytest
import torch
from scipy import stats

from ldm.diffusion.denoiser import Target
from ldm.diffusion.losses import LossSettings
from ldm.diffusion.noise import ImageNoise, TrainingDraws
from ldm.diffusion.process import BetaSchedule, TableProcess
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule
from ldm.diffusion.training_times import LogNormalNoise, UniformTimes
from tests.conftest import tiny_model

SHARES = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
FLOW = {"target": "ldm.diffusion.schedule.FlowSchedule"}
EDM = {"target": "ldm.diffusion.schedule.EDMSchedule"}


def batch_of(model, t):
    noise = ImageNoise(0, tuple(range(len(t))))
    return noise.initial((len(t), *model.latent_shape)), noise(0, (len(t), *model.latent_shape))


def test_log_normal_noise_on_the_edm_path_is_karras_distribution():
    times = LogNormalNoise(-1.2, 1.2)(SHARES, EDMSchedule())
    torch.testing.assert_close(times, torch.from_numpy(stats.lognorm(s=1.2, scale=math.exp(-1.2)).ppf(SHARES)))


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (-1.2, 1.2)])
def test_log_normal_noise_on_a_straight_path_has_a_normal_logit(mean, deviation):
    times = LogNormalNoise(mean, deviation)(SHARES, FlowSchedule())
    torch.testing.assert_close(torch.logit(times), torch.from_numpy(stats.norm(mean, deviation).ppf(SHARES)))


def test_uniform_times_cover_their_share_of_the_path():
    torch.testing.assert_close(UniformTimes(0.1, 0.9)(SHARES, FlowSchedule()), 0.1 + 0.8 * SHARES)
    torch.testing.assert_close(UniformTimes()(SHARES, LinearVPSchedule(end=2.0)), 2 * SHARES)


def test_a_scaled_time_reaches_the_network():
    model = tiny_model(path_config={**FLOW, "params": {"time_scale": 1000.0}}, parameterization="velocity")
    x0, eps = batch_of(model, t := torch.tensor([0.25, 1.0], dtype=torch.float64))
    torch.testing.assert_close(model.network_input(model.q_sample(x0, t, eps), t)[1], torch.tensor([250.0, 1000.0]))


@pytest.mark.parametrize("times", [UniformTimes(), LogNormalNoise()])
def test_the_least_and_the_largest_draw_give_finite_times(times):
    found = times(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), EDMSchedule())
    assert bool(torch.isfinite(found).all())


def test_flow_loss_is_the_error_of_the_velocity():
    model = tiny_model(path_config=FLOW, parameterization="velocity")
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x0, eps = batch_of(model, t)
    cond = model.get_learned_conditioning(torch.tensor([1, 2, 3]))
    u = t.float().reshape(-1, 1, 1, 1)
    velocity = model.apply_model((1 - u) * x0 + u * eps, t.float(), cond)
    loss, _ = model.p_losses(x0, cond, t, eps)
    torch.testing.assert_close(loss, (velocity - (eps - x0)).square().mean())


def test_edm_loss_is_karras_weighted_denoising_error():
    """lambda(sigma) |D(x_0 + sigma eps) - x_0|^2, lambda = (sigma^2 + s^2) / (sigma s)^2, D by table 1's scalings."""
    model = tiny_model(path_config=EDM, parameterization="edm", sigma_data=0.7)
    sigma = torch.tensor([0.05, 0.5, 20.0], dtype=torch.float64)
    x0, eps = batch_of(model, sigma)
    cond = model.get_learned_conditioning(torch.tensor([1, 2, 3]))
    s, data = sigma.reshape(-1, 1, 1, 1), 0.7
    x = x0 + s * eps
    raw = model.apply_model((x / (s**2 + data**2).sqrt()).float(), (sigma.log() / 4).float(), cond)
    denoised = data**2 / (s**2 + data**2) * x + s * data / (s**2 + data**2).sqrt() * raw
    expected = ((s**2 + data**2) / (s * data) ** 2 * (denoised - x0).square()).mean()
    loss, _ = model.p_losses(x0, cond, sigma, eps)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-5)  # float32 network, sigma up to 20


def test_unit_time_tells_the_network_its_share_of_the_table():
    model, plain = tiny_model(unit_time=True), tiny_model()
    x0, eps = batch_of(model, t := torch.tensor([0, 499, 999]))
    inputs, time = model.network_input(model.q_sample(x0, t, eps), t)
    torch.testing.assert_close(time, torch.tensor([0.001, 0.5, 1.0]))
    torch.testing.assert_close(time.double(), model.schedule.time_to_net(t.double() + 1))
    other, index = plain.network_input(plain.q_sample(x0, t, eps), t)
    assert torch.equal(inputs, other) and torch.equal(index, t)


def test_the_first_entry_of_the_table_can_be_time_one():
    """U-ViT is told 1 .. T, in training and in sampling, and states between entries have fractional times."""
    model = tiny_model(first_time=1)
    x0, eps = batch_of(model, t := torch.tensor([0, 499, 999]))
    _, time = model.network_input(model.q_sample(x0, t, eps), t)
    assert time.tolist() == model.schedule.time_to_net(t.double() + 1).tolist() == [1, 500, 1000]
    assert float(model.schedule.time_to_net(0.5)) == 0.5
    assert model.sampling_times(50).tolist() == tiny_model().sampling_times(50).tolist()
    with pytest.raises(ValueError, match="first_time"):
        tiny_model(first_time=1, unit_time=True)


def test_draws_of_a_continuous_path_belong_to_their_sample():
    draws = TrainingDraws(3, 1)
    together, alone = draws(5, range(4), (1, 2, 2), None), draws(5, [2], (1, 2, 2), None)
    for all_of_them, one in zip(together, alone, strict=True):
        assert torch.equal(all_of_them[2:3], one)
    assert together[0].dtype == torch.float64 and bool(((together[0] >= 0) & (together[0] < 1)).all())


@pytest.mark.parametrize(
    "params",
    [
        {"times_config": {"target": "ldm.diffusion.training_times.UniformTimes"}},
        {"path_config": FLOW, "unit_time": True},
        {"path_config": FLOW, "first_time": 1},
        {"path_config": FLOW, "learn_logvar": True},
        {"path_config": FLOW, "original_elbo_weight": 0.1},
        {"path_config": {"target": "ldm.diffusion.training_times.UniformTimes"}},
    ],
)
def test_what_does_not_act_is_refused(params):
    with pytest.raises(ValueError, match="schedule"):
        tiny_model(**params)


def test_a_continuous_path_has_no_tables():
    assert not any(
        name in tiny_model(path_config=FLOW, parameterization="velocity").state_dict() for name in ("betas",)
    )


def test_a_continuous_schedule_goes_by_two_names():
    """`path_config` is the former name of `schedule_config`; both at once are refused."""
    new, former = (tiny_model(**{name: EDM}, parameterization="edm") for name in ("schedule_config", "path_config"))
    assert new.schedule == former.schedule and new.num_timesteps is former.num_timesteps is None
    with pytest.raises(ValueError, match="two names of one key"):
        tiny_model(schedule_config=EDM, path_config=EDM, parameterization="edm")


def test_arguments_of_released_configs_that_change_nothing_are_accepted_and_no_others():
    plain = tiny_model()
    ignored = tiny_model(log_every_t=200, use_positional_encodings=False, cond_stage_forward="encode")
    assert ignored.state_dict().keys() == plain.state_dict().keys()
    for name, value in {"use_positional_encodings": True, "cond_stage_forward": "embed"}.items():
        with pytest.raises(ValueError, match=f"{name} must be one of .* no counterpart here; got {value!r}"):
            tiny_model(**{name: value})
    with pytest.raises(ValueError, match="log_every"):
        tiny_model(log_every=200)


def test_a_table_goes_with_its_module():
    """The process is a view of the module's buffers: in their precision, and of another table where one is taken."""
    model = tiny_model()
    x0, eps = batch_of(model, t := torch.tensor([0, 500, 999]))
    single = model.q_sample(x0, t, eps)
    assert model.double().q_sample(x0, t, eps).dtype == torch.float64
    torch.testing.assert_close(model.process.alphas.square(), model.alphas_cumprod.double())
    torch.testing.assert_close(model.q_sample(x0, t, eps).float(), single)
    model.register_schedule(beta_schedule="cosine", timesteps=10)
    assert model.num_timesteps == len(model.process.alphas) == len(model.lvlb_weights) == 10
    torch.testing.assert_close(model.process.alphas.double(), model.schedule.alpha(torch.arange(1.0, 11)))


def test_the_loss_of_a_table_is_latent_diffusions():
    """l_simple / exp(logvar) + logvar and the weighted bound, of each image, with no module around."""
    schedule = BetaSchedule(timesteps=4).build()
    levels = (schedule.alpha(torch.arange(1.0, 5)), schedule.sigma(torch.arange(1.0, 5)))
    process, source = TableProcess(schedule, *levels), torch.Generator().manual_seed(0)
    output, x0, eps = torch.randn(3, 2, 1, 4, 4, generator=source, dtype=torch.float64)
    logvar, weights, t = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2, 3, 4]), torch.tensor([3, 1])
    settings = LossSettings("l1", 0.5, 0.25, learns_logvar=True)
    found = settings.build(process, Target("x0"), logvar, weights)(output, x0, t, eps)
    simple = (output - x0).abs().mean((1, 2, 3))
    gamma = simple / logvar[t].exp() + logvar[t]
    torch.testing.assert_close(found.simple, simple)
    torch.testing.assert_close(found.gamma, gamma)
    torch.testing.assert_close(found.total, 0.5 * gamma + 0.25 * weights[t] * simple)
    means = found.weighted(torch.tensor([1.0, 3.0])).batch_means("train")
    torch.testing.assert_close(means["train/loss_simple"], (simple[0] + 3 * simple[1]) / 2)
    assert sorted(means) == [f"train/{name}" for name in ("loss", "loss_gamma", "loss_simple", "loss_vlb")]
