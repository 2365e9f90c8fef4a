"""Agreement of maps against SciPy, and its limits."""

import pytest
import torch
from scipy.stats import spearmanr

from ldm.uncertainty.agreement import agreement

TRUE = torch.rand(5, 1, 3, 4, generator=torch.Generator().manual_seed(0))
OTHER = torch.rand(5, 1, 3, 4, generator=torch.Generator().manual_seed(1)).round(decimals=1) - 0.1


def test_numbers_are_those_of_scipy_and_of_sums():
    found = agreement(OTHER, TRUE)
    within = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(OTHER, TRUE, strict=True)]
    assert found.pixel == pytest.approx(sum(within) / 5)
    assert found.image == pytest.approx(spearmanr(OTHER.sum((1, 2, 3)), TRUE.sum((1, 2, 3))).statistic)
    assert found.overall == pytest.approx(spearmanr(OTHER.flatten(), TRUE.flatten()).statistic)
    assert found.total == pytest.approx(float(OTHER.sum() / TRUE.sum()))
    assert found.error == pytest.approx(float((OTHER - TRUE).norm() / TRUE.norm()), rel=1e-6)
    assert found.negative == pytest.approx(float((OTHER < 0).double().mean()))
    assert found.negative > 0


def test_scaled_maps_agree_in_all_but_the_total():
    found = agreement(3 * TRUE, TRUE)
    assert (found.pixel, found.image, found.overall) == pytest.approx((1, 1, 1))
    assert (found.total, found.error) == pytest.approx((3, 2))


def test_a_constant_map_ranks_nothing():
    found = agreement(torch.ones_like(TRUE), TRUE)
    assert (found.pixel, found.image, found.overall) == (0, 0, 0)


@pytest.mark.parametrize("found", [TRUE[:1], TRUE[:, 0], TRUE / 0])
def test_what_cannot_be_compared_is_refused(found):
    with pytest.raises(ValueError, match=r"one shape|not finite"):
        agreement(found, TRUE)
