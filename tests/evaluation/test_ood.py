"""Scores of unknown pictures, against an exact model of a Gaussian law and against their definitions."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from ldm.diffusion.affine import CosineSchedule
from ldm.diffusion.denoiser import Target
from ldm.ensembles.members import MemberNetwork, Members
from ldm.evaluation.ood import Corruption, KnownPictures, Law, NetworkReader, Readings, conformal_p, pixel_statistics
from ldm.experiments.small_networks import SmallNetwork
from ldm.laplace import LastLayerLaplace, Observation
from ldm.stats import auroc
from ldm.util import generator

SCHEDULE = CosineSchedule()
DEVIATION = 0.6


class ExactNetwork(torch.nn.Module):
    """The noise that x_0 ~ N(0, d^2 I) lets one expect: E[eps | x] = sigma x / (alpha^2 d^2 + sigma^2)."""

    def __init__(self):
        super().__init__()
        self.inside = torch.nn.Identity()

    def forward(self, x, t, cond):
        alpha, sigma = (each.to(x).reshape(-1, 1, 1, 1) for each in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
        return self.inside(sigma * x / (alpha**2 * DEVIATION**2 + sigma**2))


def draw(count, deviation, *keys):
    return deviation * torch.randn(count, 1, 4, 4, generator=generator("pictures", *keys))


def test_readings_of_an_exact_model_have_their_closed_form():
    corruption = Corruption.make(0.1, 5.0, 4, seed=3)
    reader = NetworkReader(ExactNetwork(), SCHEDULE, Target("eps"), taps={"in": "inside"})
    z = draw(3, DEVIATION, 1)
    found = reader.read(z, None, [7, 8, 9], corruption)
    noises = corruption.noises([7, 8, 9], z.shape[1:])
    for level, ratio in enumerate(corruption.ratios):
        u = SCHEDULE.time_at(ratio)
        alpha, sigma = SCHEDULE.alpha(u), SCHEDULE.sigma(u)
        x = alpha * z + sigma * noises[level]
        expected = sigma * x / (alpha**2 * DEVIATION**2 + sigma**2)
        np.testing.assert_allclose(
            found.loss[:, level], (expected - noises[level]).square().flatten(1).mean(1), rtol=1e-4
        )
        np.testing.assert_allclose(found.snapshots[:, level, 0], expected.mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    # Along the ODE of N(0, d^2 I) states keep their direction, so that every eps_hat is a multiple of z.
    sizes = []
    state, noise = 1.0, 0.0  # multiples of z: x0_hat and eps_hat
    for ratio in corruption.ratios:
        u = SCHEDULE.time_at(ratio)
        alpha, sigma = float(SCHEDULE.alpha(u)), float(SCHEDULE.sigma(u))
        x = alpha * state + sigma * noise
        noise = sigma * x / (alpha**2 * DEVIATION**2 + sigma**2)
        state = (x - sigma * noise) / alpha
        sizes.append(noise)
    energy = sum(size**2 for size in sizes) * z.double().square().flatten(1).mean(1)
    np.testing.assert_allclose(found.path[:, 1], energy, rtol=1e-4)
    steps = np.diff(np.log(corruption.ratios))
    bends = sum((np.diff(sizes) / steps) ** 2) * z.double().square().flatten(1).mean(1).numpy()
    np.testing.assert_allclose(found.path[:, 4], bends, rtol=1e-4)


def test_an_exact_model_tells_a_wider_law_and_not_its_own():
    corruption = Corruption.make(0.1, 5.0, 5)
    reader = NetworkReader(ExactNetwork(), SCHEDULE, Target("eps"), taps={"in": "inside"})
    sets = {"reference": draw(120, DEVIATION, 2), "known": draw(120, DEVIATION, 3), "wide": draw(60, 1.2, 4)}
    sets["narrow"] = draw(60, 0.3, 5)
    readings = {name: reader.read(z, None, range(len(z)), corruption) for name, z in sets.items()}
    reference = KnownPictures(sets["reference"], readings["reference"], corruption.nearest(0.5))
    scores = {name: reference.score(z, readings[name]) for name, z in sets.items()}
    known = scores["known"]
    assert {known[name].evaluations for name in known} == {0, 1, 5}

    def tell(name, other):
        both = np.concatenate([scores[other][name].values, known[name].values])
        return auroc(both, np.arange(len(both)) < len(scores[other][name].values))

    for name in ("path energy", "path, six sums", "pixel statistics"):  # two-sided
        assert tell(name, "wide") > 0.9 and tell(name, "narrow") > 0.9
    assert tell("denoising loss, 5 levels", "wide") > 0.9
    assert tell("denoising loss, 5 levels", "narrow") < 0.5  # what is smoother than the law is denoised too well
    halves = {name: score.values[:60] for name, score in known.items()}
    for name, first in halves.items():
        rest = known[name].values[60:]
        assert 0.3 < auroc(np.concatenate([first, rest]), np.arange(120) < 60) < 0.7


def test_distances_are_mahalanobis_ones():
    mixing = torch.tensor([[1, 2, 0], [0, 1, 0], [0, 1, 3]]).double()
    values = (torch.randn(4000, 3, generator=generator("law")).double() @ mixing).numpy()
    law = Law.of(values)
    exact = [
        mahalanobis(row, values.mean(0), np.linalg.inv(np.cov(values.T, bias=True))) ** 2 / 3 for row in values[:20]
    ]
    np.testing.assert_allclose(law.distance(values[:20]), exact, rtol=0.1)  # shrunk a little
    single = Law.of(values[:, :1])
    np.testing.assert_allclose(
        single.distance(values[:9, :1]), ((values[:9, 0] - values[:, 0].mean()) / values[:, 0].std()) ** 2
    )


def test_conformal_p_values_are_uniform_at_most():
    source = generator("p")
    rejected = []
    for _ in range(400):
        draws = torch.randn(30, generator=source).numpy()
        rejected.append(conformal_p(draws[:29], draws[29:])[0] <= 0.1)
    assert np.mean(rejected) <= 0.1 + 3 * (0.09 / 400) ** 0.5
    assert np.mean(rejected) > 0.04
    assert conformal_p(np.array([1.0, 2.0, 3.0]), np.array([4.0, 2.0, 0.0])).tolist() == [0.25, 0.75, 1.0]


def test_members_and_posterior_are_read_where_they_are():
    networks = [SmallNetwork().initialise(generator("start", number)) for number in range(3)]
    network = networks[0].eval().requires_grad_(False)
    names = dict(network.named_parameters())
    stacked = {name: torch.stack([dict(each.named_parameters())[name].detach() for each in networks]) for name in names}
    source = generator("rows")
    rows = Observation(
        torch.randn(40, 64, generator=source),
        torch.rand(40, generator=source),
        torch.arange(40) % 10,
        torch.randn(40, 64, generator=source),
    )
    laplace = LastLayerLaplace(network).fit([rows], draws=1)
    reader = NetworkReader(
        network, SCHEDULE, Target("v"), members=MemberNetwork(network, Members(stacked)), laplace=laplace,
        taps={"block": "blocks.1"},
    )  # fmt: skip
    z = torch.randn(5, 1, 8, 8, generator=source)
    labels = torch.tensor([0, 1, 2, 3, 4])
    corruption = Corruption.make(0.2, 2.0, 3)
    whole = reader.read(z, labels, range(5), corruption)
    parts = [reader.read(z[a:b], labels[a:b], range(a, b), corruption) for a, b in ((0, 2), (2, 5))]
    for name in ("loss", "members", "variance", "snapshots", "path"):  # whatever the batch
        np.testing.assert_allclose(getattr(Readings.join(parts), name), getattr(whole, name), rtol=1e-3, atol=1e-6)
    assert (whole.members > 0).all() and (whole.members < np.log(3)).all() and (whole.variance > 0).all()
    assert whole.snapshots.shape == (5, 3, 64)
    names = KnownPictures(z, whole, 1, 3).score(z, whole)
    assert {name.split(",")[0] for name in names} == {
        "pixel statistics", "nearest neighbour", "denoising loss", "members", "gamma^2", "snapshot",
        "nearest snapshot", "path energy", "path curvature", "path",
    }  # fmt: skip
    assert np.allclose(names["nearest neighbour"].values, 0, atol=1e-6) and names["members, 3 levels"].evaluations == 9
    assert pixel_statistics(z).shape == (5, 3)


@pytest.mark.parametrize("given", [(0.1, 5.0, 1), (0.0, 5.0, 4), (5.0, 0.1, 4)])
def test_levels_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="two or more levels"):
        Corruption.make(*given)
