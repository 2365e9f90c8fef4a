"""DECU's scripts on an ensemble of flows: the same commands, and numbers that do not depend on the number of steps."""

import math

import pytest

from ldm.report.tables import read_csv
from tests.cli import call
from tests.ensembles import write_ensemble

FLOW = {"parameterization": "velocity"}
# Times as they are: a random network would follow a thousandfold time in waves, which adaptive steps have to trace.
FLOW["path_config"] = {"target": "ldm.diffusion.schedule.FlowSchedule", "params": {"time_scale": 1.0}}


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    return write_ensemble(tmp_path_factory.mktemp("flows"), params=FLOW)


def table(ensemble, out, words):
    given = ["--path", str(ensemble), "--out", str(out), "--device", "cpu", "--classes", "0", "1", "2", "--n", "2"]
    folder = call("uncertainty classes", [*given, "--sampler", "Euler", *words.split()])
    return {row["class"]: row for row in read_csv(folder / "uncertainty.csv")}


def test_predicted_x0_do_not_depend_on_the_length_of_the_step(ensemble, tmp_path):
    """From pure noise x_0_hat = x - v: the same for 2 and for 8 steps; states lie apart by the length of the step."""
    found = {}
    for of in ("x0", "state"):
        for steps in (2, 8):
            words = f"--branch_at 0 --steps {steps} --distance_of {of}"
            found[of, steps] = table(ensemble, tmp_path / f"{of}{steps}", words)
    for label in found["x0", 2]:
        few, many = (found["x0", steps][label]["mean_pairwise_distance"] for steps in (2, 8))
        assert few == pytest.approx(many, rel=1e-4) and few > 0
        few, many = (found["state", steps][label]["mean_pairwise_distance"] for steps in (2, 8))
        assert few == pytest.approx(16 * many, rel=1e-3)
        # One step of length 1/2: half of the way to the predicted x0.
        assert few == pytest.approx(found["x0", 2][label]["mean_pairwise_distance"] / 4, rel=1e-4)
        assert 0 <= found["x0", 2][label]["mi_mean"] <= math.log(3)


def test_divergences_need_the_noise_of_ddim(ensemble, tmp_path):
    words = ["--path", str(ensemble), "--out", str(tmp_path / "kl"), "--device", "cpu", "--classes", "0", "--n", "2"]
    folder = call(
        "uncertainty classes", [*words, "--distance", "kl", "--eta", "1", "--steps", "4", "--branch_at", "0.5"]
    )
    (row,) = read_csv(folder / "uncertainty.csv")
    assert 0 < row["mi_mean"] <= math.log(3)
    with pytest.raises(ValueError, match="needs every variance above 0"):
        table(ensemble, tmp_path / "zero", "--distance kl --steps 4 --branch_at 0.5")
    with pytest.raises(ValueError, match="which predicted x0 have not"):
        table(ensemble, tmp_path / "both", "--distance kl --distance_of x0")


@pytest.mark.parametrize("sampler", ["Euler", "Dopri5"])
def test_grids_and_maps(ensemble, sampler):
    words = ["--path", str(ensemble), "--device", "cpu", "--sampler", sampler, "--steps", "3", "--overwrite"]
    call("sample members", [*words, "--classes", "0", "1"])
    call("uncertainty pixels", [*words, "--classes", "0", "1", "--n", "1"])
    assert any(ensemble.glob("samples/*.png")) and any(ensemble.glob("pixel_unc/*.png"))
