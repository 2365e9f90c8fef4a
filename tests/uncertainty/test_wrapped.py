"""Variances through whatever wraps a denoiser: guidance, epsilon scaling, clipping, a classifier; every method."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ldm.data.digits import Digits
from ldm.diffusion.classifier_guidance import ClassifierScore, classifier_guided
from ldm.diffusion.denoiser import clipped
from ldm.diffusion.epsilon_scaling import EpsilonScaling, scaled
from ldm.diffusion.samplers import make_sampler, run
from ldm.ensembles.members import Members
from ldm.pipelines import METHODS, PosteriorPipeline, new_posterior, observations
from ldm.settings import Sampling, Scaling
from ldm.uncertainty.propagation import sampled, tangents
from tests.posteriors import write_model
from tests.uncertainty.test_propagation import LABELS, X, posterior, setting

LEVELS = {"unit": "log_snr", "window": (0.0, 50.0)}
WRAPPERS = {
    "scaled": lambda denoiser, schedule, times: scaled(denoiser, schedule, EpsilonScaling(1.1, 0.02), times),
    "by levels": lambda denoiser, schedule, times: scaled(
        denoiser, schedule, EpsilonScaling(1.1, 0.01, **LEVELS), times
    ),
    "by a table": lambda denoiser, schedule, times: scaled(
        denoiser, schedule, EpsilonScaling(table=((-4.0, 0.9), (0.0, 1.0), (6.0, 1.2))), times
    ),
    "in x0 only": lambda denoiser, schedule, times: scaled(
        denoiser, schedule, EpsilonScaling(1.1, direction="x0_only"), times
    ),
    "clipped": lambda denoiser, schedule, times: clipped(denoiser, schedule, 0.8),
    "scaled and clipped": lambda denoiser, schedule, times: clipped(
        scaled(denoiser, schedule, EpsilonScaling(1.1, 0.02), times), schedule, 0.8
    ),
    "by a classifier": lambda denoiser, schedule, times: classifier_guided(
        denoiser, ClassifierScore(Judge(), schedule, LABELS, 1.5)
    ),
}


class Judge(nn.Module):
    """A classifier of noisy images [B, 1, 3, 4] with three classes."""

    def forward(self, x, t):
        return torch.stack([x.sum((1, 2, 3)), x.square().sum((1, 2, 3)), x[:, 0, 0, 0] ** 3], 1)


@pytest.mark.parametrize(("path", "sampler"), [("vp", "DDIM"), ("flow", "Heun")])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_tangents_through_a_wrapper_are_derivatives(wrapper, path, sampler):
    """Central differences in the weights; guidance lies below every wrapper."""
    network, laplace = posterior()
    plain, schedule, times = setting(path, network, scale=2.0)

    def build(net):
        return WRAPPERS[wrapper](plain(net), schedule, times)

    members, solver, step = laplace.sample(1, torch.Generator().manual_seed(3)), make_sampler(sampler), 1e-5
    found = tangents(solver, build, network, members, schedule, X, times)
    assert torch.equal(found.image, run(solver(build(network), schedule, X, times)))
    own = network.state_dict()
    moved = [
        {key: own[key] + sign * step * (value[0] - own[key]) for key, value in members.overrides.items()}
        for sign in (1, -1)
    ]
    ends = sampled(solver, build, network, Members.stack(moved), schedule, X, times).members
    torch.testing.assert_close(found.members[0], (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model")).load(Sampling(steps=2, scale=1.0), device="cpu")
    laplace = new_posterior(model, prior_precision=100.0)
    laplace.fit(observations(model.model, Digits(split="train"), range(8)))
    return PosteriorPipeline(model, laplace, draws=3, particles=2, every=2)


SETTINGS = {
    "nothing": Sampling(steps=2, scale=1.0),
    "guidance": Sampling(steps=2, scale=2.0),
    "scaling": Sampling(steps=2, scale=2.0, scaling=Scaling(1.05, 0.01)),
    "scaling of x0": Sampling(steps=2, scale=1.0, scaling=Scaling(1.05, direction="x0_only")),
    "clipping": Sampling(steps=2, scale=1.0, clip=True),
    "both": Sampling(steps=2, scale=2.0, clip=True, scaling=Scaling(1.05)),
}
REFUSED = ("scaling of x0", "clipping", "both")
THROUGH = ("persistent", "tangents", "redrawn")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapper", SETTINGS)
def test_every_method_follows_a_wrapper_or_refuses_it(loaded, wrapper, method):
    """The images are the plain sampler's; variances are numbers, the published ones aside above 0 (0 where clipped)."""
    wrapped = replace(loaded, pipeline=loaded.pipeline.with_(sampling=SETTINGS[wrapper]))
    if wrapper in REFUSED and method not in THROUGH:
        with pytest.raises(ValueError, match=f"{method} (knows neither|follows the one output).* use persistent"):
            wrapped.steps(method, [0, 1], [0, 1])
        return
    *_, last = wrapped.steps(method, [0, 1], [0, 1])
    assert bool(last.var.isfinite().all())
    if not method.startswith("published"):
        least = last.var.max() if wrapper in ("clipping", "both") else last.var.min()
        assert least > 0 and last.var.min() >= 0
    *_, plain = wrapped.plain([0, 1], [0, 1])
    torch.testing.assert_close(last.step.x_next, plain.x_next, rtol=1e-4, atol=1e-4)
