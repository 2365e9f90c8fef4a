"""What is reported of a step, against two-member closed forms, sums by hand, and limits."""

import math
from itertools import combinations

import pytest
import torch

from ldm.modules.distributions.gaussian import Gaussian
from ldm.uncertainty.information import mutual_information
from ldm.uncertainty.quantities import Estimator, compare_groups, compute_quantities, pixel_maps, step_curve
from ldm.util import generator


def draw(*shape, key=0):
    return torch.randn(shape, generator=generator("quantities", key), dtype=torch.float64)


def two(gap, var=0.0, dims=16):
    """Two members, one sample: means apart by `gap` in each of `dims` numbers."""
    mean = torch.zeros(2, 1, 1, 4, dims // 4, dtype=torch.float64)
    mean[1] = gap
    return Gaussian(mean, var)


@pytest.mark.parametrize(("scale", "factor"), [("sum", 16.0), ("mean", 1.0), (0.25, 4.0)])
def test_two_members_have_the_closed_form_under_every_scale(scale, factor):
    """I = -ln((1 + exp(-D)) / 2) with D = 0.3^2 times 16 dimensions (sum), 1 (mean), 0.25 * 16."""
    found = compute_quantities(two(0.3, var=0.5), Estimator("wasserstein", scale))
    distance = 0.09 * factor
    assert found.mi.item() == pytest.approx(-math.log((1 + math.exp(-distance)) / 2), rel=1e-12)
    assert found.mean_pairwise_distance.item() == pytest.approx(distance)
    # Means 0 and 0.3 have variance 0.3^2 / 2 by M - 1 = 1; each member's own is 0.5.
    assert found.epistemic_variance.item() == pytest.approx(0.045 * factor)
    assert found.aleatoric_variance.item() == pytest.approx(0.5 * factor)


def test_variances_add_up_to_that_of_the_mixture():
    gaussian = Gaussian(draw(5, 3, 2, 4, 4, key=1), draw(5, 3, 2, 4, 4, key=2).exp())
    found = compute_quantities(gaussian, Estimator())
    total = found.epistemic_variance * 4 / 5 + found.aleatoric_variance  # the mixture's own divides by M
    torch.testing.assert_close(total, gaussian.moment_match().var.sum((0, 2, 3, 4)))


def test_as_many_samples_as_members_do_not_mix():
    """The published per-pixel estimator mixes the axes when n = M."""
    mean = draw(4, 4, 1, 3, 3, key=3)
    found = compute_quantities(Gaussian(mean), Estimator())
    for sample in range(4):
        alone = compute_quantities(Gaussian(mean[:, sample : sample + 1]), Estimator())
        assert found.mi[sample].item() == pytest.approx(alone.mi.item(), rel=1e-12)


def test_groups_are_the_estimates_of_their_members_alone():
    gaussian = Gaussian(0.3 * draw(5, 2, 3, key=4))
    distances = Estimator().distances(gaussian)
    found = compare_groups(distances, certain=(0, 3), uncertain=(1, 2, 4))
    torch.testing.assert_close(found.mi_certain, mutual_information(gaussian.select([0, 3])))
    torch.testing.assert_close(found.mi_uncertain, mutual_information(gaussian.select([1, 2, 4])))
    by_hand = sum(distances[i, j] for i in (0, 3) for j in (1, 2, 4)) / 6
    torch.testing.assert_close(found.distance_between, by_hand)
    torch.testing.assert_close(found.distance_certain, distances[0, 3])


def test_between_groups_is_symmetric_for_kl():
    distances = Estimator("kl").distances(Gaussian(draw(3, 2, 4, key=5), draw(3, 2, 4, key=6).exp()))
    one, other = (compare_groups(distances, *groups).distance_between for groups in [((0,), (1, 2)), ((1, 2), (0,))])
    torch.testing.assert_close(one, other)


def test_groups_of_one_and_of_none():
    distances = Estimator().distances(Gaussian(draw(3, 2, 4, key=7)))
    found = compare_groups(distances, (1,), (0, 2))
    assert found.mi_certain.tolist() == [0, 0] and found.distance_certain.isnan().all()
    nobody = compare_groups(distances, (), (0, 1, 2))
    assert nobody.mi_certain.isnan().all() and nobody.distance_between.isnan().all()
    with pytest.raises(ValueError, match="different numbers from 0 to 2"):
        compare_groups(distances, (0, 1), (1, 2))


def test_step_curve_goes_from_nothing_to_ln_m():
    """Members that part linearly: D_ij = (s |i - j|)^2 at step s, so I rises from 0 to ln M."""
    places = torch.arange(4.0, dtype=torch.float64)[:, None, None]
    curve = list(step_curve([Gaussian(step * places) for step in (0.0, 0.1, 1.0, 100.0)], Estimator()))
    values = [value.item() for value in curve]
    assert values[0] == 0 and values == sorted(values)
    assert values[-1] == pytest.approx(math.log(4), abs=1e-12)
    by_hand = -sum(math.log(sum(math.exp(-0.01 * (i - j) ** 2) for j in range(4)) / 4) for i in range(4)) / 4
    assert values[1] == pytest.approx(by_hand, rel=1e-12)


def test_pixel_maps_of_any_number_of_noises():
    samples = draw(3, 3, 2, 3, 4, 4, key=8)  # members, noises, bases, channels: M = n = C
    joint, apart = pixel_maps(samples), pixel_maps(samples, joint=False)
    assert joint.shape == apart.shape == (3, 2, 4, 4)
    colour = samples[:, 1, 0, :, 2, 3][:, None]
    assert joint[1, 0, 2, 3].item() == pytest.approx(mutual_information(Gaussian(colour)).item(), rel=1e-12)
    each = [mutual_information(Gaussian(colour[..., c : c + 1])).item() for c in range(3)]
    assert apart[1, 0, 2, 3].item() == pytest.approx(sum(each) / 3, rel=1e-12)
    assert pixel_maps(samples, "mean")[1, 0, 2, 3].item() < joint[1, 0, 2, 3].item()


def test_wrong_distances_are_named():
    with pytest.raises(ValueError, match="one of"):
        compute_quantities(two(1.0), Estimator("chernoff"))
    assert Estimator("wasserstein", 0.5).units == "squared latent units, summed over the dimensions, times 0.5"


def test_epistemic_variance_does_not_depend_on_the_number_of_members():
    """Its mean over all groups of 2, 3, 4 of five members is that of all five."""
    mean = draw(5, 2, 3, key=9)
    whole = compute_quantities(Gaussian(mean), Estimator()).epistemic_variance
    torch.testing.assert_close(whole, mean.var(0).sum(1))
    for size in (2, 3, 4):
        groups = [
            compute_quantities(Gaussian(mean[list(group)]), Estimator()) for group in combinations(range(5), size)
        ]
        torch.testing.assert_close(torch.stack([group.epistemic_variance for group in groups]).mean(0), whole)
    assert compute_quantities(Gaussian(mean[:1]), Estimator()).epistemic_variance.tolist() == [0, 0]
