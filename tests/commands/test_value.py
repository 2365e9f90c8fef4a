"""The value of more pictures as a user asks for it."""

from dataclasses import replace

import numpy as np
import pytest

from ldm.commands.laplace_fit import FitLaplace
from ldm.commands.shared import PosteriorSource
from ldm.commands.value import ValueData
from ldm.data.digits import Digits
from ldm.pipelines import chosen_positions
from ldm.report.tables import read_comments
from tests.posteriors import CPU, table, write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A guided model, a posterior of 12 digits, and 40 held-out ones."""
    folder = tmp_path_factory.mktemp("value")
    model = write_model(folder, guidance_scale=2.0)
    FitLaplace(model, str(folder / "fit"), n=12, draws=1, prior_precision=50.0, place=CPU).run()
    held = ("target=ldm.data.digits.Digits", "params.split=test")
    return ValueData(
        model, PosteriorSource(str(folder / "fit")), str(folder / "out"), k=(1, 5), held=held, n=120, seed=1, place=CPU
    )


def test_a_row_for_each_class_and_number(place):
    rows = place.run()
    assert len(rows) == 20 and len(table(f"{place.out}/value.csv")) == 20
    five = [row for row in rows if row["k"] == 5]
    assert [row["fall of loss"] for row in five] == sorted((row["fall of loss"] for row in five), reverse=True)
    assert sum(row["pictures"] for row in five) == 12
    content = np.load(f"{place.out}/value.npz")
    assert (Digits(split="test").labels[content["positions"]].numpy() == content["labels"]).all()
    for row in five:
        assert row["fall of loss"] == pytest.approx(content["fall_5"][row["class"]].mean())
        assert row["loss"] == pytest.approx(content["loss"][content["labels"] == row["class"]].mean())
        assert 0 < row["fall of information"] < row["information"]
    with pytest.raises(FileExistsError, match="--overwrite"):
        place.run()
    again = replace(place, out=f"{place.out}2", k=(5,), batch_size=7)
    for row, other in zip(five, again.run(), strict=True):  # whatever the batch
        assert row["fall of loss"] == pytest.approx(other["fall of loss"], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 12}, "held-out images, and 3 are the fewest"),
        ({"posterior": "diag"}, "--curvature full"),
    ],
)
def test_what_does_not_fit_is_refused(place, change, message, tmp_path):
    if change.get("posterior") == "diag":
        change = {"posterior": replace(place.posterior, curvature="diag")}
    with pytest.raises(ValueError, match=message):
        replace(place, out=str(tmp_path / "no"), **change).run()
    for k in ((0,), (10, 10)):
        with pytest.raises(ValueError, match="--k takes numbers of further pictures from 1, each once"):
            replace(place, k=k)


def test_held_out_pictures_that_were_fitted_to_are_named(place, tmp_path):
    held = ("target=ldm.data.digits.Digits", "params.split=train")
    replace(place, held=held, n=400, k=(5,), out=str(tmp_path / "out")).run()
    asked = np.load(tmp_path / "out" / "value.npz")["positions"]
    shared = len({*asked.tolist()} & {*chosen_positions(len(Digits()), 12, 42)})
    assert 0 < shared < 12
    note = read_comments(tmp_path / "out" / "value.csv")[0]
    assert note.endswith(f"{shared} of the held-out pictures are pictures of the fit, whose loss is too low")
