"""Conditions made of images (holes, small copies), and pictures with label maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.conditions import Hole, LowResolution
from ldm.data.digits import Digits
from ldm.data.segmented import SegmentedImages
from ldm.util import generator


def test_a_hole_is_a_rectangle_at_minus_one_and_its_mask_says_where():
    sides, image = set(), torch.rand(12, 8, 2, generator=generator("image"))
    for draw in range(200):
        whole, facts = Hole(0.25, 0.5)(image, generator("hole", draw))
        mask = facts["mask"][..., 0] > 0
        assert torch.equal(whole, image) and set(facts["mask"].unique().tolist()) == {-1.0, 1.0}
        assert bool((facts["masked_image"][mask] == -1).all())
        assert torch.equal(facts["masked_image"][~mask], image[~mask])
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert int(mask.sum()) == int(rows * columns), "a full rectangle"
        sides.add((int(rows), int(columns)))
    assert {rows for rows, _ in sides} == {3, 4, 5, 6} and {columns for _, columns in sides} == {2, 3, 4}
    with pytest.raises(ValueError, match="shares"):
        Hole(0.5, 0.25)


def test_holes_of_a_data_set_differ_between_epochs_and_not_between_runs():
    data, again = (Digits(transform={"target": "ldm.data.conditions.Hole"}) for _ in range(2))
    first = data[0]
    assert torch.equal(first["mask"], again[0]["mask"])
    assert first["masked_image"].shape == first["image"].shape == (8, 8, 1)
    data.set_epoch(1)
    assert not torch.equal(first["mask"], data[0]["mask"])


def test_a_small_copy_is_made_of_means():
    image = torch.arange(32.0).reshape(4, 8, 1)
    _, facts = LowResolution(4)(image, generator("none"))
    assert facts["LR_image"].flatten().tolist() == [image[:, :4].mean(), image[:, 4:].mean()]
    with pytest.raises(ValueError, match="factor of 3"):
        LowResolution(3)(image, generator("none"))


def test_pictures_with_label_maps(tmp_path):
    for folder in ("images/a", "labels/a"):
        (tmp_path / folder).mkdir(parents=True)
    labels = np.repeat(np.arange(3, dtype=np.uint8), 4)[None].repeat(8, 0)  # [8, 12]: three stripes
    colours = np.asarray([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)[labels]
    for number in range(4):
        Image.fromarray(colours).save(tmp_path / f"images/a/{number}.png")
        Image.fromarray(labels).save(tmp_path / f"labels/a/{number}.png")
    where = {"root": str(tmp_path / "images"), "labels_root": str(tmp_path / "labels")}
    data = SegmentedImages(**where, n_labels=3, image_size=8, test_fraction=0.25, split="train")
    item = data[0]
    assert len(data) == 3 and item["image"].shape == (8, 8, 3) and item["segmentation"].shape == (8, 8, 3)
    expected = torch.nn.functional.one_hot(torch.from_numpy(labels[:, 2:10].astype(np.int64)), 3).float()
    assert torch.equal(item["segmentation"], expected), "the middle, like the picture's"
    assert torch.equal(item["image"], 2 * expected - 1)
    assert SegmentedImages(**where, n_labels=3, image_size=4)[0]["segmentation"].sum(-1).unique().tolist() == [1.0]
    with pytest.raises(ValueError, match="n_labels 2"):
        SegmentedImages(**where, n_labels=2, image_size=8)[0]
    (tmp_path / "labels/a/0.png").unlink()
    with pytest.raises(ValueError, match="1 pictures have no label map"):
        SegmentedImages(**where, n_labels=3)
