"""Loss weights: published values, one loss for all targets, the bound's divergences, and configs that contradict."""

import math
from itertools import pairwise, product

import pytest
import torch
from torch import nn

from ldm.diffusion.affine import CosineSchedule
from ldm.diffusion.denoiser import make_target
from ldm.diffusion.losses import DiffusionLoss, TableLoss, elbo_weights
from ldm.diffusion.process import BetaSchedule, ContinuousProcess, TableProcess
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule
from ldm.diffusion.training_times import UniformTimes
from ldm.diffusion.weighting import LOSS_WEIGHTS, LearnedWeight, P2Weight, SimpleWeight, make_loss_weight
from ldm.training.config_keys import check_sections
from tests.conftest import golden_tensors, tiny_config, tiny_model

FLOW = {"target": "ldm.diffusion.schedule.FlowSchedule"}
LIKE = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
PUBLISHED = {
    "sigma/min_snr_gamma1": {"name": "min_snr", "gamma": 1},
    "sigma/min_snr_gamma5": "min_snr",
    "sigma/min_snr_gamma20": {"name": "min_snr", "gamma": 20},
    "sigma/p2_gamma1_k1": "p2",
    "sigma/p2_gamma0.5_k1": {"name": "p2", "gamma": 0.5},
    "edm/edm_sd0.5": "edm",
    "edm/edm_sd1": {"name": "edm", "sigma_data": 1},
    "k_diffusion/sd0.5/soft-min-snr": "soft_min_snr",
    "k_diffusion/sd1/soft-min-snr": {"name": "soft_min_snr", "gamma": 1},
    "k_diffusion/sd0.5/karras": "edm",
    "k_diffusion/sd1/snr": "simple",
}


def table(timesteps=1000, **betas):
    schedule = BetaSchedule(timesteps=timesteps, **betas).build()
    abar = schedule.log_abar[1:].exp()
    return TableProcess(schedule, abar.sqrt(), (1 - abar).sqrt())


def continuous(schedule):
    return ContinuousProcess(schedule, UniformTimes())


@pytest.mark.parametrize("stem", PUBLISHED)
def test_weights_of_levels_are_the_published_ones(stem):
    golden = golden_tensors("lossweights_io")
    process = continuous(CosineSchedule())
    t = process.schedule.time_at(golden["sigma"])
    weight = make_loss_weight(PUBLISHED[stem])
    compared = [name for name in ("x0", "eps", "v") if f"{stem}/{name}" in golden]
    assert len(compared) >= 2
    for name in compared:
        found = weight.of_target(process, make_target(process.schedule, name), t, LIKE)
        torch.testing.assert_close(found, golden[f"{stem}/{name}"], rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("stem", "betas", "weight"),
    [
        ("diffusers/linear/min_snr_gamma5", (1e-4, 0.02, "sqrt_linear"), "min_snr"),
        ("diffusers/scaled_linear/min_snr_gamma1", (0.00085, 0.012, "linear"), {"name": "min_snr", "gamma": 1}),
        ("denoising_diffusion_pytorch/linear/min_snr_gamma5", (1e-4, 0.02, "sqrt_linear"), "min_snr"),
        ("denoising_diffusion_pytorch/linear/plain", (1e-4, 0.02, "sqrt_linear"), "simple"),
    ],
)
def test_weights_of_a_table_are_those_of_published_training_code(stem, betas, weight):
    """Where the network predicts x0 or v, `plain` of denoising-diffusion-pytorch is the loss of eps."""
    golden = golden_tensors("lossweights_io")
    first, last, name = betas
    process = table(linear_start=first, linear_end=last, name=name)
    for target in ("eps", "x0", "v"):
        if f"{stem}/{target}" in golden:
            found = make_loss_weight(weight).of_target(
                process, make_target(process.schedule, target), golden["t"], LIKE
            )
            # float32 tables of abar, near 1 at the first entries
            torch.testing.assert_close(found.float(), golden[f"{stem}/{target}"], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("gamma", "k"), [(0, 1), (0.5, 1), (1, 1), (1, 0.1)])
def test_p2_is_what_the_published_loss_multiplies_a_unit_error_by(gamma, k):
    golden = golden_tensors("lossweights_io")
    process = table(linear_start=1e-4, linear_end=0.02, name="sqrt_linear")
    found = P2Weight(gamma, k).of_noise(process, golden["t"], LIKE)
    torch.testing.assert_close(found.float(), golden[f"p2/linear/gamma{gamma}_k{k}"], rtol=1e-5, atol=0)


PROCESSES = {"table": table(), "flow": continuous(FlowSchedule()), "edm": continuous(EDMSchedule())}
# The weight of the bound is that of a table's steps.
WEIGHED = [pair for pair in product([*LOSS_WEIGHTS, "learned"], PROCESSES) if pair[0] != "vlb" or pair[1] == "table"]


@pytest.mark.parametrize(("name", "place"), WEIGHED)
def test_a_weight_is_the_same_loss_whatever_is_regressed(name, place):
    """One prediction of x0, said as eps, x0, v, velocity, score and EDM's F."""
    process = PROCESSES[place]
    weight = make_loss_weight(name)
    if name == "learned":
        nn.init.normal_(weight.logvar.weight, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(0)
    x0, guess, eps = (torch.randn(3, 2, 4, 4, generator=draws, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0, 400, 999]) if process.timesteps else torch.tensor([0.02, 0.5, 0.97], dtype=torch.float64)
    alpha, sigma = process.levels(t, x0)
    implied = (alpha * x0 + sigma * eps - alpha * guess) / sigma
    losses = []
    for regressed in ("eps", "x0", "v", "velocity", "score", "edm"):
        target = make_target(process.schedule, regressed)
        output = target.of(guess, implied, alpha, sigma)
        losses.append(DiffusionLoss(process, target, weighting=weight)(output, x0, t, eps).total)
    assert losses[0].shape == (3,) and bool((losses[0] != losses[0][0]).any())
    for one, other in pairwise(losses):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_bounds_weight_is_the_divergence_of_the_steps():
    """Two steps whose predicted eps are e apart: KL of N(mean, posterior variance), by torch's own formula."""
    process = table(50)
    schedule, t = process.schedule, torch.arange(1, 50)
    weight = make_loss_weight("vlb").of_noise(process, t, LIKE)
    abar, before = schedule.log_abar[2:].exp(), schedule.log_abar[1:-1].exp()
    beta = schedule.betas[1:]
    variance = beta * (1 - before) / (1 - abar)
    means = [-beta / ((1 - abar).sqrt() * (1 - beta).sqrt()) * eps for eps in (0.3, 0.8)]
    one, other = (torch.distributions.Normal(mean, variance.sqrt()) for mean in means)
    torch.testing.assert_close(weight * 0.5**2, torch.distributions.kl_divergence(one, other))
    torch.testing.assert_close(weight, elbo_weights(schedule, "eps", torch.cat([variance[:1], variance]))[1:])
    assert make_loss_weight("vlb").of_noise(process, torch.tensor([0, 1]), LIKE).unique().numel() == 1


def test_edms_weight_is_one_on_what_edm_regresses():
    t = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    process = continuous(EDMSchedule())
    target = make_target(process.schedule, "edm", 0.7)
    found = make_loss_weight({"name": "edm", "sigma_data": 0.7}).of_target(process, target, t, LIKE)
    torch.testing.assert_close(found, torch.ones(3, dtype=torch.float64))


def test_sigmoid_moves_by_its_bias_in_log_snr():
    process = continuous(CosineSchedule())
    t = process.schedule.time_at(torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64) * math.exp(1.0))
    shifted = make_loss_weight({"name": "sigmoid", "bias": -2}).of_noise(process, t, LIKE)
    torch.testing.assert_close(shifted, torch.tensor([0.01 / 1.01, 0.5, 0.9], dtype=torch.float64))


def test_ends_of_a_flow_have_finite_weights():
    process = continuous(FlowSchedule())
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for name in LOSS_WEIGHTS.keys() - {"vlb"}:
        for regressed in ("eps", "x0", "velocity"):
            target = make_target(process.schedule, regressed)
            assert bool(make_loss_weight(name).of_target(process, target, t, LIKE).isfinite().all())


def test_a_learned_weight_begins_as_its_base_and_learns_the_log_of_the_error():
    process = continuous(FlowSchedule())
    weight = LearnedWeight(SimpleWeight()).double()
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    error = torch.tensor([3.0, 1.0, 0.3, 0.1, 0.5, 2.0], dtype=torch.float64)
    target = make_target(process.schedule, "eps")
    assert torch.equal(weight.weigh(error, process, target, t, LIKE), error)
    optimiser = torch.optim.LBFGS(weight.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        total = weight.weigh(error, process, target, t, LIKE).sum()
        total.backward()
        return total

    optimiser.step(loss)
    torch.testing.assert_close(weight.log_variance(process, t, LIKE), error.log(), rtol=0, atol=1e-3)
    torch.testing.assert_close(loss().detach(), (1 + error.log()).sum(), rtol=0, atol=1e-4)


def test_a_model_trains_under_the_weight_that_its_config_names():
    """The loss of a flow's velocity under min-SNR, by its own formula."""
    model = tiny_model(schedule_config=FLOW, parameterization="velocity", loss_weight="min_snr")
    plain = tiny_model(schedule_config=FLOW, parameterization="velocity")
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x0, eps = (torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    cond = model.get_learned_conditioning(torch.tensor([1, 2, 3]))
    losses = [plain.p_losses(x0[i : i + 1], cond[i : i + 1], t[i : i + 1], eps[i : i + 1])[0] for i in range(3)]
    snr = ((1 - t) / t) ** 2
    # The error of x0 is u times that of the velocity.
    expected = (snr.clamp(max=5) * t**2 * torch.stack(losses).double()).mean()
    loss, parts = model.p_losses(x0, cond, t, eps)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(parts["val/loss_simple"], torch.stack(losses).mean(), rtol=1e-5, atol=0)


def test_without_the_key_the_loss_is_latent_diffusions():
    model = tiny_model(original_elbo_weight=0.1, l_simple_weight=2.0)
    assert isinstance(model.loss, TableLoss) and model.loss.weighting is None


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"loss_weight": "min-snr"}, "did you mean 'min_snr'"),
        ({"loss_weight": {"gamma": 5}}, "needs a name"),
        ({"loss_weight": {"name": "min_snr", "gama": 5}}, "did you mean 'gamma'"),
        ({"loss_weight": {"name": "min_snr", "gamma": 0}}, "above 0"),
        ({"loss_weight": {"name": "p2", "gamma": "large"}}, "a number"),
        ({"loss_weight": {"name": "learned", "base": "learned"}}, "not learned itself"),
        ({"loss_weight": {"name": "learned", "base": "ed"}}, "loss_weight.base"),
        ({"loss_weight": 5}, "loss_weight must be"),
    ],
)
def test_a_weight_that_does_not_exist_is_refused_before_anything_is_built(params, words):
    with pytest.raises(ValueError, match=words):
        check_sections({"model": {"target": "x", "params": params}})
    with pytest.raises(ValueError, match=words):
        tiny_model(**params)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"loss_weight": "vlb", "original_elbo_weight": 0.1}, "original_elbo_weight"),
        ({"loss_weight": "learned", "learn_logvar": True}, "learn_logvar"),
        ({"loss_weight": "simple", "loss_type": "l1"}, "loss_type"),
        ({"loss_weight": "vlb", "schedule_config": FLOW, "parameterization": "velocity"}, "table of betas"),
    ],
)
def test_keys_that_contradict_the_weight_are_refused(params, words):
    with pytest.raises(ValueError, match=words):
        tiny_model(**params)


def test_learned_weights_are_saved_and_may_be_missing(tmp_path):
    learned, plain = tiny_model(1, loss_weight="learned", use_ema=False), tiny_model(2, use_ema=False)
    assert any(name == "loss_weight.logvar.weight" for name, _ in learned.named_parameters())
    for source, other in ((learned, plain), (plain, learned)):
        torch.save({"state_dict": source.state_dict()}, tmp_path / "model.ckpt")
        other.init_from_ckpt(str(tmp_path / "model.ckpt"))
        torch.testing.assert_close(other.model.state_dict(), source.model.state_dict())
    again = tiny_model(3, loss_weight="learned", use_ema=False)
    torch.save({"state_dict": learned.state_dict()}, tmp_path / "learned.ckpt")
    again.init_from_ckpt(str(tmp_path / "learned.ckpt"))
    assert torch.equal(again.loss_weight.logvar.weight, learned.loss_weight.logvar.weight)
    assert tiny_config(loss_weight="learned")["params"]["loss_weight"] == "learned"
