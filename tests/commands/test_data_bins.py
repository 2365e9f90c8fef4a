"""`decu data bins` on every kind of data set, from the files to what a member trains on."""

from __future__ import annotations

import zipfile
from collections import Counter
from io import BytesIO
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.commands.data_bins import MakeBins
from ldm.data.module import DataModuleFromConfig
from ldm.data.subsets import ComponentSubset, list_file, read_subsets
from ldm.util import instantiate_from_config
from tests.cli import call

NAMES = [f"n{number:08d}" for number in range(4)]
COUNT = 5  # images a class


def pictures(folder, names, pattern="{name}/{name}_{index}.JPEG"):
    """Write COUNT small pictures of each class; the one that a file holds is told by its grey value."""
    for number, name in enumerate(names):
        for index in range(COUNT):
            path = folder / pattern.format(name=name, index=index)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (10 * number + index,) * 3).save(path, "png")


def write_idx(root, images, labels):
    """MNIST's two training files."""
    for kind, values in {"images": images, "labels": labels}.items():
        header = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
        (root / f"train-{kind}-idx{values.ndim}-ubyte").write_bytes(header + values.tobytes())


def idx(root):
    write_idx(root, np.zeros((50, 8, 8), np.uint8), np.repeat(np.arange(10, dtype=np.uint8), COUNT))
    return "ldm.data.idx.MNIST", {"root": str(root), "image_size": 8}


def cifar(root):
    records = np.zeros((COUNT * 2, 3073), np.uint8)
    records[:, 0] = np.arange(COUNT * 2) % 10
    for number in range(1, 6):
        (root / f"data_batch_{number}.bin").write_bytes(records.tobytes())
    return "ldm.data.cifar.CIFAR10", {"root": str(root)}


def folder(root):
    pictures(root, NAMES)
    return "ldm.data.folder.ImageFolder", {"root": str(root), "image_size": 8}


def omniglot(root):
    pictures(root / "images_small1", NAMES, "Greek/{name}/{index}.png")
    return "ldm.data.omniglot.Omniglot", {"root": str(root), "split": "all", "image_size": 8}


def tiny_imagenet(root):
    (root / "wnids.txt").write_text("\n".join(NAMES))
    pictures(root / "train", NAMES, "{name}/images/{name}_{index}.JPEG")
    return "ldm.data.tiny_imagenet.TinyImageNet", {"root": str(root), "image_size": 8}


def imagenet(root):
    pictures(root / "data_train" / "data", NAMES)
    return "ldm.data.imagenet.ImageNetTrain", {"data_root": str(root), "config": {"size": 8}}


def bins(target, params, **options):
    """The command that draws bins of a data set."""
    flat = {name: value for name, value in params.items() if name != "config"}
    size = (f"config.size={params['config']['size']}",) if "config" in params else ()
    return MakeBins(target=target, params=(*(f"{name}={value}" for name, value in flat.items()), *size), **options)


@pytest.mark.parametrize("make", [idx, cifar, folder, omniglot, tiny_imagenet, imagenet])
def test_every_data_set_goes_from_files_to_members(make, tmp_path, capsys):
    root, out = tmp_path / "root", tmp_path / "bins"
    root.mkdir()
    target, params = make(root)
    config = {"target": target, "params": params}
    whole = instantiate_from_config(config)
    n = whole.n_classes
    bins(target, params, out=str(out), classes_per_bin=("1:2", f"all:{n - 2}")).run()
    bins(target, params, out=str(out), dataset="masked_classes", hidden_from=3).run()
    capsys.readouterr()
    MakeBins(show=str(out)).run()
    assert capsys.readouterr().out.count("5 members") == 2
    sees = read_subsets(out, "masked_classes").sees
    for component in range(5):
        binned = ComponentSubset(config, str(out), component)
        assert Counter(binned.labels.tolist()) == {
            label: 1 if class_size == 1 else COUNT for label, class_size in binned.bins.items()
        }
        masked = ComponentSubset(config, str(out), component, "masked_classes")
        assert Counter(masked.labels.tolist()) == dict.fromkeys(sees[component], COUNT)
        assert [item["class_label"] for item in masked] == masked.labels.tolist()
    assert Counter(label for classes in sees.values() for label in classes) == dict.fromkeys(range(n), 2)


def test_a_member_trains_on_the_classes_it_sees_even_on_less_than_a_batch(tmp_path):
    target, params = folder(tmp_path)
    config = {"target": target, "params": params}
    out = str(tmp_path / "bins")
    bins(target, params, out=out, dataset="masked_classes", components=3).run()
    bins(target, params, out=out, classes_per_bin=("1:4",)).run()
    masked = read_subsets(tmp_path / "bins", "masked_classes")

    def batches(**chosen):
        subset = {"dataset": config, "folder": str(tmp_path / "bins"), **chosen}
        train = {"target": "ldm.data.subsets.ComponentSubset", "params": subset}
        module = DataModuleFromConfig(batch_size=2 if "dataset_name" in chosen else 16, train=train, num_workers=0)
        module.setup()
        return list(module.train_dataloader())

    for component in range(3):
        seen = batches(component=component, dataset_name="masked_classes")
        assert {int(label) for batch in seen for label in batch["class_label"]} <= set(masked.sees[component])
        alone = batches(component=component)  # one image a class: its bootstrap is that image
        assert len(alone) == 1 and sorted(alone[0]["class_label"].tolist()) == [0, 1, 2, 3]
    whole = list_file(tmp_path / "bins", "binned_classes").read_text()
    assert [list_file(tmp_path / "bins", "binned_classes", one).read_text() for one in range(5)] == [whole] * 5


def test_imagenet_has_the_published_bins_beside_its_images(tmp_path, capsys):
    """The thousand classes by their file list: nothing but names is read."""
    synsets = [f"n{number:08d}" for number in range(1000)]
    part = tmp_path / "imagenet" / "data_train"
    (part / "data").mkdir(parents=True)
    (part / "filelist.txt").write_text(
        "".join(f"{name}/{name}_{index}.JPEG\n" for name in synsets for index in range(101))
    )
    (part / "index_synset.yaml").write_text("".join(f"{999 - place}: {name}\n" for place, name in enumerate(synsets)))
    (tmp_path / "cin.yaml").write_text(
        "paths: {data_root: elsewhere}\n"
        "data: {params: {train: {target: ldm.data.imagenet.ImageNetTrain, "
        "params: {data_root: '${paths.data_root}', comp_numb: 0}}}}\n"
    )
    call("data bins", ["--base", str(tmp_path / "cin.yaml"), f"paths.data_root={tmp_path / 'imagenet'}"])
    assert f"wrote 7 files to {part}" in capsys.readouterr().out
    member = instantiate_from_config(
        {
            "target": "ldm.data.imagenet.ImageNetTrain",
            "params": {"data_root": str(tmp_path / "imagenet"), "comp_numb": 4, "process_images": False},
        }
    )
    assert Counter(member.bins.values()) == {1: 100, 10: 100, 100: 100, "all": 700}
    assert member.subsets.dataset_name == "binned_classes" and member.subsets.members == 5
    expected = [101 if member.bins[label] == "all" else member.bins[label] for label in range(1000)]
    assert member.labels.bincount(minlength=1000).tolist() == expected
    item = member[0]
    assert item["synsets"] == item["relpath"].split("/")[0] == synsets[999 - item["class_label"]]


def test_words_that_change_a_config_need_one(capsys):
    with pytest.raises(SystemExit):
        call("data bins", ["--target", "a.B", "paths.data_root=x"])
    assert "changes a config; give one with --base" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--convert takes published ones"):
        MakeBins(target="a.B", convert="subsets.pkl", rotation=1)


def omniglot_in_small(root):
    """As many characters and drawings as Omniglot's two small parts hold, 50 characters in both, all drawn alike."""
    drawing = BytesIO()
    Image.new("1", (105, 105), 1).save(drawing, "png")
    for part, characters in (("small1", range(136)), ("small2", range(86, 242))):
        with zipfile.ZipFile(root / f"images_background_{part}.zip", "w") as archive:
            for character, index in product(characters, range(20)):
                name = f"images_background_{part}/Greek/character{character:03d}/{index:02d}.png"
                archive.writestr(name, drawing.getvalue())


def mnist_in_small(root):
    """1100 black digits of each class."""
    labels = np.repeat(np.arange(10, dtype=np.uint8), 1100)
    write_idx(root, np.zeros((len(labels), 28, 28), np.uint8), labels)


STAND_INS = {"omniglot": omniglot_in_small, "mnist": mnist_in_small}


@pytest.mark.parametrize(
    ("name", "counts", "class_sizes", "size"),
    [
        ("omniglot", ["1:60", "3:60", "8:60", "all:62"], {1: 60, 3: 60, 8: 60, 20: 62}, 16),
        ("mnist", ["1:3", "10:2", "100:2", "1000:3"], {1: 3, 10: 2, 100: 2, 1000: 3}, 32),
    ],
)
def test_the_configs_of_ensembles(name, counts, class_sizes, size, tmp_path):
    root = tmp_path / name
    root.mkdir()
    STAND_INS[name](root)
    base = f"configs/latent-diffusion/{name}.yaml"
    MakeBins(base=base, classes_per_bin=tuple(counts), out=str(tmp_path), paths=(f"paths.data_root={root}",)).run()
    whole = read_subsets(tmp_path)
    member = ComponentSubset(whole.record["dataset"], str(tmp_path), component=0)
    assert Counter(member.labels.bincount().tolist()) == class_sizes
    assert member[0]["image"].shape == (size, size, 1) and torch.equal(
        member[0]["image"], member[0]["image"].clamp(-1, 1)
    )
