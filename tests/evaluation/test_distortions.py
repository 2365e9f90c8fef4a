"""Distortions: what they keep, what they change, and that draws belong to images."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from ldm.evaluation.distortions import DISTORTIONS, Distortion, blur, distort, read_distortion
from ldm.util import generator


def images(count=6, channels=1, side=16, key=0):
    size = (count, channels, side, side)
    return torch.randint(256, size, generator=generator("images", key), dtype=torch.uint8)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_strength_zero_changes_nothing_and_one_changes_much(name):
    assert torch.equal(distort(images(), range(6), name, 0.0), images())
    changed = distort(images(channels=3), range(6), name, 1.0)
    assert changed.dtype == torch.uint8 and changed.shape == (6, 3, 16, 16)
    assert (changed != images(channels=3)).double().mean() > 0.5


@pytest.mark.parametrize("name", DISTORTIONS)
def test_image_i_is_distorted_alike_in_any_batch_and_seeds_differ(name):
    whole = distort(images(), range(10, 16), name, 0.6, seed=3)
    assert torch.equal(distort(images()[2:4], [12, 13], name, 0.6, seed=3), whole[2:4])
    if name != "blur":
        assert not torch.equal(distort(images(), range(10, 16), name, 0.6, seed=4), whole)


def test_blur_is_scipys_and_keeps_a_flat_image():
    picture = images(1, 1, 20).double() / 127.5 - 1
    sigma = 0.5 * 0.1 * 20
    expected = gaussian_filter(picture[0, 0].numpy(), sigma, mode="nearest", truncate=4.0)
    np.testing.assert_allclose(blur(picture.float(), 0.5)[0, 0], expected, atol=1e-5)
    flat = torch.full((1, 3, 9, 9), 77, dtype=torch.uint8)
    assert torch.equal(distort(flat, [0], "blur", 1.0), flat)


def test_noise_has_its_strength_as_standard_deviation():
    grey = torch.full((4, 1, 64, 64), 127, dtype=torch.uint8)
    found = distort(grey, range(4), "noise", 0.2).double() / 127.5
    assert float(found.std()) == pytest.approx(0.2, rel=0.02)


def test_more_strength_adds_more_of_the_same_noise():
    grey = torch.full((1, 1, 32, 32), 127, dtype=torch.uint8)
    weak, strong = (distort(grey, [5], "noise", level).double() - 127 for level in (0.1, 0.2))
    assert float((strong - 2 * weak).abs().max()) <= 2.5, "rounding to bytes"


def test_swaps_move_patches_and_keep_their_pixels():
    picture = images(1, 1, 18)
    moved = distort(picture, [0], "swaps", 0.5)
    patches = [
        {tuple(p.flatten().tolist()) for row in x[0, 0, :16, :16].split(4) for p in row.split(4, dim=1)}
        for x in (picture, moved)
    ]
    assert patches[0] == patches[1]
    changed = (picture != moved)[0, 0]
    assert not changed[16:].any() and not changed[:, 16:].any()
    places = sum(bool(p.any()) for row in changed[:16, :16].split(4) for p in row.split(4, dim=1))
    assert places == 8


def test_wrong_names_and_strengths_are_refused():
    for name, strength in (("warp", 0.5), ("blur", 1.5)):
        with pytest.raises(ValueError, match="strength in"):
            distort(images(), range(6), name, strength)
    assert read_distortion("blur:0.5") == Distortion("blur", 0.5)
    with pytest.raises(ValueError, match="NAME:STRENGTH"):
        read_distortion("blur")
