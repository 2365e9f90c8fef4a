"""The network as a flow's: the same trajectory and the same corrected recursion as on its own schedule."""

import torch

from ldm.benchmark.flow_view import BayesFlow, make_flow_denoiser
from ldm.diffusion.transition import ddim
from ldm.uncertainty.propagation import bayesdiff


def test_pictures_of_the_flow_are_those_of_the_network(problem):
    denoiser, x, times = make_flow_denoiser(problem, "full")
    *_, last = ddim(denoiser, denoiser.schedule, x, times)
    torch.testing.assert_close(last.x_next, problem.pictures, rtol=1e-3, atol=1e-4)


def test_corrected_recursion_of_the_flow_is_bayesdiffs(problem):
    own = problem.predictive("full")
    given = {"particles": 400, "source": problem.noise, "form": "total"}
    *_, expected = bayesdiff(problem.walk(problem.build()(problem.base)), own, **given)
    denoiser, x, times = make_flow_denoiser(problem, "full")
    *_, found = bayesdiff(ddim(denoiser, denoiser.schedule, x, times), denoiser, **given)
    torch.testing.assert_close(found.var.sum(), expected.var.sum(), rtol=0.02, atol=0)
    torch.testing.assert_close(found.var, expected.var, rtol=0.3, atol=float(expected.var.mean()) / 5)


def test_published_recursion_gives_a_map(problem):
    scored = BayesFlow().score(problem)
    assert scored.map.shape == problem.x.shape
    assert bool(torch.isfinite(scored.map).all())
