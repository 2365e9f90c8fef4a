"""The uncertainty commands' options on a tiny random ensemble: what each writes, states, resumes and refuses."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint import load_state_dict
from ldm.commands.rollout import Rollout
from ldm.commands.sample_members import SampleMembers
from ldm.commands.shared import EnsembleSource, Placement
from ldm.commands.uncertainty_classes import UncertaintyClasses
from ldm.commands.uncertainty_pixels import UncertaintyPixels
from ldm.report.tables import read_comments, read_csv
from ldm.settings import Branching, Sampling
from tests.cli import call
from tests.ensembles import write_ensemble

CPU = Placement("cpu")


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    return EnsembleSource(str(write_ensemble(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    sees = {0: [0, 1, 2], 1: [0, 1, 2], 2: [1, 2], 3: [1, 2]}
    record = {"split": "masked_classes", "bins": dict.fromkeys(range(10), "all"), "sees": sees}
    folder = write_ensemble(tmp_path_factory.mktemp("masked"), members=4, **record)
    return EnsembleSource(str(folder), dataset="masked_classes")


def measure(ensemble, out, *classes, **options):
    """The folder of the measured classes; two noises each unless said otherwise."""
    options = {"n": 2, "place": CPU, **options}
    return UncertaintyClasses(ensemble, classes=classes, out=str(out), **options).run()


@pytest.fixture(scope="module")
def walked(ensemble, tmp_path_factory):
    """Everything at once, at two branch points; by the words of the command line."""
    words = "--branch_at 0 0.5 --classes 0 1 2 5 --n 2 --curve --diversity --keep_images grid tensors --device cpu"
    out = tmp_path_factory.mktemp("walked")
    return call("uncertainty classes", ["--path", ensemble.path, "--out", out, *words.split()])


def test_the_curve_begins_with_the_table_and_ends_before_ln_m(walked):
    for branch in (0, 2):
        folder = walked / f"samps_uncs_branch{branch}"
        table, curve = read_csv(folder / "uncertainty.csv"), read_csv(folder / "curve.csv")
        assert len(curve) == 4 * (4 - branch)
        first = {line["class"]: line for line in curve if line["kind"] == "one-step"}
        last = {line["class"]: line for line in curve if line["step"] == 3}
        for row in table:
            assert first[row["class"]]["mi_mean"] == row["mi_mean"] and first[row["class"]]["step"] == branch
            assert last[row["class"]]["mi_mean"] == row["multistep_mean"] <= math.log(3)
            assert row["mi_low"] <= row["mi_mean"] <= row["mi_high"]
        for name in ("uncertainty", "distributions", "curve"):
            assert Image.open(folder / f"{name}.png").size[0] > 300


def test_outputs_state_the_distance_its_scale_and_both_kinds(walked):
    folder = walked / "samps_uncs_branch2"
    comments = " | ".join(read_comments(folder / "uncertainty.csv"))
    for words in (
        "distance_scale: sum",
        "squared latent units, summed",
        "one-step",
        "between chains that have branched",
    ):
        assert words in comments
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["settings"]["distance_scale"] == "sum" and summary["settings"]["branch_step"] == 2
    assert summary["spearman"]["low"] is None, "four classes are too few for an interval"
    assert -1 <= summary["spearman"]["estimate"] <= 1
    assert -1 <= summary["spearman"]["ceiling"] < 0 and 0 <= summary["auroc"]["estimate"] <= 1
    assert json.loads((folder / "record.json").read_text())["settings"]["distance_scale"] == "sum"


def test_branch_points_are_joined_by_bin(walked):
    joined = read_csv(walked / "by_branch.csv")
    assert [(line["branch_step"], str(line["bin"])) for line in joined] == [
        (branch, name) for branch in (0, 2) for name in ("1", "10", "all")
    ]
    table = read_csv(walked / "samps_uncs_branch2" / "uncertainty.csv")
    own = [row["ssim"] for row in table if row["bin"] == "all"]
    assert joined[-1]["ssim"] == pytest.approx(np.mean(own)) and joined[-1]["classes"] == len(own)
    assert (walked / "by_branch_mi.png").exists() and (walked / "by_branch_ssim.png").exists()


@pytest.mark.slow
def test_pictures_and_tensors_are_kept_when_asked(walked, ensemble, tmp_path):
    kept = walked / "samps_uncs_branch0" / "kept"
    assert {file.name for file in kept.iterdir()} == {
        f"class{label}.{kind}" for label in (0, 1, 2, 5) for kind in ("png", "safetensors")
    }
    tensors = load_state_dict(kept / "class5.safetensors")
    assert tensors["latents"].shape == (3, 2, 1, 8, 8) and tensors["distances"].shape == (3, 3, 2)
    assert not (measure(ensemble, tmp_path, 0) / "kept").exists()
    for kind, file in (("grid", "class0.png"), ("tensors", "class0.safetensors")):
        assert (measure(ensemble, tmp_path, 0, keep_images=(kind,)) / "kept" / file).exists()


@pytest.mark.slow
def test_two_shards_are_one_run(ensemble, tmp_path, monkeypatch, capsys):
    whole = measure(ensemble, tmp_path / "whole", *range(5), classes_at_once=1)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    for task in (1, 0):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        shared = measure(ensemble, tmp_path / "shared", *range(5), classes_at_once=1)
        assert (shared / "uncertainty.csv").exists() == (task == 0)
    assert (shared / "uncertainty.csv").read_bytes() == (whole / "uncertainty.csv").read_bytes()
    assert "the one that finishes last" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_run_continues(ensemble, tmp_path):
    rounds = {"classes_at_once": 1, "ci_width": 1e-9, "max_n": 5}
    table = (measure(ensemble, tmp_path, 0, 1, 2, **rounds) / "uncertainty.csv").read_bytes()
    files = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("classes_*/[0-9].json")}
    (next(tmp_path.glob("classes_*")) / "1.json").unlink()
    assert (measure(ensemble, tmp_path, 0, 1, 2, **rounds) / "uncertainty.csv").read_bytes() == table
    again = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("classes_*/[0-9].json")}
    assert [name for name in files if files[name] != again[name]] == ["1.json"]
    assert {row["n"] for row in read_csv(tmp_path / "uncertainty.csv")} == {5}


@pytest.mark.slow
def test_members_that_were_replaced_are_measured_anew(tmp_path):
    """What was measured of the members before them, in the same folder, is not taken for theirs."""
    found = []
    for spread in (0.1, 1.0, 1.0):
        write_ensemble(tmp_path, spread=torch.full((11,), spread))
        out = UncertaintyClasses(EnsembleSource(str(tmp_path)), classes=(1,), place=CPU).run()
        found.append((read_csv(out / "uncertainty.csv")[0]["mi_mean"], len(list(out.glob("classes_*")))))
    assert float(found[0][0]) < float(found[1][0])
    assert [count for _, count in found] == [1, 2, 2] and found[1] == found[2]


def test_quickrun_spreads_over_the_bins_and_published_scores_five(ensemble, tmp_path):
    published = replace(ensemble, published=True)
    out = measure(published, tmp_path, n=None, quickrun=True, sampling=Sampling(steps=4))
    table = read_csv(out / "uncertainty.csv")
    assert [str(row["bin"]) for row in table] == ["1"] * 3 + ["10"] * 3 + ["all"] * 2
    assert {row["n"] for row in table} == {5}
    settings = json.loads((tmp_path / "record.json").read_text())["settings"]
    assert (settings["scale"], settings["spacing"], settings["branch_step"]) == (5.0, "published", 3)


@pytest.mark.slow
def test_scales_and_distances_act(ensemble, tmp_path):
    noisy = {"sampling": Sampling(eta=1.0)}
    scales = {"mean": {"distance_scale": "mean"}, "part": {"distance_scale": 1 / 64}}
    scales["kl"] = {"distance": "kl"}
    scales["sum"] = {}
    found = {
        name: read_csv(measure(ensemble, tmp_path / name, 0, **noisy, **scale) / "uncertainty.csv")[0]
        for name, scale in scales.items()
    }
    assert found["mean"]["mi_mean"] == pytest.approx(found["part"]["mi_mean"])
    # With one variance v for all members KL = gap^2 / (2 v).
    ratio = found["sum"]["mean_pairwise_distance"] / found["kl"]["mean_pairwise_distance"]
    assert ratio == pytest.approx(2 * found["mean"]["aleatoric_variance"], rel=1e-5)
    with pytest.raises(ValueError, match="under --distance_scale mean it bounds nothing"):
        measure(ensemble, tmp_path / "no", distance="kl", distance_scale="mean")
    with pytest.raises(ValueError, match="sample with eta > 0"):
        measure(ensemble, tmp_path / "no", 0, distance="kl")
    with pytest.raises(ValueError, match="above 0"):
        measure(ensemble, tmp_path / "no", distance_scale=-1)


def test_masked_classes_are_reported_by_group(masked, tmp_path):
    out = measure(masked, tmp_path, 0, 1, 2)
    rows = read_csv(out / "uncertainty.csv")
    assert (rows[0]["certain"], rows[0]["uncertain"]) == ("0 1", "2 3")
    assert rows[0]["mi_certain"] > 0 and rows[0]["mi_uncertain"] > 0 and rows[1]["mi_uncertain"] is None
    assert json.loads((out / "summary.json").read_text())["compared_classes"] == 1
    figure = Rollout(masked, pair=(), out=str(tmp_path / "pair"), place=CPU).run()
    assert Image.open(figure / "rollout_pair.png").size[0] > 400
    uncertain = Branching(uncertain=True)
    base = Rollout(masked, classes=(0,), branching=uncertain, out=str(tmp_path / "one"), place=CPU).run()
    assert [file.name for file in base.glob("*.png")] == ["rollout_binall_0_name0.png"]


def test_certain_and_uncertain_rollouts_in_one_figure(ensemble, tmp_path):
    words = ["--path", ensemble.path, "--out", tmp_path, "--columns", 4, "--device", "cpu"]
    out = call("rollout", [*words, "--pair"])
    size = Image.open(out / "rollout_pair.png").size
    assert size[0] > 1.8 * size[1], "two panels of three rows beside each other"
    again = Rollout(ensemble, pair=(3, 2), columns=4, out=str(tmp_path), overwrite=True, place=CPU)
    again.run()
    with pytest.raises(ValueError, match="a certain and an uncertain class, or none"):
        replace(again, pair=(3,)).run()


@pytest.mark.slow
def test_pixel_maps_of_as_many_noises_as_members(ensemble, tmp_path):
    maps = UncertaintyPixels(ensemble, classes=(0, 2), n=3, sampling=Sampling(steps=2), place=CPU)
    both = replace(maps, space=("image", "latent"), out=str(tmp_path / "a")).run()
    image, latent = (np.load(both / f"pixel_unc{stem}_branch1.npz") for stem in ("", "_latent"))
    assert image["mi"].shape == latent["mi"].shape == (2, 3, 8, 8)
    assert len(list(both.glob("*.png"))) == 6
    alone = replace(maps, n=1, out=str(tmp_path / "b"), branching=Branching(base=0)).run()
    np.testing.assert_allclose(np.load(alone / "pixel_unc_branch1.npz")["mi"][:, 0], image["mi"][:, 0], atol=1e-5)
    mean = replace(maps, mean=True, limit=0.5, branching=Branching(step=(0, 1)), out=str(tmp_path / "c")).run()
    assert {file.name for file in mean.glob("*.png")} == {"pixel_unc_branch0_mean.png", "pixel_unc_branch1_mean.png"}
    settings = json.loads((mean / "record_branch1.json").read_text())["settings"]
    assert settings["distance_scale"] == "sum"


def test_samples_of_several_bases_and_branches(ensemble, tmp_path):
    branching = Branching(step=(0, 2), base="all")
    several = SampleMembers(ensemble, classes=(4, 1), out=str(tmp_path), branching=branching, place=CPU)
    several.run()
    names = {file.name for file in tmp_path.glob("*.png")}
    assert names == {"members_branch0.png", *(f"members_branch2_base{base}.png" for base in range(3))}
    latents = [load_state_dict(tmp_path / f"members_branch2_base{base}.safetensors")["latents"] for base in range(3)]
    assert latents[0].shape == (3, 2, 1, 8, 8)
    assert (latents[0] - latents[1]).abs().max() > 1e-4
    alone = replace(several, out=str(tmp_path / "one"), branching=Branching(base=1)).run()
    np.testing.assert_allclose(load_state_dict(alone.with_suffix(".safetensors"))["latents"], latents[1], atol=1e-3)
