"""Distances and mutual information against the published numbers, torch.distributions, Monte Carlo and limits."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.modules.distributions.gaussian import Gaussian
from ldm.uncertainty import information as measures
from ldm.uncertainty.information import (
    DISTANCES,
    bhattacharyya,
    kl,
    mean_pairwise_distance,
    mutual_information,
    paide,
    saturation,
    total_variance,
    wasserstein2_squared,
)
from ldm.uncertainty.monte_carlo import monte_carlo_information
from ldm.util import generator
from tests.conftest import golden_tensors

# The published code weighs members with a float32 1/M: its mutual information is about 4e-8 low.
PUBLISHED = {"atol": 2e-7, "rtol": 1e-7}
NAMES = {"KL": "kl", "Bhatt": "bhattacharyya", "Wass": "wasserstein"}


@pytest.fixture(scope="module")
def golden():
    return golden_tensors("decu_estimators")


def published(golden, name="", sigmas="sigs"):
    return Gaussian(golden[f"{name}mus"], golden[sigmas].double().square() if sigmas else torch.tensor(0.0))


def draw(*shape, key=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator("measures", key), dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["", "shared_sigma/"])
def test_published_distances_and_mutual_information(golden, name, prefix):
    gaussian = published(golden, sigmas=f"{prefix}sigs")
    distances = DISTANCES[NAMES[name]](gaussian)
    torch.testing.assert_close(distances, golden[f"{prefix}dist/{name}"], atol=2e-7, rtol=2e-6)
    torch.testing.assert_close(paide(distances), golden[f"{prefix}mi/{name}"], **PUBLISHED)


def test_published_zero_covariance(golden):
    gaussian = published(golden, sigmas=None)
    torch.testing.assert_close(wasserstein2_squared(gaussian), golden["dist/Wass_0"], atol=0, rtol=1e-12)
    torch.testing.assert_close(mutual_information(gaussian), golden["mi/Wass_0"], **PUBLISHED)


def test_published_per_element(golden):
    """The published per-pixel measure is one 1-D problem per number; ours needs no batch of one."""
    gaussian = published(golden, sigmas=None)
    torch.testing.assert_close(wasserstein2_squared(gaussian, dims="element"), golden["per_pixel/dist"])
    torch.testing.assert_close(mutual_information(gaussian, dims="element"), golden["per_pixel/mi"], **PUBLISHED)


@pytest.mark.parametrize("group", [(0, 1), (0, 2, 4), (3,)])
def test_published_groups(golden, group):
    gaussian = published(golden, sigmas=None)
    rest = [member for member in range(5) if member not in group]
    stem = "groups_" + "".join(map(str, group))
    torch.testing.assert_close(mutual_information(gaussian, members=rest), golden[f"{stem}/uncertain"], **PUBLISHED)
    ours = mutual_information(gaussian, members=group)
    if len(group) == 1:
        assert ours.tolist() == [0, 0, 0]
    else:
        torch.testing.assert_close(ours, golden[f"{stem}/certain"], **PUBLISHED)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("name", "distance", "sigmas"), [("KL", "kl", "sigs"), ("Wass_0", "wasserstein", None)])
def test_published_member_counts(golden, count, name, distance, sigmas):
    gaussian = published(golden, sigmas=sigmas).select(range(count))
    torch.testing.assert_close(mutual_information(gaussian, distance), golden[f"m{count}/mi/{name}"], **PUBLISHED)


@pytest.mark.parametrize("limit", ["far", "clusters_2_2_1"])
def test_published_limits(golden, limit):
    ours = mutual_information(published(golden, f"limits/{limit}/", sigmas=None))
    torch.testing.assert_close(ours, golden[f"limits/{limit}/mi"], **PUBLISHED)


def test_kl_equals_torch_distributions():
    mean, std = draw(3, 2, 4, 5), draw(3, 2, 4, 5, key=1).exp()
    pairs = [kl_divergence(Normal(mean[i], std[i]), Normal(mean[j], std[j])) for i in range(3) for j in range(3)]
    expected = torch.stack(pairs).unflatten(0, (3, 3))
    gaussian = Gaussian(mean, std.square())
    torch.testing.assert_close(kl(gaussian, dims="element"), expected)
    torch.testing.assert_close(kl(gaussian), expected.sum((3, 4)))
    torch.testing.assert_close(kl(gaussian, scale=1.0), expected.sum((3, 4)))


@pytest.mark.parametrize("scale", ["mean", 0.25, 64.0])
@pytest.mark.parametrize("distance", ["kl", "bhattacharyya"])
def test_divergences_are_summed_or_bound_nothing(distance, scale):
    """Five members of 64 numbers, 0.3 deviations apart: KL averaged lies below the information, 8 times so."""
    gaussian = Gaussian(0.3 * draw(5, 1, 64, key=11), 1.0)
    with pytest.raises(ValueError, match=f"under the scale {scale} it bounds nothing"):
        mutual_information(gaussian, distance, scale=scale)
    source = torch.Generator().manual_seed(0)
    true = monte_carlo_information(gaussian, 500, source).estimate
    assert paide(kl(gaussian) / 64) < true / 8 and true < paide(kl(gaussian))


def test_bhattacharyya_equals_numerical_integral():
    mean, std = draw(2, 1, 1, key=2), draw(2, 1, 1, key=3).exp()
    times = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    density = [Normal(mean[i, 0, 0], std[i, 0, 0]).log_prob(times) for i in range(2)]
    expected = -torch.trapezoid((0.5 * (density[0] + density[1])).exp(), times).log()
    assert bhattacharyya(Gaussian(mean, std.square()))[0, 1, 0].item() == pytest.approx(expected.item(), abs=1e-9)


def test_wasserstein_equals_optimal_transport_of_quantiles():
    """In one dimension W2^2 is the mean squared gap of the two quantile functions."""
    mean, std = draw(2, 1, 1, key=4), draw(2, 1, 1, key=5).exp()
    levels = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    gap = Normal(mean[0, 0, 0], std[0, 0, 0]).icdf(levels) - Normal(mean[1, 0, 0], std[1, 0, 0]).icdf(levels)
    ours = wasserstein2_squared(Gaussian(mean, std.square()))[0, 1, 0]
    assert ours.item() == pytest.approx(gap.square().mean().item(), rel=1e-4)


def test_mutual_information_lies_between_its_bounds():
    """Bhattacharyya <= I(x; member) <= KL, with I by 200,000 draws of the mixture (standard error below 2e-3)."""
    mean, std = 0.7 * draw(4, 1, 3, key=6), (0.3 * draw(4, 1, 3, key=7)).exp()
    gaussian = Gaussian(mean, std.square())
    draws = mean + std * torch.randn(50_000, 4, 1, 3, generator=generator("mc"), dtype=torch.float64)
    log_density = Normal(mean[:, 0], std[:, 0]).log_prob(draws.unsqueeze(2)[..., 0, :]).sum(-1)
    own = log_density.diagonal(dim1=1, dim2=2)
    exact = (own - log_density.logsumexp(2) + math.log(4)).mean().item()
    assert mutual_information(gaussian, "bhattacharyya").item() < exact < mutual_information(gaussian, "kl").item()
    assert 0 < exact < math.log(4)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("members", [1, 2, 5, 8])
def test_limits_zero_and_log_members(distance, members):
    same = Gaussian(draw(1, 3, 2, 2, 2).expand(members, -1, -1, -1, -1), 0.5)
    assert mutual_information(same, distance).tolist() == [0, 0, 0]
    far = Gaussian(1e4 * torch.arange(members, dtype=torch.float64).reshape(-1, 1, 1).expand(-1, 3, 4), 0.5)
    torch.testing.assert_close(mutual_information(far, distance), torch.full((3,), math.log(members)).double())


def test_clusters_give_the_entropy_of_their_sizes():
    place = torch.tensor([0.0, 0.0, 0.0, 50.0, 50.0, -50.0]).reshape(6, 1, 1)
    entropy = -sum(share * math.log(share) for share in (3 / 6, 2 / 6, 1 / 6))
    assert mutual_information(Gaussian(place)).item() == pytest.approx(entropy, abs=1e-12)
    merged = Gaussian(torch.tensor([0.0, 50.0, -50.0]).reshape(3, 1, 1))
    weights = torch.tensor([3, 2, 1]).double() / 6
    assert mutual_information(merged, weights=weights).item() == pytest.approx(entropy, abs=1e-12)


def test_nearly_coincident_members_keep_relative_precision():
    """For D -> 0, I = (M - 1)/M mean D; a Gram matrix or ln(mean exp) would lose these digits at D = 1e-14."""
    mean = 1 + 1e-7 * draw(5, 1, 1, key=8)
    distances = wasserstein2_squared(Gaussian(mean))
    torch.testing.assert_close(paide(distances), 0.8 * mean_pairwise_distance(distances), rtol=1e-9, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
def test_members_can_be_permuted(distance):
    mean, var = draw(5, 2, 3, 2, 2, key=9), draw(5, 2, 3, 2, 2, key=10).exp()
    order = torch.tensor([3, 0, 4, 2, 1])
    ours = mutual_information(Gaussian(mean, var), distance)
    torch.testing.assert_close(mutual_information(Gaussian(mean[order], var[order]), distance), ours)
    permuted = DISTANCES[distance](Gaussian(mean[order], var[order]))
    torch.testing.assert_close(permuted, DISTANCES[distance](Gaussian(mean, var))[order][:, order])


@pytest.mark.parametrize("distance", DISTANCES)
def test_no_overflow_at_image_size(distance):
    """12,288 dimensions and variance ratios whose product, e^(+-30000), no float holds."""
    mean = 1e3 * draw(3, 2, 3, 64, 64, key=11, dtype=torch.float32)
    var = torch.tensor([1e-3, 1.0, 1e3]).reshape(3, 1, 1, 1, 1)
    distances = DISTANCES[distance](Gaussian(mean, var))
    assert distances.isfinite().all() and (distances >= 0).all()
    torch.testing.assert_close(paide(distances), torch.full((2,), math.log(3)).double())


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_per_pixel_keeps_noise_and_member_axes_apart(batch):
    """B = M = 4 is where the published code mixed the two axes: each sample alone must give the same map."""
    gaussian = Gaussian(draw(4, batch, 3, 5, 6, key=12), 0.1)
    maps = mutual_information(gaussian, dims="pixel")
    assert maps.shape == (batch, 5, 6)
    for b in range(batch):
        for y, x in [(0, 0), (4, 5), (2, 3)]:
            pixel = Gaussian(gaussian.mean[:, b : b + 1, :, y, x], 0.1)
            assert maps[b, y, x].item() == pytest.approx(mutual_information(pixel).item(), abs=1e-14)


@pytest.mark.parametrize("distance", DISTANCES)
def test_chunks_of_pairs_agree_with_one_chunk(distance, monkeypatch):
    gaussian = Gaussian(draw(5, 2, 3, 4, key=13), draw(5, 1, 3, 1, key=14).exp())
    whole = DISTANCES[distance](gaussian)
    monkeypatch.setattr(measures, "CHUNK_ELEMENTS", 50)
    torch.testing.assert_close(DISTANCES[distance](gaussian), whole, rtol=0, atol=0)


def test_var_broadcasts_and_gradients_flow():
    mean = draw(3, 2, 4, key=15).requires_grad_()
    number, full = Gaussian(mean, 0.3), Gaussian(mean, torch.full((3, 2, 4), 0.3).double())
    torch.testing.assert_close(kl(number), kl(full))
    assert torch.autograd.gradcheck(lambda m: mutual_information(Gaussian(m, 0.3), "kl"), (mean,))


def test_total_variance_equals_the_mixture_covariance_of_draws_and_the_pairwise_distance():
    mean, var = draw(5, 3, 2, 4, 4, key=16), draw(5, 3, 2, 4, 4, key=17).exp()
    parts = total_variance(Gaussian(mean, var))
    matched = Gaussian(mean, var).moment_match()
    torch.testing.assert_close(parts.total, matched.var.sum((0, 2, 3, 4)))
    second_moment = (var + mean.square()).mean(0) - mean.mean(0).square()
    torch.testing.assert_close(parts.total, second_moment.sum((1, 2, 3)))
    pairwise = mean_pairwise_distance(wasserstein2_squared(Gaussian(mean)))
    torch.testing.assert_close(parts.epistemic, pairwise * 4 / 10)
    assert total_variance(Gaussian(mean, var), dims="pixel").epistemic.shape == (3, 4, 4)


def test_saturation_counts_entries_above_the_threshold():
    values = torch.tensor([[0.0, 0.94, 0.96], [1.0, 0.5, 0.951]]) * math.log(5)
    assert saturation(values, members=5) == pytest.approx(3 / 6)


@pytest.mark.parametrize("distance", ["kl", "bhattacharyya"])
def test_zero_covariance_names_the_cure(distance):
    with pytest.raises(ValueError, match="distance='wasserstein', or sample with eta > 0"):
        mutual_information(Gaussian(torch.zeros(2, 1, 3)), distance)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gaussian(torch.zeros(3)), r"\[M, B, ...\]"),
        (lambda: Gaussian(torch.zeros(2, 3), torch.zeros(4)), "does not broadcast"),
        (lambda: Gaussian(torch.zeros(2, 3)).select([0, 0]), "different numbers from 0 to 1"),
        (lambda: wasserstein2_squared(Gaussian(torch.zeros(2, 3), -1.0)), "at least 0"),
        (lambda: kl(Gaussian(torch.zeros(2, 3), 1.0), dims="pixel"), r"\[M, B, C, H, W\]"),
        (lambda: kl(Gaussian(torch.zeros(2, 3), 1.0), dims="class"), "dims must be"),
        (lambda: kl(Gaussian(torch.zeros(2, 3), 1.0), scale="max"), "scale must be"),
        (lambda: mutual_information(Gaussian(torch.zeros(2, 3)), "chernoff"), "one of"),
        (lambda: paide(torch.zeros(2, 3, 1)), r"\[M, M, ...\]"),
        (lambda: paide(torch.zeros(2, 2, 1), members=[2]), "from 0 to 1"),
        (lambda: paide(torch.zeros(2, 2, 1), weights=torch.tensor([0.5, 0.1])), "sum 1"),
        (lambda: saturation(torch.zeros(3), members=1), "at least 2 members"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
