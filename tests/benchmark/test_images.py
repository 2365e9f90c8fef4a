"""Which images worlds have, and the real images of a benchmark."""

import pytest
import torch

from ldm.benchmark.images import KNOWN_CLASSES, LEFT_OUT_CLASS, change_images, cut_photographs, read_benchmark_images
from ldm.benchmark.settings import BenchmarkSettings, World

SETTINGS = BenchmarkSettings()


def test_a_world_without_a_class_has_all_others(images):
    every = images.labels.bincount()
    _, labels = images.subset(World("out", 3), SETTINGS)
    expected = every.clone()
    expected[3] = 0
    assert labels.bincount(minlength=10).tolist() == expected.tolist()
    assert images.subset(World("few", 0), SETTINGS)[1].bincount()[:3].tolist() == [10, 10, 10]


def test_real_images_were_never_trained_on_and_are_the_same_at_a_seed(images):
    sets = images.real_sets(SETTINGS, 4)
    assert {len(own) for own in sets.values()} == {SETTINGS.reals}
    for name in (KNOWN_CLASSES, LEFT_OUT_CLASS):
        places = torch.cdist(sets[name].double(), images.tests.double()).argmin(1)
        torch.testing.assert_close(images.tests[places], sets[name])
        assert bool(((images.test_labels[places] == 4) == (name == LEFT_OUT_CLASS)).all())
    again = images.real_sets(SETTINGS, 4)
    assert all(torch.equal(own, again[name]) for name, own in sets.items())
    assert not torch.equal(sets[KNOWN_CLASSES], images.real_sets(SETTINGS, 5)[KNOWN_CLASSES])


def test_changed_images_keep_what_they_should():
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    changed = change_images(images)
    torch.testing.assert_close(changed["turned"].rot90(-1, (2, 3)), images)
    torch.testing.assert_close(-changed["inverted"], images)
    flat = change_images(torch.full((1, 1, 8, 8), 0.3))["blurred"]
    torch.testing.assert_close(flat, torch.full((1, 1, 8, 8), 0.3))
    assert float(changed["blurred"].var()) < float(images.var())


def test_photographs_are_patches_of_any_size():
    for shape in ((1, 8, 8), (3, 32, 32), (1, 64, 64)):
        patches = cut_photographs(shape, 3, 0)
        assert patches.shape == (3, *shape)
        assert -1 <= float(patches.min()) < float(patches.max()) <= 1


def test_images_of_a_config_are_cut_and_resized():
    digits = "ldm.data.digits.Digits"
    given = {
        "images_per_class": 5,
        "train": {"target": digits, "params": {"image_size": 10}},
        "test": {"target": digits, "params": {"image_size": 10, "split": "test"}},
        "others": {
            "small and coloured": {"target": digits, "params": {"channels": 3, "split": "test"}},
            "dark ink": {"target": digits, "params": {"split": "test"}, "invert": True},
        },
    }
    read = read_benchmark_images(given)
    assert read.train.shape == (50, 100)
    assert read.labels.bincount().tolist() == [5] * 10
    assert read.shape == (1, 10, 10)
    assert read.real_sets(BenchmarkSettings(reals=4), 0)["small and coloured"].shape == (4, 100)
    ink = {name: float((images > 0).float().mean()) for name, images in read.given.items()}
    assert ink["dark ink"] > 0.5 > ink["small and coloured"]  # most of a digit's pixels are background
    with pytest.raises(ValueError, match=r"others\.a\.invert is true or false, got 'yes'"):
        read_benchmark_images({"others": {"a": {"target": digits, "invert": "yes"}}})
