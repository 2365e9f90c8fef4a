"""k-diffusion's samplers, noise grids and singlestep DPM-Solver against recorded runs on two closed-form denoisers."""

import math
from functools import cache

import pytest
import torch

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.levels import vp_levels
from ldm.diffusion.noise import index_between
from ldm.diffusion.samplers import make_sampler, make_times, run
from ldm.diffusion.schedule import EDMSchedule, VPSchedule, make_betas
from tests.conftest import golden_json, golden_tensors

F64 = torch.float64
EDM = EDMSchedule()
NAME = "kdiff_schedules"
DENOISERS = ("gauss", "two")
CHURN = {"S_churn": 4.0, "S_min": 0.1, "S_max": 8.0, "S_noise": 1.003}
# The run's name -> our sampler and its options.
RUNS = {
    "euler": ("euler", {}),
    "heun": ("heun", {}),
    "dpm_2": ("dpm_2", {}),
    "lms_order4": ("lms", {}),
    "lms_order2": ("lms", {"order": 2}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "heun_churn": ("heun", CHURN),
    "euler_churn": ("euler", CHURN),
    "dpm_2_churn": ("dpm_2", CHURN),
    "euler_ancestral_eta1": ("euler_ancestral", {}),
    "euler_ancestral_eta0.5_snoise1.1": ("euler_ancestral", {"eta": 0.5, "S_noise": 1.1}),
    "dpm_2_ancestral": ("dpm_2_ancestral", {}),
    "dpmpp_2s_ancestral_eta1": ("dpmpp_2s_ancestral", {}),
    "dpmpp_2s_ancestral_eta0.4": ("dpmpp_2s_ancestral", {"eta": 0.4}),
    "dpmpp_2s_eta0": ("dpmpp_2s_ancestral", {"eta": 0.0}),
    "dpmpp_sde": ("dpmpp_sde", {}),
    "dpmpp_sde_eta0.5": ("dpmpp_sde", {"eta": 0.5}),
    "dpmpp_2m_sde_midpoint": ("dpmpp_2m_sde", {}),
    "dpmpp_2m_sde_heun": ("dpmpp_2m_sde", {"solver_type": "heun"}),
    "dpmpp_2m_sde_eta0": ("dpmpp_2m_sde", {"eta": 0.0}),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}),
}


@cache
def read():
    """The recorded tensors."""
    return golden_tensors(f"{NAME}_io")


def closed_form(kind, schedule, calls=None):
    """A denoiser of the golden: of Gaussian data, or of +1 and -1; it writes (u, x) of its calls."""
    golden = read()
    mean, variance = golden["denoiser/mu"], golden["denoiser/s"] ** 2

    def denoiser(x, u):
        if calls is not None:
            calls.append((u, x))
        alpha, sigma = schedule.coefficients(u, x)
        y, level = x / alpha, sigma / alpha
        gauss = mean + variance / (variance + level**2) * (y - mean)
        x0 = gauss if kind == "gauss" else torch.tanh(y / level**2)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoiser


def recorded(rows, times, twice):
    """The draws of a run; of a step that draws twice the second one, and what is independent of it in the first."""
    if not twice:
        return lambda index, shape: rows[index]

    def noise(index, shape):
        if index < len(times):
            return rows[2 * index + 1]
        step = index - index_between(0)
        begin, end = times[step], times[step + 1]
        middle = math.sqrt(begin * end)
        share = math.sqrt((begin - middle) / (begin - end))
        first, second = rows[2 * step], rows[2 * step + 1]
        return (first - share * second) / math.sqrt(1 - share**2)

    return noise


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("name", [*RUNS, "brownian/dpmpp_sde", "brownian/dpmpp_2m_sde_midpoint"])
def test_runs_are_the_recorded_ones_step_by_step(name, kind):
    golden = read()
    where, _, name = name.rpartition("/")
    sampler, options = RUNS[name]
    rows = golden[f"{where}/{name}/noise_calls"] if where else golden["run/noise"]
    times = golden["run/sigmas"]
    noise = recorded(rows, times.tolist(), sampler == "dpmpp_sde")
    x = golden["x_unit"] * times[0]
    steps = list(make_sampler(sampler, **options)(closed_form(kind, EDM), EDM, x, times, noise=noise))
    prefix = f"{where or 'run'}/{kind}/{name}"
    states = torch.stack([step.x for step in steps])
    torch.testing.assert_close(states, golden[f"{prefix}/x"], rtol=0, atol=1e-11)
    torch.testing.assert_close(steps[-1].x_next, golden[f"{prefix}/final"], rtol=0, atol=1e-11)


def test_recorded_draws_of_one_step_are_as_correlated_as_ours():
    """Over steps and elements of the Brownian record, the correlation is the share of the path that the two have."""
    golden = read()
    rows, pairs = golden["brownian/dpmpp_sde/noise_calls"], golden["brownian/dpmpp_sde/sigma_pairs"]
    independent = recorded(rows, golden["run/sigmas"].tolist(), True)
    own = torch.stack([independent(index_between(index), None) for index in range(7)]).flatten()
    last = rows[1::2].flatten()
    assert pairs[0, 0] == pairs[1, 0] and abs(float((own * last).mean())) < 3 / len(own) ** 0.5
    assert float((rows[0::2] * rows[1::2]).mean()) > 0.5
    assert abs(float(own.square().mean()) - 1) < 3 * (2 / len(own)) ** 0.5


@pytest.mark.parametrize("case", [name for name in golden_json(NAME)["io"]["tensors"] if name.startswith("grid/")])
def test_noise_grids(case):
    expected = read()[case].double()
    _, kind, range_ = case.split("/")
    count, *rest = range_.split("_")
    steps = int(count[1:])
    if kind == "vp":
        levels = vp_levels(steps, 10.0, 0.2, 0.01) if rest else vp_levels(steps)
    else:
        spacing, _, rho = kind.partition("_rho")
        low, high = (float(level) for level in rest)
        rho = float(rho) if rho else None
        levels = make_times(EDM, steps, spacing, rho=rho, sigma_min=low, sigma_max=high)[:-1]
    assert expected[-1] == 0
    # The published grids are float32; that of vp loses digits in exp(..) - 1.
    torch.testing.assert_close(levels, expected[:-1], rtol=3e-4 if kind == "vp" else 6e-6, atol=0)


TABLES = {
    "linear": VPSchedule(make_betas("sqrt_linear", 1000, 1e-4, 0.02)),
    "scaled_linear": VPSchedule(make_betas("linear", 1000, 0.00085, 0.012)),
}


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("table", TABLES)
def test_bayesdiffs_second_order_steps(table, kind):
    golden, schedule = read(), TABLES[table]
    times = make_times(schedule, 5, "logsnr")
    torch.testing.assert_close(times / 1000, golden[f"vp_singlestep/{table}/t"].double(), rtol=0, atol=1e-5)
    states = golden[f"vp_singlestep/{table}/{kind}/bd_order2/x"].double()
    steps = list(make_sampler("DPM-Solver-2")(closed_form(kind, schedule), schedule, states[0], times))
    torch.testing.assert_close(torch.stack([step.x_next for step in steps]), states[1:], rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("evaluations", "order"), [(10, 2), (9, 3), (10, 3), (11, 3)])
def test_singlestep_solvers_on_a_table(table, kind, evaluations, order):
    golden, schedule = read(), TABLES[table]
    prefix, case = f"vp_singlestep/{table}", f"sd_nfe{evaluations}_order{order}"
    x = golden[f"{prefix}/{kind}/{case}/calls_x"].double()
    calls, steps = [], evaluations // 2 if order == 2 else evaluations // 3 + 1
    fast = make_sampler("DPM-Solver-fast", remainder=evaluations % 3)
    sampler = make_sampler("DPM-Solver-2") if order == 2 else fast
    times = make_times(schedule, steps, "logsnr")
    end = run(sampler(closed_form(kind, schedule, calls), schedule, x[0], times))
    asked = torch.tensor([u for u, _ in calls], dtype=F64)
    torch.testing.assert_close(asked / 1000, golden[f"{prefix}/{case}/calls_t"], rtol=0, atol=1e-5)
    # Their table and its inverse are float32.
    torch.testing.assert_close(torch.stack([x for _, x in calls]), x, rtol=0, atol=3e-4)
    torch.testing.assert_close(end, golden[f"{prefix}/{kind}/{case}/final"].double(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("evaluations", [6, 7, 8])
def test_dpm_fast(kind, evaluations):
    golden, name = read(), f"dpm_fast_nfe{evaluations}"
    times = make_times(EDM, evaluations // 3 + 1, "logsnr", sigma_min=0.05, sigma_max=10.0)
    torch.testing.assert_close(times, golden[f"run/{name}/sigma"], rtol=1e-6, atol=0)
    calls, sampler = [], make_sampler("dpm_fast", remainder=evaluations % 3)
    steps = list(sampler(closed_form(kind, EDM, calls), EDM, golden["x_unit"] * 10, times))
    assert len(calls) == evaluations
    states = torch.stack([step.x for step in steps])
    torch.testing.assert_close(states, golden[f"run/{kind}/{name}/x"], rtol=0, atol=1e-5)
    torch.testing.assert_close(steps[-1].x_next, golden[f"run/{kind}/{name}/final"], rtol=0, atol=1e-5)


# sample_dpm_adaptive of k-diffusion 0.1.1 in float64 from 10 x_unit[:1] to 0.05: steps that it tried and accepted, and
# the first three elements of the end.
CONTROLLED = {"pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1}
EAGER = {"order": 2, "rtol": 0.01, "accept_safety": 0.6, "h_init": 1.0}
ADAPTIVE_RUNS = [
    ("gauss", {}, 8, 7, (-0.562980337, 0.323440623, 0.006900982)),
    ("gauss", {"order": 2}, 12, 10, (-0.557948422, 0.323660239, 0.008152549)),
    ("gauss", {"rtol": 0.005, "atol": 0.0005}, 13, 11, (-0.526423952, 0.325533756, 0.004191894)),
    ("gauss", CONTROLLED, 7, 7, (-0.534416887, 0.32505382, 0.005141971)),
    ("gauss", EAGER, 11, 10, (-0.540984946, 0.324655574, 0.006180616)),
    ("two", {}, 12, 9, (-1.052174859, -0.906815968, 0.920958286)),
    ("two", {"order": 2}, 19, 14, (-1.053912889, -0.905305364, 0.923348626)),
    ("two", CONTROLLED, 11, 9, (-1.051939446, -0.910780241, 0.921620148)),
    ("two", EAGER, 14, 13, (-1.053073733, -0.905658973, 0.923728807)),
]


@pytest.mark.parametrize(("kind", "options", "tried", "accepted", "end"), ADAPTIVE_RUNS)
def test_dpm_adaptive(kind, options, tried, accepted, end):
    calls, times = [], make_times(EDM, 1, "logsnr", sigma_min=0.05, sigma_max=10.0)
    x = read()["x_unit"][:1] * 10
    found = run(make_sampler("dpm_adaptive", **options)(closed_form(kind, EDM, calls), EDM, x, times))
    torch.testing.assert_close(found.flatten()[:3], torch.tensor(end, dtype=F64), rtol=0, atol=1e-8)
    # A step that is tried again keeps its evaluation at the beginning, which theirs repeats.
    assert len(calls) == options.get("order", 3) * tried - (tried - accepted)
