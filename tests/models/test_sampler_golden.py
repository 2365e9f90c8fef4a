"""Samplers against published runs on closed-form networks: EDM's Heun and ablations, ADM's ancestral and DDIM."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.denoiser import NetworkDenoiser, Target, clipped
from ldm.diffusion.ode.own_time import euler_in_time, heun_in_time
from ldm.diffusion.samplers import ancestral, ddim, heun, make_times, midpoint, run
from ldm.diffusion.schedule import EDMSchedule, LinearVPSchedule, VESchedule, VPSchedule, make_betas
from ldm.diffusion.translated import TranslatedDenoiser
from tests.conftest import golden_json, golden_tensors
from tests.models.toys import CosineTimes, edm_toy, es_toy, es_toy_learned, iddpm_toy, ve_toy, vp_toy

EDM, CHURN = EDMSchedule(), {"S_churn": 40, "S_min": 0.05, "S_max": 50, "S_noise": 1.003}
VP, VE = LinearVPSchedule(), VESchedule()
VP_CHURN = {"S_churn": 30, "S_min": 0.01, "S_max": 1, "S_noise": 1.007}
# name -> (schedule, solver, options): ablations that step in another variable than sigma.
TIME_RUNS = {
    "abl_vp_euler": (VP, euler_in_time, {}),
    "abl_vp_heun": (VP, heun_in_time, {}),
    "abl_vp_heun_churn": (VP, heun_in_time, VP_CHURN),
    "abl_ve_euler": (VE, euler_in_time, {}),
    "abl_ve_heun": (VE, heun_in_time, {}),
}
# name -> (solver, options).
EDM_RUNS = {
    "edm18": (heun, {}),
    "edm18_labels": (heun, {}),
    "edm18_churn": (heun, CHURN),
    "edm18_range": (heun, {}),
    "edm18_on_vp_net": (heun, {}),
    "edm18_on_iddpm_net": (heun, {}),
    "abl_edm_heun": (heun, {}),
    "abl_edm_euler": (ddim, {}),
    "abl_edm_alpha0.5": (midpoint, {"euler_end": True}),
    "abl_iddpm_heun": (heun, {}),
}
ADM_RUNS = ("ddim20", "ddim20_noclip", "ddim20_eta1")
ADM_RUNS += ("ddpm20_fixedlarge", "ddpm20_fixedsmall", "ddpm20_learned", "ddpm20_learned_cosine")


def edm_denoiser(name, golden, calls):
    """Our denoiser of a case, writing the noise level of each evaluation to `calls`."""
    if name.endswith("vp_net"):
        vp = LinearVPSchedule()
        inner = TranslatedDenoiser(NetworkDenoiser(vp_toy, vp, Target("eps"), dtype=torch.float32), vp, EDM)
    elif "iddpm" in name:
        table = CosineTimes(make_betas("cosine", 1000))
        inner = TranslatedDenoiser(NetworkDenoiser(iddpm_toy, table, Target("eps"), dtype=torch.float32), table, EDM)
    else:
        labels = golden["labels_onehot"] if name.endswith("labels") else None
        inner = NetworkDenoiser(edm_toy(), EDM, Target("edm"), labels, dtype=torch.float32)

    def denoiser(x, u):
        calls.append(u)
        return inner(x, u)

    return denoiser


@pytest.mark.parametrize("name", EDM_RUNS)
def test_edm_runs(name):
    golden, calls = golden_tensors("edm"), []
    solver, options = EDM_RUNS[name]
    sigmas = torch.cat([golden[f"{name}/sigma_grid_rounded"], torch.zeros(1, dtype=torch.float64)])
    if options is CHURN:
        draws = golden[f"{name}/noise_each_step_float64"]
        options = {**options, "noise": lambda index, shape: draws[index]}
    x = golden["latents"].double() * sigmas[0]
    samples = run(solver(edm_denoiser(name, golden, calls), EDM, x, sigmas, **options))
    assert samples.dtype == torch.float64
    expected = golden[f"{name}/out"]
    # The published preconditioning rounds to float32, here only the network does.
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    evaluated = golden[f"{name}/sigma_of_each_network_call"]
    assert len(calls) == golden_json("edm")["samplers"][name]["nfe"]
    torch.testing.assert_close(torch.tensor(calls, dtype=torch.float64), evaluated, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", TIME_RUNS)
def test_edm_runs_in_other_variables(name):
    golden, calls = golden_tensors("edm"), []
    schedule, solver, options = TIME_RUNS[name]
    sigmas = golden[f"{name}/sigma_grid_rounded"]
    times = torch.cat([schedule.time_at(sigmas), torch.zeros(1, dtype=torch.float64)])
    if options:
        draws = golden[f"{name}/noise_each_step_float64"]
        options = {**options, "noise": lambda index, shape: draws[index]}
    inner = NetworkDenoiser(vp_toy if schedule is VP else ve_toy, schedule, Target("eps"), dtype=torch.float32)

    def denoiser(x, u):
        calls.append(float(schedule.ratio(u)))
        return inner(x, u)

    x = golden["latents"].double() * sigmas[0] * schedule.alpha(times[0])
    samples = run(solver(denoiser, schedule, x, times, **options))
    expected = golden[f"{name}/out"]
    torch.testing.assert_close(samples, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    evaluated = golden[f"{name}/sigma_of_each_network_call"]
    assert len(calls) == golden_json("edm")["samplers"][name]["nfe"]
    torch.testing.assert_close(torch.tensor(calls, dtype=torch.float64), evaluated, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["edm", "vp", "ve"])
def test_edm_losses(name):
    """Weighted errors of D are errors of what is regressed: F of EDM's table, or the noise."""
    golden = golden_tensors("edm")
    x0, eps, scalar = (golden[f"loss/{key}"] for key in ("images", f"{name}/unit_noise", f"{name}/random_scalar"))
    if name == "edm":
        schedule, target, network = EDM, Target("edm"), edm_toy()
        u = (-1.2 + 1.2 * scalar.double()).exp()
    else:
        schedule, target, network = (VP, Target("eps"), vp_toy) if name == "vp" else (VE, Target("eps"), ve_toy)
        u = 1 + scalar.double() * (1e-5 - 1) if name == "vp" else schedule.time_at(0.02 * 5000.0 ** scalar.double())
    alpha, sigma = schedule.coefficients(u.flatten(), x0)
    inputs = target.coefficients(alpha, sigma)[2] * (alpha * x0 + sigma * eps)
    output = network(inputs, schedule.time_to_net(u.flatten()).float(), None)
    loss = (output - target.of(x0, eps, alpha, sigma)).square()
    expected = golden[f"loss/{name}/loss_elementwise"]
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=2e-4 * expected.abs().max().item())
    torch.testing.assert_close(loss.mean(), golden[f"loss/{name}/mean"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ADM_RUNS)
def test_adm_runs(name):
    name = f"{name}_es1.0"
    golden, case = golden_tensors("es"), golden_json("es")["cases"][name]
    schedule = VPSchedule(golden[f"schedule/betas_{case.get('schedule', 'linear')}_1000"])
    learned = case.get("learn_sigma", False)
    denoiser = NetworkDenoiser(es_toy_learned if learned else es_toy, schedule, Target("eps"), learned_range=learned)
    if case["clip_denoised"]:
        denoiser = clipped(denoiser, schedule)
    draws = golden.get(f"{name}/noise_each_step")
    noise = None if draws is None else lambda index, shape: draws[index]
    times = make_times(schedule, case["timestep_respacing"])
    if case["sampler"] == "ddim":
        steps = ddim(denoiser, schedule, golden["x_T"], times, eta=case["eta"], noise=noise)
    else:
        small = "fixed_small" if case.get("sigma_small") else "fixed_large"
        variance = "learned_range" if learned else small
        steps = ancestral(denoiser, schedule, golden["x_T"], times, variance=variance, noise=noise)
    seen = list(steps)
    assert schedule.time_to_net(times[:-1]).tolist() == case["timesteps_executed"]
    for kind, values in (("x", [step.x_next for step in seen]), ("pred_xstart", [step.x0 for step in seen])):
        expected = golden[f"{name}/{kind}_each_step"]
        torch.testing.assert_close(torch.stack(values), expected, rtol=0, atol=2e-5 * expected.abs().max().item())
