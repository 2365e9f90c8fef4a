"""Scores of maps against NumPy and small cases by hand; masks and control maps against what they must find."""

import numpy as np
import pytest
import torch

from ldm.laplace import LastLayerLaplace
from ldm.uncertainty import control_maps as control_maps
from ldm.uncertainty import scores
from tests.laplace.laplace_cases import make_batch, make_network

MAPS = torch.rand(3, 2, 8, 12, generator=torch.Generator().manual_seed(0))


def disk(count=2, size=16, x=5):
    """Bright disks of radius 3 on dark ground, at column x + image."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = torch.stack([(rows - 6) ** 2 + (columns - x - i) ** 2 <= 9 for i in range(count)])
    noise = 0.05 * torch.randn(count, size, size, generator=torch.Generator().manual_seed(1))
    return (inside.float() * 1.6 - 0.8 + noise)[:, None], inside


def test_statistics_are_numpys_of_the_channel_mean():
    flat = MAPS.double().mean(1).flatten(1).numpy()
    torch.testing.assert_close(scores.total(MAPS), torch.from_numpy(flat.sum(1)))
    torch.testing.assert_close(scores.mean(MAPS), torch.from_numpy(flat.mean(1)))
    torch.testing.assert_close(scores.variance(MAPS), torch.from_numpy(flat.var(1, ddof=1)))
    torch.testing.assert_close(scores.percentile(MAPS, 90), torch.from_numpy(np.percentile(flat, 90, axis=1)))
    torch.testing.assert_close(scores.total(MAPS.mean(1)), scores.total(MAPS))


def test_patches_and_windows_find_the_greatest_mean():
    maps = torch.zeros(1, 8, 8)
    maps[0, 3, 3] = 4.0
    assert float(scores.patch_max(maps, parts=4)) == 1.0  # patches of 2 x 2
    assert float(scores.window_max(maps, window=3)) == pytest.approx(4 / 9)
    maps[0, 3:5, 3:5] = 4.0  # across the border of four patches
    assert (float(scores.patch_max(maps)), float(scores.window_max(maps, 2))) == (1.0, 4.0)


def test_a_mask_weighs_and_an_empty_one_leaves_the_mean():
    mask = torch.zeros(3, 8, 12)
    mask[0, :4] = 1
    mask[1, 2, 3] = 0.5
    found = scores.within(MAPS, mask)
    flat = MAPS.double().mean(1)
    expected = torch.stack([flat[0, :4].mean(), flat[1, 2, 3], flat[2].mean()])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scores.within(MAPS, torch.ones(3, 16, 24)), scores.mean(MAPS))


def test_masks_find_the_object():
    images, inside = disk()
    assert torch.equal(scores.threshold_mask(images), inside.double())
    saliency = scores.saliency_mask(images)
    assert float(saliency.min()) == 0 and float(saliency.max()) == 1
    near = torch.nn.functional.max_pool2d(inside.float()[:, None], 5, 1, 2)[:, 0].bool()
    assert float(saliency[near].mean()) > 3 * float(saliency[~near].mean())


def test_masks_of_models():
    images, inside = disk()
    logits = torch.stack([(~inside).float(), inside.float(), torch.zeros(inside.shape)], 1)
    assert torch.equal(scores.model_mask(lambda _: {"out": logits})(images), inside.double())
    assert torch.equal(scores.model_mask(lambda _: inside.float()[:, None])(images), inside.double())
    with pytest.raises(ValueError, match="must be"):
        scores.model_mask(lambda _: logits[:, 0] + 3)(images)
    with pytest.raises(ValueError, match="takes no images"):
        scores.model_mask(str.upper)(images)
    with pytest.raises(ValueError, match="gave a int, expected a tensor"):
        scores.model_mask(len)(images)


def test_feature_entropy_is_that_of_independent_normals():
    features = torch.randn(400, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    features = features * torch.tensor([[1.0, 2, 3], [1, 1, 1]])
    found = scores.feature_entropy(features, floor=0)
    exact = [sum(torch.distributions.Normal(0.0, s).entropy() for s in row) for row in ((1.0, 2.0, 3.0), (1.0,) * 3)]
    constant = 1.5 * np.log(2 * np.pi * np.e)
    torch.testing.assert_close(found + constant, torch.stack(exact).double(), atol=0.15, rtol=0)
    assert torch.isfinite(scores.feature_entropy(torch.zeros(2, 1, 4))).all()


def test_every_score_has_a_name_and_ranks_a_louder_map_higher():
    images, _ = disk(3, size=12)
    found = scores.score_table(MAPS, images, scores.MASKS, 95.0, 4)
    louder = scores.score_table(3 * MAPS, images, scores.MASKS, 95.0, 4)
    assert set(found) == {*scores.SCORES, "segmentation_threshold", "segmentation_saliency"}
    for name, value in found.items():
        torch.testing.assert_close(louder[name], value * (9 if name == "variance" else 3))


def test_feature_energy_is_the_isotropic_variance():
    network = make_network()
    batch = make_batch(network, 4)
    laplace = LastLayerLaplace(network, "out.1", curvature="isotropic", prior_precision=2.0).fit([batch])
    features = laplace.features(*batch[:3]).detach()
    energy = control_maps.feature_energy(laplace, features)
    torch.testing.assert_close(energy, laplace.predict(features)[1] * 2.0 * (4 + 1))
    assert energy.shape == (4, 2, 5, 6)


def test_edges_are_slopes():
    ramp = torch.arange(8.0).expand(1, 2, 6, 8) * 0.3
    torch.testing.assert_close(control_maps.edge_strength(ramp)[..., 1:-1, 1:-1], torch.full((1, 1, 4, 6), 0.09))
    assert float(control_maps.edge_strength(torch.ones(1, 1, 5, 5)).max()) == 0


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match=r"expected maps"):
        scores.total(torch.zeros(3))
    with pytest.raises(ValueError, match=r"not finite"):
        scores.total(torch.full((1, 2, 2), float("nan")))
    for refused in (scores.patch_max, lambda maps: scores.window_max(maps, 4)):
        with pytest.raises(ValueError, match=r"have no"):
            refused(torch.zeros(1, 3, 3))
    for refused in (lambda: scores.feature_entropy(torch.zeros(1, 2, 3)), lambda: control_maps.seed_variance(iter, 1)):
        with pytest.raises(ValueError, match=r">= 2|at least 2"):
            refused()
    with pytest.raises(ValueError, match="at least two steps"):
        control_maps.successive_differences([])
