"""ImageNet's published layout, with three synsets of tiny images."""

from __future__ import annotations

import pickle

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.commands.data_bins import MakeBins
from ldm.data.imagenet import ImageNetTrain, ImageNetValidation, read_human_names, read_synsets
from ldm.data.prepare.published import subsets_from_pickle
from ldm.util import instantiate_from_config

SYNSETS = ("n01440764", "n01443537", "n06596364")


@pytest.fixture
def root(tmp_path):
    for part, count in (("data_train", 4), ("data_val", 2)):
        names = []
        for number, synset in enumerate(SYNSETS):
            for index in range(count):
                names.append(f"{synset}/{synset}_{index}.JPEG")
                path = tmp_path / part / "data" / names[-1]
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40 + 10 * index, 30), (50 * number, 100, 200)).save(path, "png")
        names.append("n06596364/n06596364_9591.JPEG")
        (tmp_path / part / "filelist.txt").write_text("\n".join(reversed(names)) + "\n")
        (tmp_path / part / "synset_human.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    return tmp_path


def test_items_are_as_published(root):
    data = ImageNetTrain(data_root=str(root), config={"size": 24})
    assert len(data) == 12 and data.n_classes == 3 and data.image_shape == (24, 24, 3)
    assert data.relpaths[0] == "n06596364/n06596364_3.JPEG" and data.labels.tolist() == [2] * 4 + [1] * 4 + [0] * 4
    item = data[8]
    path = root / "data_train/data/n01440764/n01440764_3.JPEG"
    expected = {"class_label": 0, "relpath": "n01440764/n01440764_3.JPEG", "synsets": "n01440764", "index": 8}
    assert item == {**item, **expected, "human_label": "tench, Tinca tinca", "file_path_": str(path)}
    colour = torch.tensor([0.0, 100.0, 200.0]) / 127.5 - 1
    torch.testing.assert_close(item["image"], colour.expand(24, 24, 3))
    assert data[0]["human_label"] == "n06596364"  # without a readable name
    assert "image" not in ImageNetTrain(False, str(root))[8]


def test_class_numbers_come_from_the_index_where_present(root):
    (root / "data_val/index_synset.yaml").write_text("0: n06596364\n1: n01440764\n2: n00000001\n3: n01443537\n")
    data = ImageNetValidation(overwrite_root=str(root), data_root="/absent", config={"size": 16})
    assert data.n_classes == 4 and data.labels.unique().tolist() == [0, 1, 3]
    assert data[0]["synsets"] == "n06596364" and data[0]["class_label"] == 0
    (root / "data_val/index_synset.yaml").write_text("0: n06596364\n2: n01440764\n")
    with pytest.raises(ValueError, match="must map the classes 0, 1"):
        ImageNetValidation(data_root=str(root))


def test_crops_are_random_in_training_and_central_in_validation(root):
    gradient = torch.arange(60, dtype=torch.uint8).repeat(30, 1)
    for part in ("data_train", "data_val"):
        Image.fromarray(gradient.numpy()).convert("RGB").save(
            root / part / "data" / SYNSETS[0] / f"{SYNSETS[0]}_1.JPEG", "png"
        )

    def columns(kind, **config):
        data = kind(data_root=str(root), config={"size": 30, **config})
        index = data.relpaths.index(f"{SYNSETS[0]}/{SYNSETS[0]}_1.JPEG")
        found = set()
        for epoch in range(15):
            data.set_epoch(epoch)
            found.add(round(float((data[index]["image"][0, 0, 0] + 1) * 127.5)))
        return found

    assert columns(ImageNetValidation) == {15} == columns(ImageNetTrain, random_crop=False)
    assert len(columns(ImageNetTrain)) > 5 and len(columns(ImageNetValidation, random_crop=True)) > 5


def test_a_config_as_omegaconf_gives_it(root):
    config = OmegaConf.create(
        {"target": "ldm.data.imagenet.ImageNetTrain", "params": {"data_root": str(root), "config": {"size": 16}}}
    )
    assert instantiate_from_config(config)[0]["image"].shape == (16, 16, 3)
    with pytest.raises(ValueError, match="degradation"):
        ImageNetTrain(data_root=str(root), config={"degradation": "bsrgan"})
    with pytest.raises(ValueError, match="needs data_root"):
        ImageNetTrain()
    with pytest.raises(
        ValueError, match=r"decu data prepare --dataset imagenet --root data\nand set it to data/imagenet"
    ):
        ImageNetTrain(data_root=str(root / "elsewhere"))


def test_the_config_of_decus_own_files_says_the_part_again(root):
    """nwaftp23/DECU, cin256-v2.yaml: `train: true` beside the size of ImageNetTrain, `false` of ImageNetValidation."""
    for kind, part in ((ImageNetTrain, True), (ImageNetValidation, False)):
        assert len(kind(data_root=str(root), config={"size": 16, "train": part})) == len(kind(data_root=str(root)))
        with pytest.raises(ValueError, match=f"config says train: {not part}, and this is data_"):
            kind(data_root=str(root), config={"size": 16, "train": not part})


def test_a_member_reads_its_published_list_and_bins(root):
    folder = root / "data_train"
    listed = ["n01443537/n01443537_1.JPEG"] * 2 + ["n06596364/n06596364_9591.JPEG", "n01440764/n01440764_0.JPEG"]
    (folder / "filelist_comp3_binned_classes.txt").write_text("\n".join(listed))
    bins = {1: ["n01440764"], 10: [], 100: ["n01443537"], 1300: ["n06596364"]}
    (folder / "subsets_binned_classes.pkl").write_bytes(pickle.dumps(bins, protocol=2))
    data = ImageNetTrain(data_root=str(root), comp_numb=3, config={"size": 16})
    assert [item["relpath"] for item in data] == [listed[0], listed[1], listed[3]]
    assert data.labels.tolist() == [1, 1, 0]
    assert data.bins == {0: 1, 1: 100, 2: "all"}
    with pytest.raises(ValueError, match=r"decu data bins .*--components 8"):
        ImageNetTrain(data_root=str(root), comp_numb=7)


def test_make_bins_writes_the_lists_that_a_member_reads(root, capsys):
    train = {"target": "ldm.data.imagenet.ImageNetTrain", "params": (f"data_root={root}",)}
    counts = {"classes_per_bin": ("1:1", "2:1", "all:1"), "components": 2}
    MakeBins(**train, out=str(root / "data_train"), **counts).run()
    member = ImageNetTrain(data_root=str(root), comp_numb=1, config={"size": 16})
    counts = member.labels.bincount().tolist()
    assert counts == [4 if member.bins[label] == "all" else member.bins[label] for label in range(3)]
    subset = ImageNetTrain(data_root=str(root), synset_bins=True)
    assert sorted(counts) == [1, 2, 4] and subset.labels.bincount().tolist() == counts
    assert len({item["relpath"] for item in ImageNetTrain(False, str(root), synset_bins=True)}) == 7


def test_labels_fall_back_to_the_numbered_file_only_for_the_thousand_classes(root):
    for part in ("data_val",):
        (root / part / "synset_human.txt").unlink()
        text = "{" + ",\n ".join(f"{number}: 'class {number}'" for number in range(1000)) + "}"
        (root / part / "imagenet1000_clsidx_to_labels.txt").write_text(text)
    assert ImageNetValidation(data_root=str(root)).human_names == list(SYNSETS)
    synsets = [*SYNSETS, *(f"n{number:08d}" for number in range(90_000_000, 90_000_997))]
    (root / "data_val/index_synset.yaml").write_text(
        "".join(f"{label}: {name}\n" for label, name in enumerate(synsets))
    )
    names = ImageNetValidation(data_root=str(root)).human_names
    assert names == [f"class {number}" for number in range(1000)]


@pytest.mark.parametrize("content", [[1], {"1": ["n0"]}, {1: "n0"}, {1: [2]}, {1: [torch.zeros(1)]}])
def test_other_pickles_are_refused(tmp_path, content):
    path = tmp_path / "subsets.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="must"):
        subsets_from_pickle(path)


@pytest.mark.parametrize("name", ["synset_human.txt", "index_synset.yaml"])
def test_a_damaged_list_of_names_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"n01440764 tench\n\xff\xfe\xfa")
    read = read_synsets if name.endswith("yaml") else lambda path: read_human_names(path.parent, ["n01440764"])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read(tmp_path / name)
