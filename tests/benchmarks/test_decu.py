"""The controls of an ensemble: judged by real images, trained as told, bins drawn once."""

import numpy as np
import pytest

from benchmarks.decu import VARIANTS, EnsembleControls
from ldm.commands.line import parse
from ldm.data.class_bins import draw_bins, parse_bin_words
from ldm.data.plans import read_subsets

BASE = "configs/latent-diffusion/digits.yaml"


def test_samples_are_judged_by_real_images_of_the_configs_data():
    classifier, references = EnsembleControls(BASE, "o", real=300).fit_classifier()
    assert sorted(references) == list(range(10)) and sum(map(len, references.values())) == 300
    right = [classifier.recognised(images, np.full(len(images), label)) for label, images in references.items()]
    assert np.concatenate(right).mean() > 0.9


def test_words_may_stand_anywhere():
    words = ["--base", "b.yaml", "--out", "o", "--variants", "lora", "a.b=1", "--n", "3"]
    found = parse(EnsembleControls, words, "decu.py")
    assert isinstance(found, EnsembleControls)
    assert (found.variants, found.changes, found.n) == (("lora",), ("a.b=1",), 3)


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="got colour"):
        EnsembleControls("b.yaml", "o", variants=("colour",))


def test_the_first_rotation_trains_more_members(tmp_path):
    benchmark = EnsembleControls(BASE, str(tmp_path), classes_per_bin=("8:2", "all:8"), changes=("a.b=1",))
    training = benchmark.make_training("lora", 2, 7, tmp_path / "lora_2", "0")
    assert (training.component, training.members, training.scale_lr) == ("all", 7, False)
    bins = tmp_path / "bins_2"
    assert training.changes == (*VARIANTS["lora"], f"data.params.train.params.folder={bins}", "a.b=1")
    plan = read_subsets(bins)
    assert plan.members == 10 and sorted(map(str, plan.bins.values())) == ["8"] * 2 + ["all"] * 8
    published = benchmark.make_training("published", 2, 5, tmp_path / "published_2", "0")
    assert len(published.base) == 2 and published.base[1].endswith("digits-published.yaml")


def test_bins_that_are_there_are_kept(tmp_path):
    config = {"target": "ldm.data.digits.Digits", "params": {"split": "train"}}
    draw_bins(tmp_path, config, ("1:5", "all:5"), members=2)
    before = (tmp_path / "subsets_binned_classes.yaml").read_text()
    draw_bins(tmp_path, config, ("10:5", "all:5"), members=2)
    assert (tmp_path / "subsets_binned_classes.yaml").read_text() == before
    with pytest.raises(ValueError, match="IMAGES:CLASSES"):
        parse_bin_words(["ten:2"])
