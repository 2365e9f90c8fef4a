"""The embedded default data set, and what all labelled images share."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from ldm.data.base import Compose, Crop, Flip, LabelledImages, occurrences, split_positions
from ldm.data.digits import Digits


def test_pixels_are_sklearns_on_the_stated_scale():
    data = Digits("all")
    pixels, labels = load_digits(return_X_y=True)
    assert len(data) == 1797 and data.labels.tolist() == labels.tolist()
    for index in (0, 17, 1796):
        item = data[index]
        assert item["image"].shape == data.image_shape == (8, 8, 1) and item["image"].dtype == torch.float32
        rebuilt = (item["image"].double() + 1) * 8  # 0..16 mapped to [-1, 1]
        assert torch.equal(rebuilt.flatten(), torch.tensor(pixels[index]))
        assert item == {**item, "class_label": labels[index], "index": index, "human_label": str(labels[index])}


def test_the_split_is_a_partition_with_a_fifth_of_every_class_held_out():
    train, test, full = (Digits(split) for split in ("train", "test", "all"))
    rows = [{tuple(image.flatten().tolist()) for image in data.images} for data in (train, test, full)]
    assert len(train) + len(test) == 1797
    assert not rows[0] & rows[1] and rows[0] | rows[1] == rows[2]
    counts = full.labels.bincount()
    assert test.labels.bincount().tolist() == [round(0.2 * count) for count in counts.tolist()]


def test_nearest_enlargement_repeats_pixels_and_channels_are_equal():
    small, large = Digits("test"), Digits("test", image_size=16, resize="nearest", channels=3)
    image = large[3]["image"]
    assert image.shape == large.image_shape == (16, 16, 3)
    expected = small[3]["image"].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(image, expected.expand(16, 16, 3))
    smooth = Digits("test", image_size=32)[3]["image"]
    assert smooth.shape == (32, 32, 1) and smooth.min() >= -1 and smooth.max() <= 1


@pytest.mark.parametrize("wrong", [{"split": "val"}, {"image_size": 4}, {"channels": 2}, {"component": 0}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=r"got"):
        Digits(**wrong)
    with pytest.raises(TypeError):
        Digits(sizes=8)


class Ramp(LabelledImages):
    """Twelve 6x6 images whose pixels tell where they were."""

    def read(self, index):
        return torch.arange(36.0).reshape(6, 6, 1) + 100 * index


def ramp(**options) -> Ramp:
    return Ramp([0, 1, 2] * 4, ["a", "b", "c"], (4, 4, 1), transform=Compose(Crop(4, random=True), Flip()), **options)


def images(data: LabelledImages, **loader) -> torch.Tensor:
    return torch.cat([batch["image"] for batch in DataLoader(data, batch_size=5, **loader)])


def test_augmentation_depends_on_seed_epoch_and_index_only():
    data = ramp()
    first = images(data)
    backwards = [data[index]["image"] for index in reversed(range(12))]
    assert torch.equal(first, torch.stack(backwards[::-1]))
    assert not torch.equal(first, images(ramp(seed=1)))
    data.set_epoch(1)
    second = images(data)
    assert not torch.equal(first, second)
    data.set_epoch(0)
    assert torch.equal(first, images(data))


def test_workers_that_outlive_an_epoch_draw_the_next_one():
    data = ramp()
    loader = DataLoader(data, batch_size=5, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        data.set_epoch(epoch)
        from_worker = torch.cat([batch["image"] for batch in loader])
        assert torch.equal(from_worker, images(data))


def test_crop_and_flip_reach_every_outcome():
    image = torch.arange(9.0).reshape(3, 3, 1)
    generator = torch.Generator().manual_seed(0)
    corners = {Crop(2, random=True)(image, generator)[0, 0].item() for _ in range(100)}
    assert corners == {0.0, 1.0, 3.0, 4.0}
    firsts = [Flip()(image, generator)[0, 0].item() for _ in range(400)]
    assert set(firsts) == {0.0, 2.0} and 150 < firsts.count(2.0) < 250  # 5 sigma about 200
    assert Crop(2)(image, generator)[0, 0].item() == 0.0
    with pytest.raises(ValueError, match="cannot crop"):
        Crop(4)(image, generator)


def test_repeats_of_a_selection_are_numbered_and_drawn_apart():
    assert occurrences(torch.tensor([7, 3, 7, 7, 3])).tolist() == [0, 0, 1, 2, 1]
    data = ramp()
    alone = data[4]["image"]
    data.select(torch.tensor([4, 4, 4, 4, 5]))
    assert data.labels.tolist() == [1, 1, 1, 1, 2] and [item["index"] for item in data] == [4, 4, 4, 4, 5]
    assert torch.equal(data[0]["image"], alone)
    assert len({tuple(data[position]["image"].flatten().tolist()) for position in range(4)}) > 1


def test_split_positions_rejects_a_share_outside_its_range():
    with pytest.raises(ValueError, match="test_fraction"):
        split_positions(torch.zeros(4, dtype=torch.int64), "train", 1.0, "x")
    with pytest.raises(ValueError, match=r"0\.\.1"):
        LabelledImages([0, 2], ["a", "b"], (1, 1, 1))
