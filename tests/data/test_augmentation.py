"""Non-leaky augmentation against exact cases, another order of the same maps, and the law of its labels."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.data.augmentation import NonLeaky, PaddedCrop, transformed
from ldm.data.base import LabelledImages
from ldm.util import generator


def smooth(size=32, sharpness=6):
    """An image of low frequencies [H, W, 1], -1 towards the border."""
    place = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(place, place, indexing="ij")
    bump = torch.exp(-sharpness * ((x - 0.2) ** 2 + (y + 0.1) ** 2))
    return (2 * bump - 1)[..., None]


def turned(degrees):
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def test_quarter_turns_and_whole_pixels_are_exact_up_to_oversampling():
    image = smooth()
    quarter = transformed(image, turned(90))
    torch.testing.assert_close(quarter, image.rot90(-1, (0, 1)), rtol=0, atol=0.01)
    shift = torch.eye(3, dtype=torch.float64)
    shift[0, 2] = 2 * 4 / 32  # four pixels to the right
    moved = transformed(image, shift)
    torch.testing.assert_close(moved[:, 4:], image[:, :-4], rtol=0, atol=0.01)


def test_a_map_and_its_inverse_give_the_image_back():
    image, matrix = smooth(), turned(37) @ torch.diag(torch.tensor([0.9, 1.1, 1.0], dtype=torch.float64))
    back = transformed(transformed(image, matrix), torch.linalg.inv(matrix))
    torch.testing.assert_close(back[6:-6, 6:-6], image[6:-6, 6:-6], rtol=0, atol=0.03)


def test_without_probability_only_the_mirror_image_is_drawn():
    image, seen = smooth(), set()
    for seed in range(20):
        changed, facts = NonLeaky(0.0)(image, generator("augment", seed))
        labels = facts["augment_labels"]
        assert labels[1:].tolist() == [0.0] * 8
        assert torch.equal(changed, image.flip(1) if labels[0] else image)
        seen.add(float(labels[0]))
    assert seen == {0.0, 1.0}


def test_labels_say_what_happened():
    """The area of a bump follows the scale that the labels name, whatever else happened."""
    image = smooth(64, sharpness=40)
    for seed in range(30):
        changed, facts = NonLeaky(1.0)(image, generator("labels", seed))
        _, _, zoom, cos, sin, along, across, move_x, move_y = facts["augment_labels"].tolist()
        assert (cos + 1) ** 2 + sin**2 == pytest.approx(1.0, abs=1e-5)
        area = float((changed + 1).sum() / (image + 1).sum())
        if max(abs(move_x), abs(move_y), abs(zoom), math.hypot(along, across)) < 1.2:
            assert area == pytest.approx(2 ** (0.4 * zoom), rel=0.12)


def test_frequencies_are_those_asked_for():
    labels = torch.stack(
        [NonLeaky(0.12)(smooth(8), generator("share", seed))[1]["augment_labels"] for seed in range(800)]
    )
    shares = (labels != 0).double().mean(0)
    expected = torch.tensor([0.5, 0.06, *[0.12] * 7], dtype=torch.float64)
    assert bool(((shares - expected).abs() < 4 * (expected * (1 - expected) / 800).sqrt()).all())


def test_labels_travel_with_the_item():
    class One(LabelledImages):
        def read(self, index):
            return smooth(8)

    item = One([0, 0], ["only"], (8, 8, 1), transform=NonLeaky(1.0))[1]
    assert item["augment_labels"].shape == (9,)
    assert item["image"].shape == (8, 8, 1)
    assert torch.equal(One([0, 0], ["only"], (8, 8, 1), transform=NonLeaky(1.0))[1]["image"], item["image"])


def test_padded_crop_moves_an_image():
    image, seen = smooth(8), set()
    for seed in range(40):
        moved = PaddedCrop(2)(image, generator("crop", seed))
        assert moved.shape == image.shape
        y, x = divmod(int(moved.argmax()), 8)
        seen.add((y, x))
    assert len(seen) > 8
