"""A data set of somebody's own: what it lacks is found out, what is wrong is said, and the commands take it."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from ldm.commands.data_bins import MakeBins
from ldm.data.digits import Digits
from ldm.data.own import OwnImages, build_dataset, complete_dataset, splits_of
from ldm.data.subsets import ComponentSubset


class Plain(Dataset):
    """Ten lines of somebody's: items and a length, nothing else."""

    def __init__(self, count=12, image=None):
        self.count, self.image = count, image

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.full((4, 4, 1), index / 12, dtype=np.float32) if self.image is None else self.image
        return {"image": image, "class_label": index % 3}


def test_what_it_lacks_is_read_from_its_items():
    data = OwnImages(Plain())
    assert data.labels.tolist() == [0, 1, 2] * 4 and data.image_shape == (4, 4, 1)
    assert data.class_names == ["0", "1", "2"] == data.human_names and data.n_classes == 3
    assert data[4]["index"] == 4 and data[4]["human_label"] == "1" and data.count == 12
    assert isinstance(data[4]["image"], torch.Tensor), "whatever the images are, commands read tensors"
    assert complete_dataset(Plain()).labels.tolist() == data.labels.tolist()
    whole = Plain()
    whole.labels, whole.class_names, whole.n_classes, whole.image_shape = data.labels, ["a", "b", "c"], 3, (4, 4, 1)
    assert isinstance(complete_dataset(whole)[4]["image"], torch.Tensor), "also of one that says all the rest"


def test_what_it_says_is_taken():
    plain = Plain()
    plain.class_names, plain.labels = ["a", "b", "c", "d"], torch.zeros(12, dtype=torch.int64)
    data = OwnImages(plain)
    assert data.n_classes == 4 and data.labels.tolist() == [0] * 12 and data[0]["human_label"] == "a"


def test_bins_are_drawn_of_it_and_members_see_them(tmp_path):
    MakeBins(target="tests.data.test_own.Plain", natural=True, components=2, out=str(tmp_path)).run()
    seen = ComponentSubset(OwnImages(Plain()), str(tmp_path), component=1)
    assert seen.labels.bincount().tolist() == [4, 4, 4]
    assert all(seen[place]["class_label"] == seen.labels[place] for place in range(len(seen)))


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ((1, 2), "the first is a tuple"),
        ({"image": np.zeros((4, 4, 1))}, "a mapping of image"),
        ({"image": np.zeros((3, 4, 4)), "class_label": 0}, r"\[3, 4, 4\]"),
        ({"image": np.full((4, 4, 3), 200, dtype=np.uint8), "class_label": 0}, "torch.uint8 from 200 to 200"),
        ({"image": np.full((4, 4, 3), 2.0), "class_label": 0}, "from 2 to 2"),
    ],
)
def test_items_that_the_commands_cannot_read_are_refused(item, said):
    with pytest.raises(ValueError, match=said):
        OwnImages([item])


@pytest.mark.parametrize("target", ["torch.get_num_threads", "torch.is_grad_enabled"])
def test_what_is_no_data_set_is_refused(target):
    with pytest.raises(ValueError, match=f"{target} gives a (int|bool), which is no data set"):
        build_dataset({"target": target})


def test_data_sets_of_the_project_stay_as_they_are():
    assert isinstance(build_dataset({"target": "ldm.data.digits.Digits", "params": {"split": "test"}}), Digits)


@pytest.mark.parametrize("config", [{}, {"data": None}, {"data": {"params": {"train": None}}}])
def test_a_config_without_images_says_which_split_it_lacks(config):
    with pytest.raises(ValueError, match=r"no data.params.train, whose images this reads: write one with `bases`"):
        splits_of(config, "train")
    with pytest.raises(ValueError, match="reads: give another"):
        splits_of(config, "train", remedy="give another")
    own = {"data": {"params": {"size": 3, "train": {"params": {"n": "${data.params.size}"}}}}}
    assert splits_of(own, "train")["train"] == {"params": {"n": 3}}
    whole = {"paths": {"root": "here"}, "data": {"params": {"train": {"params": {"root": "${paths.root}"}}}}}
    for config in (whole, OmegaConf.create(whole)):
        assert splits_of(config, "train")["train"]["params"] == {"root": "here"}, "from another section of the config"
