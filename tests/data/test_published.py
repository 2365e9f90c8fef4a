"""DECU's published pickles and file lists: read as plans, never run, kept where they lie."""

from __future__ import annotations

import os
import pickle
from collections import Counter

import pytest
import torch

from ldm.commands.data_bins import MakeBins
from ldm.data.imagenet import ImageNetTrain
from ldm.data.prepare.published import (
    parse_bins,
    parse_dataset_name,
    parse_seen_classes,
    plan_published,
    published_plan,
)
from ldm.data.subsets import ComponentSubset, list_file, read_subsets, subsets_file

SYNSETS = [f"n{number:08d}" for number in range(6)]
BINS = {1: SYNSETS[4:], 10: [SYNSETS[0]], 1300: SYNSETS[1:4]}
MASKS = {0: SYNSETS[:4], 1: SYNSETS[2:], 2: SYNSETS[:1]}
COUNT = 12
BROKEN_FILE = "n06596364/n06596364_9591.JPEG"  # left out by the published code as well


@pytest.fixture
def part(tmp_path):
    """A published layout by name alone, its classes numbered against their order."""
    folder = tmp_path / "imagenet" / "data_train"
    (folder / "data").mkdir(parents=True)
    names = [f"{name}/{name}_{index}.JPEG" for name in SYNSETS for index in range(COUNT)]
    (folder / "filelist.txt").write_text("\n".join(names))
    (folder / "index_synset.yaml").write_text("".join(f"{5 - place}: {name}\n" for place, name in enumerate(SYNSETS)))
    (folder / "subsets_binned_classes.pkl").write_bytes(pickle.dumps(BINS, protocol=2))
    (folder / "subsets_masked_classes.pkl").write_bytes(pickle.dumps(MASKS))
    return folder


def full(part, **params) -> ImageNetTrain:
    return ImageNetTrain(process_images=False, data_root=str(part.parent), **params)


def convert(part, kind, **more):
    root = (f"data_root={part.parent}",)
    target, published = "ldm.data.imagenet.ImageNetTrain", str(part / f"subsets_{kind}.pkl")
    MakeBins(target=target, params=root, convert=published, **more).run()


def publish(part, component, names, kind="binned_classes"):
    list_file(part, kind, component).write_text("\n".join(names))


def images(synset, *numbers):
    return [f"{synset}/{synset}_{number}.JPEG" for number in numbers]


def test_bins_become_a_plan_with_lists_drawn_from_them(part):
    convert(part, "binned_classes")
    plan = read_subsets(part)
    assert plan.bins == {5: 10, 4: "all", 3: "all", 2: "all", 1: 1, 0: 1}
    assert plan.members == 5 and plan.record["source"] == "subsets_binned_classes.pkl"
    for component in range(5):
        member = full(part, comp_numb=component)
        assert member.labels.bincount().tolist() == [1, 1, COUNT, COUNT, COUNT, 10]
        assert member.bins == plan.bins
        subset = ComponentSubset(full(part), str(part), component)
        assert torch.equal(subset.labels, member.labels)
    before = {path: path.read_bytes() for path in part.glob("*") if path.is_file()}
    convert(part, "binned_classes")  # the same again is no conflict
    assert {path: path.read_bytes() for path in part.glob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="--overwrite"):
        convert(part, "binned_classes", seed=1)


def test_masks_become_a_plan_that_says_who_saw_what(part, capsys):
    convert(part, "masked_classes")
    plan = read_subsets(part, "masked_classes")
    hidden = ", ".join(plan.class_names[:2])
    assert f"member 0 sees 4 classes; hidden: {hidden}\n" in capsys.readouterr().out
    assert plan.sees == {0: [2, 3, 4, 5], 1: [0, 1, 2, 3], 2: [5]} and plan.seen_by(5) == [0, 2]
    for component, classes in plan.sees.items():
        member = full(part, comp_numb=component, dataset_name="masked_classes")
        assert Counter(member.labels.tolist()) == dict.fromkeys(classes, COUNT)
        assert member.subsets.sees == plan.sees


def test_published_lists_are_kept_and_missing_ones_drawn(part, capsys):
    lists = {
        0: images(SYNSETS[4], 3) + images(SYNSETS[5], 1) + images(SYNSETS[0], 0, 0, 1) + [BROKEN_FILE],
        2: images(SYNSETS[4], 3) + images(SYNSETS[5], 1) + images(SYNSETS[0], 2, 1, 1),
    }
    for component, names in lists.items():
        publish(part, component, names)
    texts = {one: list_file(part, "binned_classes", one).read_bytes() for one in lists}
    assert full(part, comp_numb=2).subsets.members == 3  # before any conversion: from the pickle
    convert(part, "binned_classes")
    assert "kept 2 published lists" in capsys.readouterr().out
    assert {one: list_file(part, "binned_classes", one).read_bytes() for one in lists} == texts
    plan = read_subsets(part)
    assert plan.members == 3 and plan.record["published_lists"] == [0, 2]
    # Without a list of its own, the subset is what the members saw together; the missing member's is drawn from it.
    whole = [full(part).relpaths[one] for one in ComponentSubset(full(part), str(part)).positions.tolist()]
    assert whole == sorted(set(lists[0] + lists[2]) - {BROKEN_FILE})
    assert set(list_file(part, "binned_classes", 1).read_text().split()) <= set(whole)
    assert [item["relpath"] for item in full(part, comp_numb=0)] == lists[0][:-1]
    convert(part, "binned_classes")
    convert(part, "binned_classes", seed=4, overwrite=True)  # draws member 1 anew, and keeps the published ones
    assert {one: list_file(part, "binned_classes", one).read_bytes() for one in lists} == texts


def test_elsewhere_the_lists_are_copied(part, tmp_path):
    publish(part, 0, images(SYNSETS[1], 0, 5, 5))
    convert(part, "binned_classes", out=str(tmp_path / "bins"), components=1)
    copy = list_file(tmp_path / "bins", "binned_classes", 0).read_text().split()
    assert copy == images(SYNSETS[1], 0, 5, 5) and not subsets_file(part, "binned_classes").exists()


def test_lists_of_another_split_are_refused(part):
    publish(part, 0, images(SYNSETS[4], 3))
    publish(part, 1, images(SYNSETS[4], 2))  # two images of a class with one
    with pytest.raises(ValueError, match=r"2 images of class n00000004, its bin in .* is 1: .* different splits"):
        convert(part, "binned_classes")
    publish(part, 2, images(SYNSETS[3], 1), "masked_classes")
    with pytest.raises(ValueError, match="member 2 names images of class n00000003"):
        convert(part, "masked_classes")
    assert not list(part.glob("*.yaml.partial")) and not subsets_file(part, "masked_classes").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: SYNSETS[:5], 1300: [*SYNSETS[5:], "n99999999"]}, "1 unknown, such as n99999999"),
        ({1: SYNSETS[:5]}, "1 missing, such as n00000005"),
        ({1: SYNSETS, 10: SYNSETS[:2]}, "2 named twice, such as n00000000"),
        ({0: SYNSETS[:3], 1: SYNSETS[3:]}, "under a number of images"),
        ([SYNSETS], "got list"),
    ],
)
def test_bins_that_do_not_fit_are_refused(part, content, message):
    (part / "subsets_binned_classes.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        convert(part, "binned_classes")
    assert not subsets_file(part, "binned_classes").exists()


def test_masks_that_do_not_fit_are_refused(part):
    with pytest.raises(ValueError, match=r"members 0, 1, \.\.\.; got \[1, 2\]"):
        parse_seen_classes({1: SYNSETS, 2: SYNSETS}, SYNSETS)
    with pytest.raises(ValueError, match="unknown ones, such as n1"):
        parse_seen_classes({0: ["n1"]}, SYNSETS)
    with pytest.raises(ValueError, match="masks of 3 members, got members=4"):
        published_plan(part / "subsets_masked_classes.pkl", "masked_classes", SYNSETS, 72, members=4)


def test_the_kind_is_in_the_name_or_must_be_said(part, tmp_path):
    assert (
        parse_dataset_name("a/subsets_masked_classes.pkl") == "masked_classes"
        and parse_dataset_name("a/subsets.pkl") is None
    )
    other = tmp_path / "subsets.pkl"
    other.write_bytes(pickle.dumps(BINS))
    with pytest.raises(ValueError, match="--dataset"):
        plan_published(other, full(part))
    assert plan_published(other, full(part), "binned_classes").bins == parse_bins(BINS, full(part).class_names)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_something_is_refused_before_it_runs(part, tmp_path, protocol):
    path = part / "subsets_binned_classes.pkl"
    path.write_bytes(pickle.dumps({1: [Malicious(tmp_path / "made")]}, protocol))
    publish(part, 0, images(SYNSETS[4], 3))
    for read in (lambda: convert(part, "binned_classes"), lambda: full(part, comp_numb=0)):
        with pytest.raises(ValueError, match=r"subsets_binned_classes\.pkl must be a pickle of plain values"):
            read()
    assert not (tmp_path / "made").exists()


def test_a_pickle_that_claims_memory_is_refused(tmp_path):
    for claim in (b"\x80\x04]r\xff\xff\xff\x7f.", b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00."):
        (tmp_path / "subsets_binned_classes.pkl").write_bytes(claim)
        with pytest.raises(ValueError, match="refused"):
            published_plan(tmp_path / "subsets_binned_classes.pkl", "binned_classes", SYNSETS, 72)


def test_a_missing_plan_beside_a_pickle_names_the_conversion(part):
    with pytest.raises(ValueError, match=r"--convert .*subsets_masked_classes\.pkl"):
        full(part, comp_numb=1, dataset_name="masked_classes")
    with pytest.raises(ValueError, match=r"--convert .*subsets_binned_classes\.pkl --components 7"):
        ComponentSubset(full(part), str(part), component=6)
