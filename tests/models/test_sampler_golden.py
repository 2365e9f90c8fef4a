"""Samplers against published runs on closed-form networks: EDM's Heun and ablations, ADM's ancestral and DDIM."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.denoiser import NetworkDenoiser, Target, TranslatedDenoiser, clipped
from ldm.models.diffusion.path import EDMPath, LinearVPPath, VPPath, beta_schedule
from ldm.models.diffusion.sampler import ancestral, ddim, heun, make_grid, midpoint, run
from tests.conftest import golden_json, golden_tensors
from tests.models.toys import CosineTimes, edm_toy, es_toy, es_toy_learned, iddpm_toy, vp_toy

EDM, CHURN = EDMPath(), {"S_churn": 40, "S_min": 0.05, "S_max": 50, "S_noise": 1.003}
# name -> (solver, options). Left out: ablations that step in another variable than sigma (abl_vp_*, abl_ve_*).
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
        vp = LinearVPPath()
        inner = TranslatedDenoiser(NetworkDenoiser(vp_toy, vp, Target("eps"), dtype=torch.float32), vp, EDM)
    elif "iddpm" in name:
        table = CosineTimes(beta_schedule("cosine", 1000))
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


@pytest.mark.parametrize("name", ADM_RUNS)
def test_adm_runs(name):
    name = f"{name}_es1.0"
    golden, case = golden_tensors("es"), golden_json("es")["cases"][name]
    path = VPPath(golden[f"schedule/betas_{case.get('schedule', 'linear')}_1000"])
    learned = case.get("learn_sigma", False)
    denoiser = NetworkDenoiser(es_toy_learned if learned else es_toy, path, Target("eps"), learned_range=learned)
    if case["clip_denoised"]:
        denoiser = clipped(denoiser, path)
    draws = golden.get(f"{name}/noise_each_step")
    noise = None if draws is None else lambda index, shape: draws[index]
    grid = make_grid(path, case["timestep_respacing"])
    if case["sampler"] == "ddim":
        steps = ddim(denoiser, path, golden["x_T"], grid, eta=case["eta"], noise=noise)
    else:
        small = "fixed_small" if case.get("sigma_small") else "fixed_large"
        variance = "learned_range" if learned else small
        steps = ancestral(denoiser, path, golden["x_T"], grid, variance=variance, noise=noise)
    seen = list(steps)
    assert path.time_to_net(grid[:-1]).tolist() == case["timesteps_executed"]
    for kind, values in (("x", [step.x_next for step in seen]), ("pred_xstart", [step.x0 for step in seen])):
        expected = golden[f"{name}/{kind}_each_step"]
        torch.testing.assert_close(torch.stack(values), expected, rtol=0, atol=2e-5 * expected.abs().max().item())
