"""Class sizes per class, masked classes, bootstraps, and the files that hold them."""

from __future__ import annotations

import math
import shlex
from collections import Counter

import pytest
import torch
from torch.utils.data import Dataset

from ldm.commands.data_bins import MakeBins
from ldm.data import subsets as S
from ldm.data.digits import Digits
from ldm.data.plans import plan_words, to_yaml
from tests.cli import call

BINS = {1: 3, 10: 2, 50: 2, "all": 3}
DIGITS = {"target": "ldm.data.digits.Digits", "params": {"image_size": 16}}
LABELS = torch.arange(400) % 5


def test_bins_hold_the_stated_number_of_classes_and_depend_on_the_seed():
    bins = S.assign_bins(10, BINS, seed=0)
    assert list(bins) == list(range(10)) and Counter(bins.values()) == BINS
    assert S.assign_bins(10, {"all": 3, 50: 2, 10: 2, 1: 3}, seed=0) == bins
    assert len({tuple(S.assign_bins(10, BINS, seed=seed).values()) for seed in range(5)}) > 1


@pytest.mark.parametrize("counts", [BINS, {1: 2, 5: 3, "all": 5}, {2: 1, 4: 9}])
def test_rotations_show_every_class_at_every_budget(counts):
    rotations = math.ceil(10 / min(counts.values()))
    seen = {label: set() for label in range(10)}
    for rotation in range(rotations):
        bins = S.assign_bins(10, counts, seed=3, rotation=rotation)
        assert Counter(bins.values()) == counts
        for label, class_size in bins.items():
            seen[label].add(class_size)
    assert all(class_sizes == set(counts) for class_sizes in seen.values())


def test_default_bins_are_those_of_the_paper_for_imagenet():
    assert S.default_classes_per_bin(1000) == {1: 100, 10: 100, 100: 100, "all": 700}
    assert S.default_classes_per_bin(10) == BINS
    with pytest.raises(ValueError, match="no default bins for 37"):
        S.default_classes_per_bin(37)


@pytest.mark.parametrize("counts", [{1: 3, 10: 2}, {0: 5, "all": 5}, {"some": 10}, {1: 0, "all": 10}])
def test_impossible_bins_are_refused(counts):
    with pytest.raises(ValueError, match="got"):
        S.assign_bins(10, counts, seed=0)


def test_budgets_are_exact_and_nested():
    previous = {label: [] for label in range(5)}
    for class_size in (1, 3, 8, "all"):
        chosen = S.binned_indices(LABELS, dict.fromkeys(range(5), class_size), seed=7)
        for label in range(5):
            inside = chosen[LABELS[chosen] == label].tolist()
            assert len(set(inside)) == len(inside) == (80 if class_size == "all" else class_size)
            assert inside[: len(previous[label])] == previous[label]
            previous[label] = inside
    alone = S.binned_indices(LABELS, {3: 8}, seed=7).tolist()
    assert alone == previous[3][:8]  # a class's images do not depend on the other classes
    assert alone != S.binned_indices(LABELS, {3: 8}, seed=8).tolist()
    with pytest.raises(ValueError, match="class 2 has 80 images"):
        S.binned_indices(LABELS, {2: 81}, seed=0)


def test_bootstrap_keeps_class_counts_and_draws_as_often_as_theory_says():
    kept = S.binned_indices(LABELS, {0: 1, 1: 10, 2: "all", 3: "all", 4: 20}, seed=0)
    members = [S.draw_bootstrap(kept, LABELS, 0, component) for component in range(30)]
    for drawn in members:
        assert LABELS[drawn].bincount().tolist() == [1, 10, 80, 80, 20]
        assert set(drawn.tolist()) <= set(kept.tolist())
    assert not torch.equal(members[0], members[1])
    # Of n images, n draws with replacement see n (1 - (1 - 1/n)^n) different ones on average; 30 members and 2 classes
    # of 80 give a standard error of about 0.4 images.
    distinct = [len(drawn[(LABELS[drawn] == label)].unique()) for drawn in members for label in (2, 3)]
    assert sum(distinct) / len(distinct) == pytest.approx(80 * (1 - (1 - 1 / 80) ** 80), abs=1.5)


@pytest.mark.parametrize(("classes", "components", "hidden"), [(10, 5, 2), (1000, 5, 1), (7, 3, 2), (13, 10, 4)])
def test_each_class_is_hidden_from_so_many_members_evenly(classes, components, hidden):
    sees = S.assign_masks(classes, components, hidden, seed=0)
    assert [sum(label in seen for seen in sees.values()) for label in range(classes)] == [components - hidden] * classes
    sizes = [len(seen) for seen in sees.values()]
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ValueError, match="hidden_from"):
        S.assign_masks(classes, components, components, seed=0)


def written(folder, data, config=DIGITS, **options):
    plan = S.plan_binned(data.labels, data.class_names, **options)
    S.write_subsets(folder, plan, S.sample_keys(data), config)
    return plan


def test_a_plan_returns_from_disk_as_it_was(tmp_path):
    data = Digits(image_size=16)
    binned = written(tmp_path, data, members=3)
    masked = S.plan_masked(data.labels, data.class_names, 1, members=3)
    S.write_subsets(tmp_path, masked, S.sample_keys(data), DIGITS)
    for plan in (binned, masked):
        read = S.read_subsets(tmp_path, plan.dataset_name)
        assert (read.bins, read.sees, read.class_names) == (plan.bins, plan.sees, plan.class_names)
        assert read.record == {**plan.record, "dataset": DIGITS}
        for component, positions in plan.positions.items():
            assert torch.equal(S.read_member_subset(tmp_path, plan.dataset_name, component, data)[1], positions)
    assert masked.seen_by(0) == [one for one in range(3) if 0 in masked.sees[one]] and len(masked.seen_by(0)) == 2
    assert not list(tmp_path.glob(".*"))


def test_a_list_that_is_cut_off_is_not_the_plans(tmp_path):
    written(tmp_path, Digits())
    path = S.list_file(tmp_path, S.BINNED, 0)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2].rpartition("\n")[0] + "\n")
    with pytest.raises(ValueError, match=r"not the list that .* was written with .* decu data bins .* --overwrite"):
        S.ComponentSubset(DIGITS, str(tmp_path), 0)
    path.write_text(whole)
    assert len(S.ComponentSubset(DIGITS, str(tmp_path), 0)) == whole.count("\n")


def test_a_plan_of_before_it_had_sums_is_the_same_plan(tmp_path):
    plan = written(tmp_path, Digits())
    path = S.subsets_file(tmp_path, S.BINNED)
    assert "lists_sha256" in path.read_text()
    path.write_text(to_yaml(plan, DIGITS))
    assert len(S.ComponentSubset(DIGITS, str(tmp_path), 0))
    written(tmp_path, Digits())  # no conflict


def test_names_of_classes_are_kept_whatever_they_hold(tmp_path):
    names = ["${oc.env:HOME}", "$", "a: b #c", "é", "null"]
    plan = S.plan_binned(LABELS, names, {"all": 5}, members=1)
    S.write_subsets(tmp_path, plan, [str(one) for one in range(400)])
    assert S.read_subsets(tmp_path).class_names == names


def test_a_member_trains_on_its_list(tmp_path):
    data = Digits(image_size=16)
    plan = written(tmp_path, data)
    member = S.ComponentSubset(DIGITS, str(tmp_path), component=2)
    positions = plan.positions[2]
    assert len(member) == len(positions) and torch.equal(member.labels, data.labels[positions])
    assert [item["index"] for item in member] == positions.tolist()
    assert all(torch.equal(item["image"], data[item["index"]]["image"]) for item in member)
    assert (member.n_classes, member.image_shape, member.class_names) == (10, (16, 16, 1), data.class_names)
    assert member.bins == plan.bins
    inside = Digits(subset=str(tmp_path), component=2)
    assert inside.bins == plan.bins and data.bins == {}
    assert torch.equal(inside.labels, member.labels)
    assert [item["index"] for item in inside] == positions.tolist()
    whole = S.ComponentSubset(data, str(tmp_path))
    counts = whole.labels.bincount().tolist()
    full = data.labels.bincount().tolist()
    assert counts == [full[label] if class_size == "all" else class_size for label, class_size in plan.bins.items()]


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path):
    folder = tmp_path / "bins of mine"
    for dataset_name in S.DATASET_NAMES:
        with pytest.raises(ValueError, match=r"decu data bins") as caught:
            S.ComponentSubset(DIGITS, str(folder), component=6, dataset_name=dataset_name)
        command = shlex.split(str(caught.value).partition("decu data bins")[2])
        call("data bins", command)
        assert len(S.ComponentSubset(DIGITS, str(folder), 6, dataset_name)) > 0
    before = S.read_list(S.list_file(folder, S.BINNED, 3), Digits())
    with pytest.raises(ValueError, match=r"0\.\.6") as caught:
        S.ComponentSubset(DIGITS, str(folder), component=7)
    call("data bins", shlex.split(str(caught.value).partition("decu data bins")[2]))
    assert len(S.ComponentSubset(DIGITS, str(folder), component=7)) > 0
    assert torch.equal(S.read_list(S.list_file(folder, S.BINNED, 3), Digits()), before), "the other lists stay"


def test_a_folder_made_for_other_data_is_refused(tmp_path):
    written(tmp_path, Digits())
    with pytest.raises(ValueError, match="made for 1438 images"):
        S.ComponentSubset(Digits("test"), str(tmp_path), 0)
    path = S.list_file(tmp_path, S.BINNED, 0)
    path.write_text("1437\n1438\n")
    with pytest.raises(ValueError, match="first '1438'"):
        S.ComponentSubset(Digits(), str(tmp_path), 0)
    S.subsets_file(tmp_path, S.BINNED).write_text("format: 2\n")
    with pytest.raises(ValueError, match="format: 1"):
        S.ComponentSubset(Digits(), str(tmp_path), 1)


def test_other_content_is_overwritten_only_when_asked(tmp_path):
    data = Digits()
    plan = written(tmp_path, data)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    written(tmp_path, data)  # the same again is no conflict
    with pytest.raises(ValueError, match="--overwrite"):
        written(tmp_path, data, seed=1)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before
    other = S.plan_binned(data.labels, data.class_names, seed=1)
    S.write_subsets(tmp_path, other, S.sample_keys(data), DIGITS, overwrite=True)
    assert S.read_subsets(tmp_path).bins == other.bins != plan.bins
    S.subsets_file(tmp_path, S.BINNED).write_bytes(b"\xff")  # no text at all is other content, too
    with pytest.raises(ValueError, match="--overwrite"):
        written(tmp_path, data)


class Named(Dataset):
    """A data set of files, of another maker: two classes of three."""

    relpaths = ("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "b/3.png")
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    class_names = ("a", "b")
    n_classes = 2
    image_shape = (2, 2, 1)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"image": torch.full((2, 2, 1), float(index)), "class_label": int(self.labels[index]), "index": index}


def test_file_data_sets_are_listed_by_path(tmp_path):
    data = Named()
    plan = S.plan_binned(data.labels, data.class_names, {2: 1, "all": 1}, members=2)
    S.write_subsets(tmp_path, plan, S.sample_keys(data))
    lines = S.list_file(tmp_path, S.BINNED).read_text().split()
    assert sorted(line[0] for line in lines) in (["a", "a", "a", "b", "b"], ["a", "a", "b", "b", "b"])
    member = S.ComponentSubset(data, str(tmp_path), 1)
    assert [data.relpaths[item["index"]] for item in member] == S.list_file(tmp_path, S.BINNED, 1).read_text().split()


def test_make_bins_reads_a_config_and_shows_what_the_files_hold(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(
        "data: {params: {train: {target: ldm.data.digits.Digits, params: {split: test, subset: bins, component: 0}}}}\n"
    )
    MakeBins(base="small.yaml", classes_per_bin=("2:4", "all:6"), components=2, seed=5).run()
    made = capsys.readouterr().out
    read = S.read_subsets("bins")
    assert Counter(read.bins.values()) == {2: 4, "all": 6}
    assert read.record["dataset"]["params"] == {"split": "test"}
    MakeBins(show="bins").run()
    shown = capsys.readouterr().out
    assert shown == made.replace("wrote 4 files to bins\n", "")
    data = Digits("test", subset="bins", component=1)
    row = next(line.split() for line in shown.splitlines() if line.split()[:2] == ["2", "4"])
    small = [item["index"] for item in data if read.bins[item["class_label"]] == 2]
    names = [data.class_names[label] for label, size in read.bins.items() if size == 2]
    assert [one.rstrip(",") for one in row[7:]] == names, "classes by their names"
    assert row[2:5] == ["8", "8", "8"] and row[6] == str(len(set(small)))


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["--target", "a.B", "--base", "c.yaml"],
        ["--target", "a.B", "--classes_per_bin", "x:1"],
        ["--target", "a.B", "--hidden_from", "2"],
        ["--target", "a.B", "--dataset", "masked_classes", "--rotation", "1"],
        ["--target", "a.B", "--components", "0"],
        ["--show", "a", "--seed", "5"],
        ["--show", "a", "--base", "c.yaml"],
    ],
)
def test_make_bins_refuses_what_would_not_act(wrong, capsys):
    with pytest.raises(SystemExit):
        call("data bins", wrong)
    assert "error" in capsys.readouterr().err.lower()


def test_named_classes_have_the_images_they_are_given():
    data = Digits()
    named = {data.class_names[3]: 5, data.class_names[7]: "all"}
    plan = S.plan_binned(data.labels, data.class_names, {1: 4, "all": 4}, members=2, named=named)
    sizes = torch.bincount(data.labels[plan.positions[None]], minlength=10)
    assert sizes[3] == 5 and sizes[7] == (data.labels == 7).sum()
    assert sorted(size for label, size in plan.bins.items() if size == 1) == [1] * 4 and plan.bins[3] == 5
    rest = S.plan_binned(data.labels, data.class_names, members=2, named={data.class_names[3]: 5})
    assert [label for label, size in rest.bins.items() if size != "all"] == [3]
    words = plan_words(plan)
    assert words[words.index("--images_of") + 1] == f"{data.class_names[3]}=5" and words[-2:] == ["1:4", "all:4"]
    with pytest.raises(ValueError, match="whale"):
        S.plan_binned(data.labels, data.class_names, named={"whale": 5})
    with pytest.raises(ValueError, match=f"class {data.class_names[3]} has"):
        S.plan_binned(data.labels, data.class_names, named={data.class_names[3]: 5000})
