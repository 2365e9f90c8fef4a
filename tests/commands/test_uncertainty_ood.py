"""Scores of unknown pictures as a user asks for them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.commands.laplace_fit import FitLaplace
from ldm.commands.shared import ModelSource
from ldm.commands.uncertainty_ood import UncertaintyOod
from ldm.report.pages import make_page
from ldm.stats import auroc
from ldm.util import generator
from tests.posteriors import CPU, table, write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A guided model with a posterior, and a folder of twelve random grey pictures of another size."""
    folder = tmp_path_factory.mktemp("ood")
    model = write_model(folder, guidance_scale=2.0)
    FitLaplace(model, str(folder / "fit"), n=12, draws=1, prior_precision=50.0, place=CPU).run()
    (folder / "strange").mkdir()
    for number in range(12):
        pixels = torch.randint(256, (16, 16), generator=generator("pixels", number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "strange" / f"{number:02}.png")
    return UncertaintyOod(
        model, str(folder / "out"), (str(folder / "strange"),), posterior=str(folder / "fit"),
        n=12, compare=40, noise_levels=3, between=(0.2, 2.0), place=CPU,
    )  # fmt: skip


def test_scores_and_their_table(place):
    rows = place.run()
    pictures = table(f"{place.out}/scores.csv")
    assert len(pictures) == 24 and {row["pictures"] for row in pictures} == {"known", "strange"}
    assert {row["score"] for row in rows} >= {
        "nearest neighbour",
        "pixel statistics",
        "gamma^2, 1 level",
        "path energy",
    }
    assert {row["score"] for row in rows} >= {"snapshot, 3 levels", "denoising loss, 1 level"}  # the middle of the UNet
    assert not any(row["score"].startswith("members") for row in rows)
    for row in rows:
        values = [float(each[row["score"]]) for each in pictures]
        assert row["auroc"] == pytest.approx(auroc(values, [each["pictures"] != "known" for each in pictures]))
        ps = np.array([float(each[f"p: {row['score']}"]) for each in pictures if each["pictures"] != "known"])
        assert row["flagged"] == pytest.approx((ps <= 0.05).mean()) and ps.min() >= 1 / 13
    told = {row["score"]: row["auroc"] for row in rows}
    assert told["nearest neighbour"] > 0.9  # random pixels are far from digits
    with pytest.raises(FileExistsError, match="--overwrite"):
        place.run()


def test_conditions_and_batches(place, tmp_path):
    rows = {}
    for name, changes in {
        "nearest": {},
        "small": {"batch_size": 5},
        "null": {"condition": "null"},
        "class": {"condition": "3"},
    }.items():
        found = replace(place, out=str(tmp_path / name), posterior=None, **changes).run()
        rows[name] = {row["score"]: row["auroc"] for row in found}
        losses = table(tmp_path / name / "scores.csv")
        rows[name]["loss"] = [float(row["denoising loss, 1 level"]) for row in losses]
    assert rows["small"]["loss"] == pytest.approx(rows["nearest"]["loss"], rel=1e-3)
    assert rows["null"]["loss"] != rows["class"]["loss"] != rows["nearest"]["loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"condition": "12"}, "nearest, null or a class 0 to 9"),
        ({"n": 50}, "there are 12 pictures"),
        ({"layers": ("nothing",)}, "no layers"),
    ],
)
def test_what_does_not_fit_is_refused(place, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        replace(place, out=str(tmp_path / "no"), **change).run()


def test_options_that_contradict_are_refused(place):
    with pytest.raises(ValueError, match="give one"):
        replace(place, ensemble="logs/e")
    with pytest.raises(ValueError, match="give one"):
        replace(place, source=ModelSource())
    with pytest.raises(ValueError, match="name pictures"):
        replace(place, pictures=())
    with pytest.raises(ValueError, match="--flag"):
        replace(place, flag=1.0)
    with pytest.raises(ValueError, match="--between takes the lowest and the highest level, above 0, got 2 1"):
        replace(place, between=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"--noise is one of the levels 0\.2 to 2 of --between, got 50"):
        replace(place, noise=50.0)


def test_one_picture_has_no_interval(place, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    Image.new("L", (16, 16), 90).save(tmp_path / "one" / "a.png")
    rows = replace(place, pictures=(str(tmp_path / "one"),), out=str(tmp_path / "out"), n=1).run()
    assert all(np.isnan(row["low"]) and 0 <= row["auroc"] <= 1 for row in rows)
    said = capsys.readouterr().out
    assert "one picture has no interval" in said and "nan" not in said
    assert "AUROC" in make_page(tmp_path / "out").summary[0] and "[" not in make_page(tmp_path / "out").summary[0]
