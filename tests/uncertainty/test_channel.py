"""What nats of a deterministic step mean: bounds of the information that gets through noise, against sampling."""

import math

import pytest
import torch

from ldm.modules.distributions.gaussian import Gaussian
from ldm.uncertainty.channel import NoiseLevel, implied_deviations
from ldm.uncertainty.information import mutual_information, paide
from ldm.uncertainty.monte_carlo import monte_carlo_information
from ldm.uncertainty.quantities import Estimator, compute_quantities
from ldm.util import generator


def draw(*shape, key=0):
    return torch.randn(shape, generator=generator("channel", key), dtype=torch.float64)


@pytest.mark.parametrize("scale", ["sum", "mean", 3.0, 0.02])
@pytest.mark.parametrize("size", [0.1, 0.4])
def test_the_default_measure_bounds_what_gets_through_the_noise_that_is_printed(scale, size):
    """Squared W2 without variances: above the information through one deviation, below that through half of it."""
    mean = size * draw(5, 2, 16, key=1)
    found = mutual_information(Gaussian(mean), scale=scale)
    above, below = implied_deviations({"sum": 1.0, "mean": 1 / 16}.get(scale) or scale)
    through = [
        monte_carlo_information(Gaussian(mean, s**2), 4000, torch.Generator().manual_seed(0)) for s in (above, below)
    ]
    (least, error), (most, wide) = through
    assert (least - 4 * error < found).all() and (found < most + 4 * wide).all()
    assert (least < most).all()
    words = Estimator("wasserstein", scale).meaning(16)
    assert f"{above:.4g}" in words and f"{below:.4g}" in words


def test_the_published_measure_has_the_deviation_of_variance_one_half():
    assert implied_deviations(1.0) == pytest.approx((0.5**0.5, 0.125**0.5))
    assert "deviation 0.7071 in each" in Estimator().meaning(64)
    # The mean over 64 numbers belongs to variance 32.
    assert f"deviation {32**0.5:.4g} in each" in Estimator(scale="mean").meaning(64)


def test_bounds_through_a_stated_noise_hold_without_variances():
    mean = 0.5 * draw(4, 3, 2, 4, 4, key=2)
    noise = NoiseLevel(0.3, 0.7, 32)
    assert noise.deviation == pytest.approx(0.3 * 0.7 * 32**0.5)
    upper, lower = (
        compute_quantities(Gaussian(mean), Estimator(name, noise=noise)).mi for name in ("kl", "bhattacharyya")
    )
    true, error = monte_carlo_information(Gaussian(mean, noise.deviation**2), 4000, torch.Generator().manual_seed(1))
    assert (lower < true + 4 * error).all() and (true - 4 * error < upper).all()
    torch.testing.assert_close(upper, mutual_information(Gaussian(mean), scale=noise.factor))
    words = [Estimator(name, noise=noise).meaning(32) for name in ("kl", "bhattacharyya")]
    assert "is at most this" in words[0] and "is at least this" in words[1]
    assert all(
        "0.3 standard deviations of the data (0.7)" in each and f"{noise.deviation:.4g}" in each for each in words
    )


def test_members_own_variance_adds_to_the_noise():
    mean, var = draw(3, 2, 8, key=3), draw(3, 2, 8, key=4).exp()
    noise = NoiseLevel(0.5, 1.0, 8)
    found = compute_quantities(Gaussian(mean, var), Estimator("kl", noise=noise))
    torch.testing.assert_close(found.mi, mutual_information(Gaussian(mean, var + noise.deviation**2), "kl"))
    torch.testing.assert_close(found.aleatoric_variance, var.mean(0).sum(-1))


@pytest.mark.parametrize("unit", [1.0, 2.0, 37.0])
@pytest.mark.parametrize("enlarged", [1, 2, 4])
def test_nats_do_not_depend_on_units_or_on_the_number_of_pixels(unit, enlarged):
    """The same pictures in another unit, every pixel shown enlarged^2 times."""
    small = draw(4, 3, 1, 4, 4, key=5)
    data = draw(50, 1, 4, 4, key=6)

    def measure(pictures, samples):
        level = NoiseLevel(0.8, samples.var(0).mean().sqrt().item(), pictures[0, 0].numel())
        return compute_quantities(Gaussian(pictures), Estimator("kl", noise=level)).mi

    def show(pictures):
        return unit * pictures.repeat_interleave(enlarged, -1).repeat_interleave(enlarged, -2)

    torch.testing.assert_close(measure(show(small), show(data)), measure(small, data))


def test_one_noise_deviation_apart_is_half_a_nat_of_divergence():
    """Two members that differ by R standard deviations in every element: KL = 1/2, I <= -ln((1 + e^-1/2) / 2)."""
    pair = torch.zeros(2, 1, 3, 5, 5, dtype=torch.float64)
    pair[1] = 0.1 * 0.6
    found = compute_quantities(Gaussian(pair), Estimator("kl", noise=NoiseLevel(0.1, 0.6, 75)))
    assert found.mean_pairwise_distance.item() == pytest.approx(0.5)
    assert found.mi.item() == pytest.approx(-math.log((1 + math.exp(-0.5)) / 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NoiseLevel(0.0, 1.0, 4), "above 0"),
        (lambda: NoiseLevel(0.1, math.nan, 4), "above 0"),
        (lambda: implied_deviations(0.0), "above 0"),
        (lambda: Estimator("wasserstein", noise=NoiseLevel(0.1, 1.0, 4)), "bounded by kl and bhattacharyya"),
        (lambda: Estimator("kl", "mean"), "bounds nothing"),
        (lambda: Estimator("bhattacharyya", 2.0, NoiseLevel(0.1, 1.0, 4)), "bounds nothing"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_identical_members_give_nothing_away():
    same = draw(1, 2, 8, key=7).expand(3, -1, -1)
    assert compute_quantities(Gaussian(same), Estimator("kl", noise=NoiseLevel(0.1, 1.0, 8))).mi.tolist() == [0, 0]
    assert paide(torch.zeros(3, 3, 2)).tolist() == [0, 0]
