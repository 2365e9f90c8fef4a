"""Epsilon scaling against published runs, against networks that divide their own output, and against its formulas."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import get_args

import pytest
import torch

from ldm.diffusion.denoiser import NetworkDenoiser, Prediction, Target, clipped, guided
from ldm.diffusion.epsilon_scaling import (
    EpsilonScaling,
    ScaledDenoiser,
    load_scaling,
    noise_level,
    published_scaling,
    save_scaling,
    scaled,
    scaling_from,
    tabulated,
)
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import ancestral, ddim, heun, make_sampler, make_times, midpoint, run
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule, VPSchedule, make_betas
from ldm.experiments.toy import GaussianDenoiser
from ldm.settings import SamplerName
from tests.conftest import golden_json, golden_tensors
from tests.models.toys import edm_toy, es_toy, es_toy_learned

F64 = torch.float64
VP = VPSchedule(make_betas("sqrt_linear", 1000, 1e-4, 2e-2))
TIMES = make_times(VP, "20")
ADM_RUNS = ("ddim20", "ddim20_noclip", "ddim20_eta1")
ADM_RUNS += ("ddpm20_fixedlarge", "ddpm20_fixedsmall", "ddpm20_learned", "ddpm20_learned_cosine")
NOISE = ImageNoise(3, (0, 1))


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def toy(x, t, cond=None):
    """A smooth network of (x, t, cond) in float64."""
    shift = 0 if cond is None else 0.3 * cond.to(x).reshape(-1, 1, 1, 1)
    return 0.7 * x + 0.2 * torch.tanh(2 * x.roll(1, -1)) + shift


def sample(sampler, denoiser, schedule=VP, times=TIMES, **options):
    x = draw(2, 1, 2, 4) * schedule.prior_std
    return run(make_sampler(sampler, **options)(denoiser, schedule, x, times, noise=NOISE))


@pytest.mark.parametrize("scale", ["1.0", "1.017"])
@pytest.mark.parametrize("name", ADM_RUNS)
def test_published_runs(name, scale):
    name = f"{name}_es{scale}"
    golden, case = golden_tensors("es"), golden_json("es")["cases"][name]
    schedule = VPSchedule(golden[f"schedule/betas_{case.get('schedule', 'linear')}_1000"])
    learned, times = case.get("learn_sigma", False), make_times(schedule, case["timestep_respacing"])
    denoiser = NetworkDenoiser(es_toy_learned if learned else es_toy, schedule, Target("eps"), learned_range=learned)
    denoiser = scaled(denoiser, schedule, EpsilonScaling(b=case["eps_scaler"]), times)
    denoiser = clipped(denoiser, schedule) if case["clip_denoised"] else denoiser
    draws = golden.get(f"{name}/noise_each_step")
    noise = None if draws is None else lambda index, shape: draws[index]
    if case["sampler"] == "ddim":
        steps = list(ddim(denoiser, schedule, golden["x_T"], times, eta=case["eta"], noise=noise))
    else:
        fixed = "fixed_small" if case.get("sigma_small") else "fixed_large"
        variance = "learned_range" if learned else fixed
        steps = list(ancestral(denoiser, schedule, golden["x_T"], times, variance=variance, noise=noise))
    for kind, values in (("x", [step.x_next for step in steps]), ("pred_xstart", [step.x0 for step in steps])):
        expected = golden[f"{name}/{kind}_each_step"]
        torch.testing.assert_close(torch.stack(values), expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    torch.testing.assert_close(steps[-1].x_next, golden[f"{name}/sample"], rtol=0, atol=2e-4)


def test_slopes_count_the_respaced_index():
    """lambda = k i + b with i = 0 at the last evaluation, on ADM's 20 of 1000 times; means as published (b + 9.5 k)."""
    assert VP.time_to_net(TIMES[:-1]).flip(0).tolist()[:6] == [0, 53, 105, 158, 210, 263]
    denoiser = NetworkDenoiser(toy, VP, Target("eps"))
    for k, b, mean in (
        (0.0008, 1.0034, 1.0110),
        (0.0004, 1.0042, 1.0080),
        (0.0002, 1.0041, 1.0060),
        (0.00022, 1.00291, 1.0050),
    ):
        factors = scaled(denoiser, VP, EpsilonScaling(b, k), TIMES).factor(TIMES[:-1])
        torch.testing.assert_close(factors, b + k * torch.arange(19, -1, -1, dtype=F64), rtol=0, atol=1e-12)
        assert float(factors.mean()) == pytest.approx(mean, abs=5e-5)
    between = scaled(denoiser, VP, EpsilonScaling(1.0, 0.1), TIMES).factor(torch.tensor([28.0, 1.0, 0.0, 1000.0]))
    torch.testing.assert_close(between, torch.tensor([1 + 0.1 * 27 / 53, 1.0, 1.0, 2.9], dtype=F64))


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_lambda_one_changes_no_bit(sampler):
    plain = NetworkDenoiser(toy, VP, Target("eps"))
    assert scaled(plain, VP, EpsilonScaling(1.0, 0.0), TIMES) is plain
    assert scaled(plain, VP, EpsilonScaling(table=((-1.0, 1.0), (2.0, 1.0))), TIMES) is plain
    elsewhere = scaled(plain, VP, EpsilonScaling(1.1, window=(1e4, 1e5)), TIMES)
    assert isinstance(elsewhere, ScaledDenoiser)
    assert torch.equal(sample(sampler, elsewhere), sample(sampler, plain))


@dataclass(frozen=True)
class OwnScaling:
    """A network that divides its own noise by k (-log SNR) + b, which is what scaling should come to."""

    schedule: VPSchedule | FlowSchedule | EDMSchedule
    b: float
    k: float
    target: str = "eps"

    def __call__(self, x, t, cond):
        u = t[:1].double() + 1 if isinstance(self.schedule, VPSchedule) else t[:1].double()
        out, factor = toy(x, t, cond), self.b + (self.k and float(self.k * noise_level(self.schedule, u)))
        if self.target == "eps":
            return out / factor
        if float(u) == 1:
            return out
        eps = x + (1 - float(u)) * out
        return (eps / factor - x) / (1 - float(u))


@pytest.mark.parametrize(("guidance", "b"), [(1.0, 1.02), (3.0, 0.99)])
@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_every_evaluation_is_scaled_once_after_guidance(sampler, b, guidance):
    """Scaling the guided noise equals guiding networks whose noise is scaled: guidance is linear."""
    k, cond = 0.001, torch.tensor([0, 1])
    denoisers = (NetworkDenoiser(network, VP, Target("eps"), cond) for network in (toy, OwnScaling(VP, b, k)))
    ours, theirs = (guided(denoiser, torch.full((2,), 2), guidance) for denoiser in denoisers)
    ours = scaled(ours, VP, EpsilonScaling(b, k, unit="log_snr"), TIMES)
    expected = sample(sampler, theirs)
    assert not torch.allclose(expected, sample(sampler, ours.denoiser), atol=1e-3), "scaling acts"
    # Times half-way reach the network rounded to float32.
    torch.testing.assert_close(sample(sampler, ours), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "Midpoint", "RK4", "PLMS"])
def test_a_flow_is_scaled_but_for_its_first_point(sampler):
    schedule = FlowSchedule()
    times, scaling = make_times(schedule, 8), EpsilonScaling(1.03)
    ours = scaled(NetworkDenoiser(toy, schedule, Target("velocity")), schedule, scaling, times)
    assert ours.factor(1.0) == 1 and ours.factor(0.999) == ours.factor(0.0) == 1.03
    theirs = NetworkDenoiser(OwnScaling(schedule, 1.03, 0.0, "velocity"), schedule, Target("velocity"))
    expected = sample(sampler, theirs, schedule, times)
    torch.testing.assert_close(sample(sampler, ours, schedule, times), expected, rtol=0, atol=1e-6)
    level = scaled(ours.denoiser, schedule, EpsilonScaling(1.0, 0.01, unit="log_snr"), times)
    assert level.factor(0.5) == 1 and torch.isfinite(level.factor(times)).all()
    assert float(level.factor(0.0)) == pytest.approx(1 + 0.02 * math.log(1 / 7)), "clean data: the times' last level"


def test_heun_scales_both_stages_as_edm_es():
    """EDM-ES's loop: the slope (x - D) / sigma is divided by lambda at the Euler and at the correction stage."""
    schedule, network, factor = EDMSchedule(), edm_toy(), 1.01
    denoiser = NetworkDenoiser(network, schedule, Target("edm"), dtype=torch.float32)
    times = make_times(schedule, 9)
    x = draw(2, 3, 8, 8) * times[0]
    ours = run(heun(scaled(denoiser, schedule, EpsilonScaling(factor), times), schedule, x, times))
    for sigma, after in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        slope = (x - denoiser(x, sigma).x0) / sigma / factor
        ahead = x + (after - sigma) * slope
        if after:
            slope = (slope + (ahead - denoiser(ahead, after).x0) / after / factor) / 2
        x = x + (after - sigma) * slope
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-9)


def test_a_shift_of_the_mean_is_not_scaled():
    """ADM's classifier guidance: variance times gradient on top of the scaled mean."""
    denoiser = scaled(NetworkDenoiser(toy, VP, Target("eps")), VP, EpsilonScaling(1.05), TIMES)
    x = draw(2, 1, 2, 4)
    plain = next(ancestral(denoiser, VP, x, TIMES, noise=NOISE))
    moved = next(ancestral(denoiser, VP, x, TIMES, noise=NOISE, mean_shift=lambda x, u, variance: variance * x.cos()))
    w = float(plain.transition.w)
    torch.testing.assert_close(moved.x_next - plain.x_next, w * x.cos(), rtol=0, atol=1e-12)
    eps = toy(x, None) / 1.05
    alpha, sigma = VP.coefficients(1000.0, x)
    torch.testing.assert_close(plain.x0, (x - sigma * eps) / alpha, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_x0_only_is_the_other_published_ddim(eta):
    """LDM-ES: x_0 from eps / lambda, the direction from eps as predicted."""
    scaling = EpsilonScaling(1.03, direction="x0_only")
    x, factor = draw(2, 1, 2, 4), 1.03
    ours = sample("DDIM", scaled(NetworkDenoiser(toy, VP, Target("eps")), VP, scaling, TIMES), eta=eta)
    for index, (u, s) in enumerate(zip(TIMES[:-1].tolist(), TIMES[1:].tolist(), strict=True)):
        eps, a, a_prev = toy(x, None), VP.alpha(u) ** 2, VP.alpha(s) ** 2
        sd = eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()
        x0 = (x - (1 - a).sqrt() * eps / factor) / a.sqrt()
        x = a_prev.sqrt() * x0 + (1 - a_prev - sd**2).sqrt() * eps + sd * NOISE(index, x.shape).to(x)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"'x0_only' .* PLMS derives one of them from the other"):
        scaling.check_sampler("PLMS")
    scaling.check_sampler("DDIM")
    EpsilonScaling(1.03).check_sampler("PLMS")


def test_clipping_after_x0_only_is_clipping_after_full():
    x, plain = draw(2, 1, 2, 4), NetworkDenoiser(toy, VP, Target("eps"))
    one, other = (
        clipped(scaled(plain, VP, EpsilonScaling(1.03, direction=direction), TIMES), VP)(x, 400.0)
        for direction in ("full", "x0_only")
    )
    torch.testing.assert_close(one.eps, other.eps, rtol=0, atol=1e-12)
    assert float(one.x0.abs().max()) <= 1


@pytest.mark.parametrize(
    "schedule", [VP, LinearVPSchedule(), EDMSchedule(), FlowSchedule()], ids=lambda schedule: type(schedule).__name__
)
def test_full_keeps_the_state_and_times_may_differ_in_a_batch(schedule):
    times, x = make_times(schedule, 10), draw(3, 1, 2, 3)
    denoiser = GaussianDenoiser(schedule, draw(1, 2, 3, seed=2), draw(1, 2, 3, seed=3) ** 2)
    ours = scaled(denoiser, schedule, EpsilonScaling(1.0, 0.01), times)
    each_time = times[[1, 5, 9]]
    together = ours(x, each_time)
    torch.testing.assert_close(schedule.noised(together.x0, together.eps, each_time), x, rtol=0, atol=1e-8)
    for index, u in enumerate(each_time.tolist()):
        alone = ours(x[index : index + 1], u)
        torch.testing.assert_close(alone.eps[0], together.eps[index], rtol=0, atol=1e-12)
        expected = denoiser(x, u).eps[index] / (1 + 0.01 * [8, 4, 0][index])
        torch.testing.assert_close(alone.eps[0], expected, rtol=0, atol=1e-12)


def test_the_window_is_in_noise_for_each_unit_of_data():
    times, schedule = make_times(EDMSchedule(), 18), EDMSchedule()
    ours = scaled(
        GaussianDenoiser(schedule, draw(1, 1, 2), draw(1, 1, 2) ** 2),
        schedule,
        EpsilonScaling(1.1, window=(1, 20)),
        times,
    )
    active = (times >= 1) & (times <= 20)
    assert 1 < active.sum() < 17
    assert torch.equal(ours.factor(times), 1 + 0.1 * active.double())


def test_log_snr_carries_over_between_step_counts_and_midpoints():
    scaling, plain = EpsilonScaling(1.01, 0.002, unit="log_snr"), NetworkDenoiser(toy, VP, Target("eps"))
    times = torch.tensor([1.0, 333.3, 1000.0], dtype=F64)
    factors = [scaled(plain, VP, scaling, make_times(VP, steps)).factor(times) for steps in (10, 50)]
    assert torch.equal(*factors)
    abar = VP.alpha(times) ** 2
    torch.testing.assert_close(factors[0], 1.01 + 0.002 * ((1 - abar) / abar).log())
    seen = []
    ours = scaled(plain, VP, EpsilonScaling(1.0, 0.1), TIMES)
    run(midpoint(lambda x, u: (seen.append(float(ours.factor(u))), ours(x, u))[1], VP, draw(1, 1, 2, 2), TIMES))
    assert len(seen) == 40 and all(a > b for a, b in itertools.pairwise(seen[:-1]))


def test_variances_of_eps_are_divided_by_lambda_squared():
    """The spread of scaled members is the formula's; the fraction of a learned variance stays."""
    members, var_fraction = draw(5, 2, 1, 2, 3), draw(2, 1, 2, 3).sigmoid()
    u = torch.tensor([100.0, 700.0], dtype=F64)
    ours = scaled(lambda x, u: Prediction(members, members, var_fraction), VP, EpsilonScaling(1.0, 0.02), TIMES)
    prediction = ours(draw(2, 1, 2, 3), u)
    torch.testing.assert_close(prediction.eps.var(0), ours.eps_variance(members.var(0), u))
    assert prediction.var_fraction is var_fraction


def test_tables_are_read_by_noise_level():
    schedule, times = FlowSchedule(), make_times(FlowSchedule(), 8)
    factors = torch.linspace(1.04, 0.98, 8, dtype=F64)
    scaling, plain = tabulated(schedule, times, factors), NetworkDenoiser(toy, schedule, Target("velocity"))
    ours = scaled(plain, schedule, scaling, times)
    torch.testing.assert_close(ours.factor(times[1:-1]), factors[1:], rtol=0, atol=1e-12)
    assert ours.factor(1.0) == 1
    middle = float(schedule.time_at((schedule.ratio(times[2]) * schedule.ratio(times[3])).sqrt()))
    assert float(ours.factor(middle)) == pytest.approx(float(factors[2:4].mean()))
    other = scaled(plain, VP, scaling, TIMES)
    assert float(other.factor(1.0)) == pytest.approx(0.98) and float(other.factor(1000.0)) == pytest.approx(factors[1])


@pytest.mark.parametrize(
    "scaling",
    [
        EpsilonScaling(0.9985, 1e-5),
        EpsilonScaling(1.01, unit="log_snr", direction="x0_only", window=(0.1, 20.0)),
        EpsilonScaling(table=((-3.0, 0.99), (4.5, 1.02))),
    ],
)
def test_schedule_files(tmp_path, scaling):
    save_scaling(scaling, tmp_path / "es.yaml")
    assert load_scaling(tmp_path / "es.yaml") == scaling
    with pytest.raises(FileExistsError):
        save_scaling(scaling, tmp_path / "es.yaml")
    (tmp_path / "es.json").write_text(json.dumps({"format": 1, "b": scaling.b, "k": scaling.k}))
    assert load_scaling(tmp_path / "es.json") == EpsilonScaling(scaling.b, scaling.k)
    (tmp_path / "bad.yaml").write_text("format: 1\neps_scaler: 1.0\n")
    with pytest.raises(ValueError, match=r"bad\.yaml: epsilon scaling has no \['eps_scaler'\]"):
        load_scaling(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("b: 1.0\n")
    with pytest.raises(ValueError, match="is no schedule"):
        load_scaling(tmp_path / "bad.yaml")
    with pytest.raises(FileNotFoundError):
        load_scaling(tmp_path / "none.yaml")


def test_published_entries_by_number_of_steps():
    entries = [{"steps": 100, "b": 1.017}, {"steps": 20, "b": 1.017}, {"steps": 20, "b": 1.0, "k": 0.0025}]
    assert published_scaling(entries, 20) == EpsilonScaling(1.017)
    assert published_scaling(entries, 20, linear=True) == EpsilonScaling(1.0, 0.0025)
    with pytest.raises(ValueError, match=r"no published linear scaling for 100 steps"):
        published_scaling(entries, 100, linear=True)
    own = [{"sampler": "Heun", "steps": 18, "b": 1.0005}, {"sampler": "Euler", "steps": 18, "b": 1.0034}]
    assert published_scaling(own, 18, sampler="Euler") == EpsilonScaling(1.0034)
    assert published_scaling(entries, 20, sampler="Euler") == EpsilonScaling(1.017)
    with pytest.raises(ValueError, match=r"18 steps of DDIM.*'uniform', 'Euler'"):
        published_scaling(own, 18, sampler="DDIM")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"b": 0.0}, "b must be positive"),
        ({"b": float("nan")}, "b must be positive"),
        ({"unit": "steps"}, "unit must be one of"),
        ({"direction": "eps"}, "direction must be one of"),
        ({"window": [2.0, 1.0]}, "window must be"),
        ({"table": [[1.0, 1.0], [0.0, 1.0]]}, "ascend"),
        ({"table": [[1.0, 0.0]]}, "must be positive"),
        ({"table": [[1.0, 1.1]], "b": 1.2}, "replaces"),
        ({"scale": 1.0}, "has no"),
        ({"b": "abc"}, "b must be a number, got the word 'abc'"),
        ({"b": True}, "b must be a number"),
        ({"window": 2.0}, "window must be a list"),
        ({"table": [1.0]}, "table must be a list"),
        ({"table": [[1.0, {}]]}, "table must be a list"),
    ],
)
def test_bad_schedules(values, message):
    with pytest.raises(ValueError, match=message):
        scaling_from(values)


def test_wrong_orders_and_factors_are_refused():
    plain = NetworkDenoiser(toy, VP, Target("eps"))
    once = scaled(plain, VP, EpsilonScaling(1.01), TIMES)
    with pytest.raises(ValueError, match="scaled already"):
        scaled(once, VP, EpsilonScaling(1.01), TIMES)
    with pytest.raises(ValueError, match="before clipping"):
        scaled(clipped(plain, VP), VP, EpsilonScaling(1.01), TIMES)
    with pytest.raises(ValueError, match=r"must be positive at every step, got -0\.9"):
        scaled(plain, VP, EpsilonScaling(1.0, -0.1), TIMES)
    with pytest.raises(ValueError, match="one lambda for each step"):
        tabulated(VP, TIMES, torch.ones(19))
    with pytest.raises(ValueError, match="take more steps"):
        tabulated(FlowSchedule(), make_times(FlowSchedule(), 1), torch.ones(1))
