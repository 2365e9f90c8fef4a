"""Attribution of means and variances against refits without the images, made from nothing by linear regression."""

import pytest
import torch

from ldm.laplace import LastLayerLaplace, Observation
from ldm.laplace.attribution import Question, Refit, attribute_images, image_rows, remove_rows, remove_sums
from ldm.stats import spearman
from tests.laplace.laplace_cases import LAYERS, make_batch, make_network

IMAGES, DRAWS = 7, 2


def make_case(kind):
    """A fit of seven images of two draws each, its options, and batches of images' rows."""
    network = make_network(kind)
    rows = make_batch(network, IMAGES * DRAWS)
    options = {
        "prior_precision": 2.0,
        "prior_mean": 0.1,
        "sigma_noise": [0.5, 0.8],
        "time_edges": [400.0],
        "temperature": 1.3,
        "visits": 3.0,
    }
    batches = [Observation(*(part[start : start + 4] for part in rows)) for start in range(0, len(rows.x), 4)]
    laplace = LastLayerLaplace(network, **options).fit(batches, draws=DRAWS)
    asked = laplace.features(*make_batch(network, 3, seed=9)[:3])
    return laplace, options, rows, batches, asked


def refit_without(laplace, options, rows, removed):
    """The optimum [C, K] and covariance [K, K] of the regression on the other images, by normal equations."""
    kept = [number for number in range(len(rows.x)) if number // DRAWS not in removed]
    features = laplace.features(rows.x, rows.t, rows.cond)[kept]
    patches = laplace.layer.patches(features)
    targets = laplace.layer.by_position(rows.target[kept])
    sigma = torch.where(rows.t[kept] <= 400, 0.5, 0.8).double()
    weight = (options["visits"] / DRAWS / (sigma**2 * options["temperature"]))[:, None, None]
    gram = (weight * patches).flatten(0, 1).T @ patches.flatten(0, 1)
    cross = (weight * targets).flatten(0, 1).T @ patches.flatten(0, 1)
    precision = gram + options["prior_precision"] * torch.eye(len(gram), dtype=gram.dtype)
    pull = options["prior_precision"] * options["prior_mean"] * torch.ones_like(cross)
    return torch.linalg.solve(precision, (cross + pull).T).T.detach(), torch.linalg.inv(precision).detach()


@pytest.mark.parametrize("kind", LAYERS)
def test_removals_are_exact_refits(kind):
    laplace, options, rows, batches, asked = make_case(kind)
    refit = Refit.of(laplace)
    patches = [laplace.layer.patches(features[None])[0] for features in asked]
    groups = {"odd": [1, 3, 5], "none": []}
    images, whole = attribute_images(refit, batches, [Question(each) for each in patches], groups)
    optimum, covariance = refit_without(laplace, options, rows, ())
    assert torch.allclose(refit.change + laplace.mean, optimum, atol=1e-9)
    removals = [*([image] for image in range(IMAGES)), groups["odd"], groups["none"]]
    for place, removed in enumerate(removals):
        found, row = (images, place) if place < IMAGES else (whole, place - IMAGES)
        mean, wide = refit_without(laplace, options, rows, removed)
        for number, own in enumerate(patches):
            moved = (own @ (mean - optimum).T).square().sum()
            risen = (((own @ wide) - (own @ covariance)) * own).sum()
            assert float(found.mean[row, number]) == pytest.approx(float(moved), rel=1e-6, abs=1e-12)
            assert float(found.certainty[row, number]) == pytest.approx(float(risen), rel=1e-6, abs=1e-12)
    base = [float(((own @ covariance) * own).sum()) for own in patches]
    assert images.variance.tolist() == pytest.approx(base, rel=1e-8)
    assert images.names == list(range(IMAGES)) and whole.names == ["odd", "none"]
    exact = [float(refit_without(laplace, options, rows, [i])[1].trace()) for i in range(IMAGES)]
    assert len(set(exact)) == IMAGES  # images differ, so that an order is something
    assert spearman(images.share[:, 0], images.certainty[:, 0]) == pytest.approx(1)


def test_maps_are_the_changes_of_single_outputs():
    laplace, options, rows, batches, asked = make_case("convolution")
    refit = Refit.of(laplace)
    own = list(image_rows(refit, batches))[4]
    patches = laplace.layer.patches(asked[:1])[0]
    moved, risen = remove_rows(*own).maps(refit, patches)
    optimum, covariance = refit_without(laplace, options, rows, ())
    mean, wide = refit_without(laplace, options, rows, [4])
    torch.testing.assert_close(moved, patches @ (mean - optimum).T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(risen, ((patches @ (wide - covariance)) * patches).sum(1), rtol=1e-6, atol=1e-10)
    assert (risen >= 0).all()


def test_both_sides_of_the_downdate_agree():
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 8, generator=source, dtype=torch.float64) / 10
    errors = torch.randn(5, 2, generator=source, dtype=torch.float64)
    short, long = remove_rows(rows, errors), remove_sums(rows.T @ rows, rows.T @ errors)
    torch.testing.assert_close(short.change, long.change, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(short.rise, long.rise, rtol=1e-10, atol=1e-12)


def test_other_images_and_other_curvatures_are_refused():
    laplace, _, _, batches, asked = make_case("linear")
    question = [Question(laplace.layer.patches(asked)[0])]
    with pytest.raises(ValueError, match="not those that the posterior was fitted to"):
        attribute_images(Refit.of(laplace), batches[:-1], question)
    with pytest.raises(ValueError, match="curvature is diag"):
        Refit.of(laplace.with_curvature("diag"))
