"""The width of a posterior: draws of the fit do not decide it, visits do; its temperature, its channels, old files."""

from itertools import combinations

import pytest
import torch

from ldm.laplace import LastLayerLaplace, Observation, bootstrap_refits, mean_variance
from ldm.uncertainty.propagation import all_directions, decoded_members, decoded_tangents
from tests.laplace.laplace_cases import by_channel, fitted, make_batch, make_network

SIGMA, PRIOR, IMAGES = 0.6, 1e-3, 150
WEAK = {"prior_precision": PRIOR, "sigma_noise": SIGMA, "chunk": 256}


def repeated(network, images, draws, seed=3, shared=0.25, own=0.5):
    """Rows of images: the targets of an image are off by something of its own, and every row by noise."""
    source = torch.Generator().manual_seed(seed)
    each = make_batch(network, images, seed=4)
    rows = [part.repeat_interleave(draws, 0) for part in each]
    rows[0] = rows[0] + 0.3 * torch.randn(rows[0].shape, generator=source, dtype=torch.float64)
    with torch.no_grad():
        output = network(*rows[:3])
    off = torch.randn(images, *output.shape[1:], generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noise = torch.randn(output.shape, generator=source, dtype=torch.float64)
    return Observation(*rows[:3], output + shared * off.repeat_interleave(draws, 0) + own * noise)


@pytest.mark.parametrize("curvature", ["full", "sandwich"])
@pytest.mark.parametrize("visits", [1, 40])
def test_draws_of_the_fit_do_not_decide_the_width(curvature, visits):
    network = make_network("strided")
    widths = {}
    for draws in (1, 2, 8, 32):
        if (curvature, draws) != ("sandwich", 1) or visits == 1:
            own = fitted(network, repeated(network, IMAGES, draws), curvature, draws=draws, visits=visits, **WEAK)
            widths[draws] = mean_variance(own.state)
    assert max(widths.values()) / min(widths.values()) < 1.1, widths


def test_visits_are_means_over_the_draws_that_the_fit_had():
    """At 2 of 3 draws, sum g g^T is its mean over all pairs of an image's draws."""
    network = make_network("strided")
    batch = repeated(network, 60, 3)
    laplace = fitted(network, batch, "sandwich", draws=3, visits=2, **WEAK)
    rows = torch.arange(180).unflatten(0, (60, 3))
    chosen = [
        Observation(*[part[rows[:, list(pair)].flatten()] for part in batch]) for pair in combinations(range(3), 2)
    ]
    pairs = [fitted(network, pair, "sandwich", draws=2).fitted().meat for pair in chosen]
    expected = torch.stack(pairs).mean(0) / SIGMA**4
    bread = fitted(network, batch, "full", draws=3, visits=2, **WEAK).covariance().root[0]
    root = laplace.covariance().root
    torch.testing.assert_close(root @ root.mT, bread @ bread.T @ expected @ bread @ bread.T)


def test_a_difference_that_is_no_covariance_keeps_its_trace():
    """Two draws each of a few images, seen often: what is left between images has negative eigenvalues."""
    network = make_network()
    laplace = fitted(network, repeated(network, 30, 2, shared=0.4), "sandwich", draws=2, visits=100, **WEAK)
    sums, share = laplace.fitted(), 100 * 99 / 2
    meat = share * sums.meat + (50 - share) * sums.draw_meat
    bread = laplace.with_curvature("full").covariance().root[0]
    inner = bread.T @ meat @ bread / SIGMA**4
    assert torch.linalg.eigvalsh(inner).min() < 0
    kept = torch.linalg.solve(bread, laplace.covariance().root)
    torch.testing.assert_close(kept.square().sum((1, 2)), inner.diagonal(dim1=1, dim2=2).sum(1))


def test_an_image_that_is_seen_often_leaves_what_images_differ_by():
    """S(R) = between + within / R: three widths lie on a line in 1 / R."""
    network = make_network("strided")
    batch = repeated(network, IMAGES, 8)
    options = {"prior_precision": 1e-9, "sigma_noise": SIGMA}
    widths = [
        mean_variance(fitted(network, batch, "sandwich", draws=8, visits=visits, **options).state)
        for visits in (1, 2, 4)
    ]
    within = (widths[0] - widths[1]) * 2
    between = widths[0] - within
    assert between > 0 and within > between
    assert widths[2] == pytest.approx(between + within / 4, rel=1e-6)


def test_a_question_that_the_fit_cannot_answer_is_refused():
    network = make_network()
    single = fitted(network, repeated(network, 6, 1), "sandwich", visits=3, **WEAK)
    with pytest.raises(ValueError, match="draws of 2 or more, or ask for visits 1"):
        single.covariance()
    with pytest.raises(ValueError, match="visits must be finite and at least 1"):
        single.visits = 0.5
    with pytest.raises(ValueError, match="tune full"):
        single.optimize_temperature()


def test_a_file_without_visits_keeps_its_numbers_and_says_what_it_lacks(caplog):
    network = make_network()
    batch, new = repeated(network, 40, 4), make_batch(network, 3, seed=7)
    now = fitted(network, batch, "sandwich", draws=4, visits=4, **WEAK)
    gathered = ("visits", "statistics.draw_meat", "statistics.residuals")
    old = {name: value for name, value in now.state_dict().items() if name not in gathered}
    opened = LastLayerLaplace(network, curvature="sandwich")
    opened.load_state_dict(old)
    assert opened.visits == 4
    torch.testing.assert_close(opened(*new[:3]), now(*new[:3]))
    assert "fit again" in caplog.text, "channels are drawn as if independent"
    opened.visits = 10
    with pytest.raises(ValueError, match="known at 4 visits only: fit again"):
        opened.covariance()
    full, own = opened.with_curvature("full"), now.with_curvature("full")
    own.visits = 10
    torch.testing.assert_close(full(*new[:3]), own(*new[:3]))
    again = LastLayerLaplace(network, curvature="sandwich")
    again.load_state_dict(now.state_dict())
    again.visits = 10
    now.visits = 10
    torch.testing.assert_close(again(*new[:3]), now(*new[:3]))


@pytest.mark.parametrize("curvature", ["full", "kron", "diag", "lowrank", "ef", "isotropic", "sandwich"])
def test_the_mean_variance_is_that_of_the_rows_of_the_fit(curvature):
    network = make_network()
    batch = repeated(network, 20, 2)
    laplace = fitted(network, batch, curvature, draws=2, also=["full"], rank=7, visits=2, **WEAK)
    assert mean_variance(laplace.state) == pytest.approx(float(laplace(*batch[:3])[1].mean()), rel=1e-8)


@pytest.mark.parametrize("curvature", ["full", "kron", "diag", "ef"])
def test_a_temperature_gives_the_width_of_the_sandwich(curvature):
    network = make_network()
    laplace = fitted(network, repeated(network, 60, 4), curvature, draws=4, also=["sandwich"], visits=50, **WEAK)
    before = mean_variance(laplace.state)
    temperature = laplace.optimize_temperature()
    goal = laplace.with_curvature("sandwich")
    goal.temperature = 1.0
    assert mean_variance(laplace.state) == pytest.approx(mean_variance(goal.state), rel=1e-6)
    assert temperature > 1 and before < mean_variance(laplace.state)


def test_a_prior_that_is_too_narrow_has_no_such_temperature():
    network = make_network()
    options = {"prior_precision": 1e8, "sigma_noise": SIGMA}
    laplace = fitted(network, repeated(network, 20, 2), draws=2, also=["sandwich"], **options)
    laplace.optimize_temperature()  # a sandwich under this prior is narrower still
    assert mean_variance(laplace.state) < 1e-6
    lowrank = laplace.with_curvature("lowrank", rank=1)
    lowrank.prior_precision = 1e-6
    with pytest.raises(ValueError, match="no temperature gives"):
        lowrank.optimize_temperature()


def joint_covariance(laplace):
    """Covariance [C K, C K] of the draws of the parameters, without sampling error."""
    members = all_directions(laplace)
    names = sorted(members.overrides, key=lambda name: name.endswith("bias"))
    values = by_channel([members.overrides[names[0]].flatten(2), *[members.overrides[name] for name in names[1:]]])
    away = (values - laplace.mean).flatten(1)
    return away.T @ away / len(away)


# What the residuals' channels are mixed with, and what a decoder mixes the states' channels with.
RESIDUALS = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [-0.5, 0.2, 0.6]]).double()
COLOURS = torch.tensor([[1.0, -0.9, 0.3], [0.6, 0.7, 0.1], [-0.7, -0.3, 1.1]]).double()


def with_correlated_channels(network, images):
    """Two rows of each image whose residuals correlate across channels, and nothing else."""
    batch = repeated(network, images, 2, shared=0.0, own=0.0)
    source = torch.Generator().manual_seed(5)
    noise = torch.randn(batch.target.shape, generator=source, dtype=torch.float64)
    return batch._replace(target=batch.target + torch.einsum("cd,bdhw->bchw", RESIDUALS, noise))


def test_draws_of_the_sandwich_correlate_channels_as_the_residuals_do():
    """A decoder that adds channels, or takes their difference, sees the spread of refits on other data."""
    network = make_network("strided")
    batch = with_correlated_channels(network, 800)
    laplace = fitted(network, batch, "sandwich", draws=2, visits=2, **WEAK)
    found = joint_covariance(laplace).unflatten(0, (3, -1)).unflatten(2, (3, -1))
    bread = fitted(network, batch, "full", draws=2, visits=2, prior_precision=PRIOR).covariance().root[0]
    exact = torch.einsum("cd,kl->ckdl", RESIDUALS @ RESIDUALS.T, bread @ bread.T)
    for weights in ([1, 1, 1], [1, -1, 0], [0, 1, 1], [1, 0, 0]):
        w = torch.tensor(weights).double()
        ratio = torch.einsum("c,ckdk,d->", w, found, w) / torch.einsum("c,ckdk,d->", w, exact, w)
        assert 0.85 < float(ratio) < 1.15, weights
    alone = [found[c, :, c] for c in range(3)]
    root = laplace.covariance().root
    torch.testing.assert_close(torch.stack(alone), root @ root.mT)


def test_decoded_colours_vary_as_those_of_refits():
    """A first stage that mixes channels: the sandwich's colours have the variance of refits and of the closed form."""
    network = make_network("strided")
    batch = with_correlated_channels(network, 400)
    laplace = fitted(network, batch, "sandwich", draws=2, visits=2, **WEAK)
    features = laplace.features(*make_batch(network, 3, seed=7)[:3]).detach()
    middle = laplace.layer.apply(laplace.mean, features)

    def decode(states):
        return torch.einsum("dc,bchw->bdhw", COLOURS, states)

    def outputs(matrices):
        return torch.stack([laplace.layer.apply(matrix, features) for matrix in matrices])

    units = laplace.mean.numel() ** 0.5 * torch.eye(laplace.mean.numel()).double().unflatten(1, laplace.mean.shape)
    directions = laplace.mean + laplace.covariance().correlate(units)
    found = decoded_tangents(decode, middle, outputs(directions) - middle)
    source = torch.Generator().manual_seed(0)
    refits = bootstrap_refits(laplace, [batch], images=400, draws=2, count=300, source=source)
    bread = fitted(network, batch, "full", draws=2, visits=2, prior_precision=PRIOR).covariance().root[0]
    patches = (laplace.layer.patches(features).double() @ bread).square().sum(-1)  # [3, P]
    exact = torch.einsum("dc,ce,fe,df->d", COLOURS, RESIDUALS, RESIDUALS, COLOURS)[:, None, None] * patches
    alone = torch.einsum("dc,bchw->bdhw", COLOURS.square(), laplace.predict(features).variance)
    for colour in range(3):
        mean = float(found[:, colour].mean())
        assert 0.85 < mean / float(decoded_members(decode, outputs(refits.matrices))[:, colour].mean()) < 1.15
        assert 0.85 < mean / float(exact[colour].mean()) < 1.15
        assert not 0.75 < mean / float(alone[:, colour].mean()) < 1.3, "of channels for themselves"
