"""Denoisers: the 2x2 solve against x = alpha x_0 + sigma eps, EDM's formulas and the published preconditioning."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.diffusion.denoiser import (
    TARGETS,
    GuidedDenoiser,
    MappedDenoiser,
    NetworkDenoiser,
    Target,
    clipped,
    guided,
)
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule, VESchedule, VPSchedule, make_betas
from ldm.diffusion.translated import TranslatedDenoiser
from tests.conftest import golden_tensors
from tests.models.toys import CosineTimes, HalfLogPath, edm_toy, iddpm_toy, ve_toy, vp_toy

F64 = torch.float64
PATHS = [VPSchedule(make_betas("linear", 1000)), LinearVPSchedule(), EDMSchedule(), FlowSchedule()]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", PATHS, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("name", TARGETS)
def test_a_network_that_gives_the_target_gives_back_both_parts(name, schedule):
    x0, eps, u = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1), torch.tensor([0.2, 0.9], dtype=F64) * schedule.end
    target = Target(name)
    alpha, sigma = schedule.per_image(u)
    x = schedule.noised(x0, eps, u)

    def network(x_in, t, cond):
        scale = target.coefficients(alpha, sigma)[2]
        torch.testing.assert_close(x_in, scale * x)
        torch.testing.assert_close(t, schedule.time_to_net(u).float())
        return target.of(x0, eps, alpha, sigma)

    prediction = NetworkDenoiser(network, schedule, target)(x, u)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TARGETS)
def test_any_output_keeps_the_state(name):
    """x = alpha x_0 + sigma eps is rebuilt whatever the network says."""
    schedule, x = PATHS[0], draw(2, 3, 4, 4)
    prediction = NetworkDenoiser(lambda x, t, cond: torch.sin(3 * x), schedule, Target(name))(x, 400.0)
    torch.testing.assert_close(schedule.noised(prediction.x0, prediction.eps, 400.0), x, rtol=0, atol=1e-12)


def test_edm_is_one_row_of_the_table():
    """D = c_skip x + c_out F, Karras et al. 2022, table 1."""
    schedule, x, sd = EDMSchedule(), draw(2, 3, 4, 4), 0.7
    network = edm_toy()
    for sigma in (0.01, 0.5, 30.0):
        norm = (sigma**2 + sd**2) ** 0.5
        output = network(x / norm, schedule.time_to_net(sigma).float().expand(2), None)
        expected = sd**2 / norm**2 * x + sigma * sd / norm * output
        prediction = NetworkDenoiser(network, schedule, Target("edm", sd))(x, sigma)
        torch.testing.assert_close(prediction.x0, expected, rtol=0, atol=1e-12 * (1 + sigma))


def test_published_preconditioning():
    golden = golden_tensors("edm")
    sigma, labels = golden["precond/sigma"].double(), golden["labels_onehot"]
    x = golden["precond/x"] * golden["precond/sigma"].reshape(-1, 1, 1, 1)
    edm, vp = EDMSchedule(), LinearVPSchedule()
    iddpm = CosineTimes(make_betas("cosine", 1000))
    eps, float32 = Target("eps"), torch.float32
    cases = {
        "edm/D": NetworkDenoiser(edm_toy(), edm, Target("edm")),
        "edm/D_labels": NetworkDenoiser(edm_toy(), edm, Target("edm"), cond=labels),
        "edm/D_sigma_data_1": NetworkDenoiser(edm_toy(), edm, Target("edm", 1.0)),
        "vp/D": TranslatedDenoiser(NetworkDenoiser(vp_toy, vp, eps, dtype=float32), vp, edm),
        "ve/D": NetworkDenoiser(ve_toy, HalfLogPath(), eps),
        "iddpm/D": TranslatedDenoiser(NetworkDenoiser(iddpm_toy, iddpm, eps, dtype=float32), iddpm, edm),
    }
    for name, denoiser in cases.items():
        expected = golden[f"precond/{name}"]
        scale = expected.abs().max().item()
        torch.testing.assert_close(denoiser(x, sigma).x0.float(), expected, rtol=0, atol=1e-5 * scale, msg=name)


def test_class_embedding_network_sees_null_and_condition():
    schedule, x, network = PATHS[0], draw(2, 3, 4, 4), lambda x, t, c: x * c.reshape(-1, 1, 1, 1)
    one = NetworkDenoiser(network, schedule, Target("eps"), cond=torch.tensor([2.0, 3.0], dtype=F64))
    null = torch.tensor([0.5, 0.5], dtype=F64)
    both = guided(one, null, 4.0)(x, 300.0)
    e_null, e_cond = 0.5 * x, x * one.cond.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(both.eps, e_null + 4 * (e_cond - e_null))
    torch.testing.assert_close(schedule.noised(both.x0, both.eps, 300.0), x)
    per_image = guided(one, null, 4.0)(x, torch.tensor([300.0, 300.0], dtype=F64))
    torch.testing.assert_close(per_image.eps, both.eps)
    assert guided(one, null, 1.0) is one
    with pytest.raises(ValueError, match="null class"):
        guided(one, None, 3.0)


def test_guidance_keeps_the_variance_of_the_conditional_half():
    network = lambda x, t, c: torch.cat([x, c.reshape(-1, 1, 1, 1).expand_as(x)], 1)  # noqa: E731
    cond, null = torch.tensor([0.5, -1.0], dtype=F64), torch.ones(2, dtype=F64)
    one = NetworkDenoiser(network, PATHS[0], Target("eps"), cond, learned_range=True)
    fraction = GuidedDenoiser(one, null, 2.0)(draw(2, 3, 4, 4), 300.0).var_fraction
    assert fraction[0].unique().tolist() == [0.75] and fraction[1].unique().tolist() == [0.0]


def test_clipping_rederives_eps_and_quantising_does_not():
    schedule, x = PATHS[0], 3 * draw(2, 3, 4, 4)
    plain = NetworkDenoiser(lambda x, t, cond: 0.1 * x, schedule, Target("eps"))
    before, after = plain(x, 500.0), clipped(plain, schedule, 0.5)(x, 500.0)
    torch.testing.assert_close(after.x0, before.x0.clamp(-0.5, 0.5))
    torch.testing.assert_close(schedule.noised(after.x0, after.eps, 500.0), x)
    rounded = MappedDenoiser(plain, schedule, torch.round, rederive=False)(x, 500.0)
    assert torch.equal(rounded.eps, before.eps) and torch.equal(rounded.x0, before.x0.round())
    at_clean = clipped(plain, schedule, 0.5)(x, torch.tensor([0.0, 500.0], dtype=F64))
    assert bool(at_clean.eps.isfinite().all())


def test_network_computes_in_its_own_precision():
    seen = []
    network = lambda x, t, cond: (seen.append((x.dtype, t.dtype)), x)[1]  # noqa: E731
    prediction = NetworkDenoiser(network, PATHS[0], Target("eps"), dtype=torch.float32)(draw(1, 3, 4, 4), 9.0)
    assert seen == [(torch.float32, torch.float32)] and prediction.x0.dtype == F64


def test_translation_keeps_both_parts():
    """A VP network walked on a flow's schedule, even where the flow is pure noise."""
    vp, flow, x = PATHS[0], FlowSchedule(), draw(2, 3, 4, 4)
    denoiser = NetworkDenoiser(lambda x, t, cond: torch.sin(x), vp, Target("eps"))
    for u in (0.3, torch.tensor([0.3, 0.8], dtype=F64)):
        prediction = TranslatedDenoiser(denoiser, vp, flow)(x, u)
        torch.testing.assert_close(flow.noised(prediction.x0, prediction.eps, u), x)
    assert bool(TranslatedDenoiser(denoiser, vp, flow)(x, 1.0).eps.isfinite().all())
    # A schedule whose noise grows without bound has an end too.
    edm = EDMSchedule()
    own = NetworkDenoiser(lambda x, t, cond: x, edm, Target("edm"))
    at_end = TranslatedDenoiser(own, edm, flow)(x, 1.0)
    torch.testing.assert_close(at_end.x0, own(x * math.hypot(1, edm.end), edm.end).x0)
    assert VESchedule().time_at(math.inf) == VESchedule().end


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="parameterization must be one of"):
        Target("noise")
