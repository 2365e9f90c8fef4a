"""A promise beside a rejection, as a user asks for it: verdicts, thresholds, and samples that are accepted by them."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.commands.laplace_filter import FilterLaplace
from ldm.commands.promise import RiskOptions, read_verdicts
from ldm.data.digits import Digits
from ldm.evaluation.classifier import (
    Architecture,
    SmallClassifier,
    save_classifier,
)
from ldm.images import to_uint8
from ldm.report.tables import read_comments, read_csv, write_csv
from tests.cli import call
from tests.posteriors import CPU


def write_samples(folder, count=30, **settings):
    """A folder as `decu laplace sample` writes it: digits for samples, scores that rise with the position."""
    folder.mkdir()
    data = Digits(split="test")
    images = to_uint8(data.images[:count].reshape(count, 1, 8, 8))
    labels = data.labels[:count].numpy()
    np.savez(folder / "samples.npz", arr_0=images, arr_1=labels)
    rows = [{"image": i, "class": int(labels[i]), "sum": i / 7, "patch_max": (i * 11 % 30) / 3} for i in range(count)]
    write_csv(folder / "scores.csv", rows)
    settings = {"method": "path", "seed": 1, **settings}
    (folder / "record.json").write_text(json.dumps({"command": [], "revision": "", "settings": settings}))
    return str(folder)


def write_verdicts(path, verdicts):
    path.write_text("image,bad\n" + "".join(f"{image},{bad}\n" for image, bad in verdicts.items()))
    return str(path)


def read_kept(folder, score="sum"):
    return [int(line) for line in (folder / "kept" / f"{score}.txt").read_text().split()]


def test_a_promise_accepts_what_was_judged_well(tmp_path):
    samples = write_samples(tmp_path / "samples")
    judge = write_verdicts(tmp_path / "judged.csv", {image: int(image >= 20) for image in range(30)})
    risk = RiskOptions(risk=0.3, judge=judge)
    command = FilterLaplace(samples, str(tmp_path / "out"), risk=risk, scores=("sum",), place=CPU)
    own, chance = command.run()
    assert own["promised"] and (own["accepted"], own["bad"]) == (18, 0) and own["bound"] <= 0.3
    assert own["bad without"] == pytest.approx(1 / 3)
    assert chance["score"] == "random" and not chance["promised"] and chance["needed"] > 30
    assert read_kept(tmp_path / "out") == list(range(18))
    assert (tmp_path / "out" / "promise.png").exists()
    said, level, columns = read_comments(tmp_path / "out" / "promise.csv")
    assert said == f"sum accepts 60%, of which at most {own['bound']:.2g} are bad"
    assert level.startswith("at most 0.3 of the accepted are bad") and "needed:" in columns
    with pytest.raises(FileExistsError, match="holds a promise"):
        command.run()


def test_what_cannot_be_promised_is_said_in_words(tmp_path):
    samples = write_samples(tmp_path / "samples", count=60)
    common = {"scores": ("sum",), "place": CPU}
    for every, remedy in ((2, "the bad share is above the risk"), (60, r"about \d+ judged samples would do")):
        judge = write_verdicts(tmp_path / f"{every}.csv", {image: int(image % every == 0) for image in range(60)})
        out = tmp_path / str(every)
        FilterLaplace(samples, str(out), risk=RiskOptions(risk=0.1, judge=judge), **common).run()
        assert re.fullmatch(f"sum promises nothing: {remedy}", read_comments(out / "promise.csv")[0])


def test_images_that_nobody_judged_are_accepted_by_the_threshold(tmp_path):
    samples = write_samples(tmp_path / "samples")
    judge = write_verdicts(tmp_path / "judged.csv", {image: int(image > 20) for image in range(30) if image != 3})
    (row, _) = FilterLaplace(
        samples, str(tmp_path / "out"), risk=RiskOptions(risk=0.3, judge=judge), scores=("sum",), place=CPU
    ).run()
    assert row["judged"] == 29 and 3 in read_kept(tmp_path / "out")


def test_an_earlier_promise_is_applied_to_samples_made_alike(tmp_path):
    judge = write_verdicts(tmp_path / "judged.csv", {image: int(image >= 20) for image in range(30)})
    first = write_samples(tmp_path / "samples")
    common = {"scores": ("sum",), "place": CPU}
    FilterLaplace(first, str(tmp_path / "out"), risk=RiskOptions(risk=0.3, judge=judge), **common).run()
    more = write_samples(tmp_path / "more", count=60, seed=2)
    accept = FilterLaplace(more, str(tmp_path / "kept"), risk=RiskOptions(promised=str(tmp_path / "out")), place=CPU)
    (row,) = accept.run()
    assert (row["images"], row["accepted"]) == (60, 18) and read_kept(tmp_path / "kept") == list(range(18))
    with pytest.raises(ValueError, match=r"samples of other settings \(method: path -> persistent\)"):
        other = write_samples(tmp_path / "other", method="persistent")
        replace(accept, samples=other, out=str(tmp_path / "no")).run()


def test_names_of_classes_are_no_score(tmp_path):
    samples = write_samples(tmp_path / "samples")
    rows = [{**row, "name": "a cat"} for row in read_csv(tmp_path / "samples" / "scores.csv")]
    write_csv(tmp_path / "samples" / "scores.csv", rows, overwrite=True)
    judge = write_verdicts(tmp_path / "judged.csv", dict.fromkeys(range(30), 0))
    table = FilterLaplace(samples, str(tmp_path / "out"), risk=RiskOptions(risk=0.5, judge=judge), place=CPU).run()
    assert {row["score"] for row in table} == {"sum", "patch_max", "random"}


@pytest.mark.parametrize("change", [lambda rows: rows[:-1], lambda rows: [{**rows[0], "sum": "x"}, *rows[1:]]])
def test_scores_that_do_not_fit_the_samples_are_refused(change, tmp_path):
    samples = write_samples(tmp_path / "samples")
    file = tmp_path / "samples" / "scores.csv"
    write_csv(file, change(read_csv(file)), overwrite=True)
    judge = write_verdicts(tmp_path / "judged.csv", dict.fromkeys(range(20), 0))
    with pytest.raises(ValueError, match=r"scores\.csv.*: sample again"):
        FilterLaplace(samples, str(tmp_path / "out"), risk=RiskOptions(risk=0.5, judge=judge), place=CPU).run()


def test_too_few_of_a_class_are_refused_with_the_number(tmp_path):
    samples = write_samples(tmp_path / "samples")
    judge = write_verdicts(tmp_path / "judged.csv", dict.fromkeys(range(30), 0))
    risk = RiskOptions(risk=0.3, judge=judge)
    with pytest.raises(ValueError, match=r"class \d: \d judged samples promise nothing.* needs at least 22"):
        FilterLaplace(samples, str(tmp_path / "no"), risk=risk, scores=("sum",), per_class=True, place=CPU).run()


def test_promises_of_classes_hold_thresholds_of_their_own(tmp_path):
    samples = write_samples(tmp_path / "samples", count=200)
    labels = np.load(tmp_path / "samples" / "samples.npz")["arr_1"]
    judge = write_verdicts(tmp_path / "judged.csv", {image: int(labels[image] == 3) for image in range(200)})
    risk = RiskOptions(risk=0.5, confidence=0.8, judge=judge)
    rows = FilterLaplace(samples, str(tmp_path / "o"), risk=risk, scores=("sum",), per_class=True, place=CPU).run()
    assert read_comments(tmp_path / "o" / "promise.csv")[0] == "sum promises something of 9 of 10 classes"
    found = {row["of"]: row["promised"] for row in rows if row["score"] == "sum"}
    assert found == {str(label): label != 3 for label in range(10)}
    assert set(labels[read_kept(tmp_path / "o")]) == set(range(10)) - {3}
    accept = FilterLaplace(samples, str(tmp_path / "a"), risk=RiskOptions(promised=str(tmp_path / "o")), place=CPU)
    accept.run()
    assert read_kept(tmp_path / "a") == read_kept(tmp_path / "o")


def test_a_classifier_calls_bad_what_it_does_not_recognise(tmp_path):
    samples = write_samples(tmp_path / "samples", count=60)
    model = SmallClassifier(Architecture(1, 8, 10, width=8, num_features=16)).eval()
    save_classifier(model, tmp_path / "c.safetensors", {})
    risk = RiskOptions(risk=0.4, judge=str(tmp_path / "c.safetensors"))
    (row, _) = FilterLaplace(samples, str(tmp_path / "o"), risk=risk, scores=("sum",), place=CPU).run()
    archive = np.load(tmp_path / "samples" / "samples.npz")
    shown = torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    wrong = model(shown).argmax(1).numpy() != archive["arr_1"]
    assert row["bad without"] == pytest.approx(wrong.mean()) and 0 < wrong.mean() < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--risk", "0.1"], "--risk needs a --judge"),
        (["--judge", "a.csv", "--ref", "b"], "--judge acts only with --risk"),
        (["--risk", "0.1", "--judge", "a.csv", "--keep", "0.5"], "leave out --keep"),
        (["--risk", "1.5", "--judge", "a.csv"], "--risk must be above 0 and below 1"),
        (["--promised", "a", "--per_class"], "leave out --per_class"),
        ([], "name a reference with --ref"),
    ],
)
def test_words_of_a_promise_that_do_not_fit_are_refused(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as failed:
        call("laplace filter", ["--samples", "s", "--out", str(tmp_path / "o"), *words])
    said = capsys.readouterr().err.replace("│", " ") + str(failed.value)
    assert message in " ".join(said.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,wrong\n0,1\n", "it has no column bad, but image, wrong"),
        ("image,bad\n0,2\n", "expected a position and 0 or 1"),
        ("image,bad\n7,1\n", "there is no image 7"),
        ("image,bad\n0,1\n0,0\n", "judged twice"),
    ],
)
def test_verdicts_that_cannot_be_read_are_refused(text, message, tmp_path):
    (tmp_path / "scores.csv").write_text("image,sum\n0,0.5\n1,0.2\n")
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, 8, 8, 1), dtype=np.uint8))
    (tmp_path / "judged.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_verdicts(str(tmp_path / "judged.csv"), tmp_path)
