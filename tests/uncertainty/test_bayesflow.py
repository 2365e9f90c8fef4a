"""BayesFlow's published recursion on linear velocity fields, where every term has a closed form."""

import pytest
import torch
from torch import nn

from ldm.diffusion.denoiser import Target
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import FlowSchedule, VPSchedule, make_betas
from ldm.laplace import LastLayerLaplace, Observation
from ldm.uncertainty.propagation import PredictiveDenoiser, bayesdiff
from ldm.uncertainty.propagation.bayesflow import bayesflow

F64 = torch.float64
X = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(5), dtype=F64)
H = 0.25
TIMES = torch.linspace(1, 0, 5, dtype=F64)


class Scaled(nn.Module):
    """v(x, t) = rate(t) x, with a last layer of one weight and no bias whose input is that: gamma^2 = var v^2."""

    def __init__(self, rate):
        super().__init__()
        self.rate, self.out = rate, nn.Sequential(nn.Identity(), nn.Conv2d(1, 1, 1, bias=False))
        nn.init.ones_(self.out[1].weight)

    def backbone(self, x, t, cond):
        return self.rate(t.double())[:, None, None, None] * x

    def forward(self, x, t, cond):
        return self.out(self.backbone(x, t, cond))


def setting(rate):
    network = Scaled(rate).double()
    laplace = LastLayerLaplace(network, "out.1", prior_precision=50.0)
    laplace.fit([Observation(0 * X, torch.ones(2, dtype=F64), None, 0 * X)])  # the data say nothing: variance 1 / 50
    return PredictiveDenoiser(laplace, FlowSchedule(), Target("velocity"))


def expected(x, rate_of_step, rate_of_covariance, moved):
    """V' = V (1 - 2 h c) + h^2 (r x)^2 / 50 in the direction of u, with the walked states `moved`."""
    var = torch.zeros_like(x)
    for index, state in enumerate([x, *moved[:-1]]):
        r, c = rate_of_step(index), rate_of_covariance(index)
        var = var * (1 - 2 * H * c * (index > 0)) + H**2 * (r * state) ** 2 / 50
    return var


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_the_recursion_is_the_published_one(frozen):
    """Exact but for the covariance, whose estimate from S states has relative error sqrt(2 / S)."""
    rate = lambda t: 0.5 + 2 * t  # noqa: E731
    steps = list(
        bayesflow(setting(rate), X, TIMES, particles=20000, source=torch.Generator().manual_seed(1), frozen_time=frozen)
    )
    times = TIMES.tolist()
    own = lambda index: rate(times[0] if frozen else times[index])  # noqa: E731
    second = lambda index: rate(times[1] if frozen else times[index])  # noqa: E731
    found = steps[-1].var
    exact = expected(X, own, second, [step.step.x_next for step in steps])
    torch.testing.assert_close(found, exact, rtol=0.05, atol=1e-5)
    if not frozen:
        first = expected(X, own, second, [steps[0].step.x_next])
        torch.testing.assert_close(steps[0].var, first)


def test_images_are_drawn_around_eulers():
    """One step: x - h (v + gamma z), so the spread over draws is h gamma."""
    denoiser, ends = setting(lambda t: 1.0 + 0 * t), []
    for seed in range(400):
        walk = bayesflow(denoiser, X, TIMES[:2], particles=2, source=torch.Generator().manual_seed(seed))
        ends.append(next(walk).step.x_next)
    ends = torch.stack(ends)
    torch.testing.assert_close(ends.std(0), H * X.abs() / 50**0.5, rtol=0.15, atol=0)
    torch.testing.assert_close(ends.mean(0), (1 - H) * X, rtol=0, atol=0.02)


def test_variances_turn_negative_where_the_corrected_recursion_is_exact():
    """A field that contracts by a factor 1 - 3 h in each step: published 1 - 6 h < 0, corrected (1 - 3 h)^2."""
    denoiser = setting(lambda t: 3.0 + 0 * t)
    published = list(bayesflow(denoiser, X, TIMES, particles=2000, source=torch.Generator().manual_seed(1)))
    assert float(min(step.var.min() for step in published)) < 0
    corrected = list(
        bayesdiff(
            ddim(denoiser, FlowSchedule(), X, TIMES), denoiser, particles=2000, source=torch.Generator().manual_seed(2)
        )
    )
    assert all(bool((step.var > 0).all()) for step in corrected)
    x, var = X, torch.zeros_like(X)
    for _ in range(4):
        var = (1 - 3 * H) ** 2 * var + (3 * H) ** 2 * (x.square() + var) / 50
        x = (1 - 3 * H) * x
    torch.testing.assert_close(corrected[-1].var, var, rtol=0.15, atol=1e-6)


def test_other_paths_are_refused():
    laplace = setting(lambda t: t).laplace
    schedule = VPSchedule(make_betas("linear", 1000))
    with pytest.raises(ValueError, match="VPSchedule is none"):
        next(bayesflow(PredictiveDenoiser(laplace, schedule, Target("eps")), X, TIMES, source=torch.Generator()))
