"""DECU's commands on an ensemble of flows: the same commands, and numbers that do not depend on the number of steps."""

import math

import pytest

from ldm.commands.sample_members import SampleMembers
from ldm.commands.shared import EnsembleSource, Placement
from ldm.commands.uncertainty_classes import UncertaintyClasses
from ldm.commands.uncertainty_pixels import UncertaintyPixels
from ldm.report.tables import read_csv
from ldm.settings import Branching, Sampling
from tests.ensembles import write_ensemble

CPU = Placement("cpu")
FLOW = {"parameterization": "velocity"}
# Times as they are: a random network would follow a thousandfold time in waves, which adaptive steps have to trace.
FLOW["path_config"] = {"target": "ldm.diffusion.schedule.FlowSchedule", "params": {"time_scale": 1.0}}


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    return write_ensemble(tmp_path_factory.mktemp("flows"), params=FLOW)


def table(ensemble, out, classes=(0, 1, 2), **options):
    """The rows of the measured classes, two noises each, by class."""
    source = EnsembleSource(str(ensemble))
    folder = UncertaintyClasses(source, classes=classes, n=2, out=str(out), place=CPU, **options).run()
    return {row["class"]: row for row in read_csv(folder / "uncertainty.csv")}


@pytest.mark.slow
def test_predicted_x0_do_not_depend_on_the_length_of_the_step(ensemble, tmp_path):
    """From pure noise x_0_hat = x - v: the same for 2 and for 8 steps; states lie apart by the length of the step."""
    found = {}
    for of in ("x0", "state"):
        for steps in (2, 8):
            walk = {"sampling": Sampling("Euler", steps=steps), "branching": Branching(at=0.0)}
            found[of, steps] = table(ensemble, tmp_path / f"{of}{steps}", distance_of=of, **walk)
    for label in found["x0", 2]:
        few, many = (found["x0", steps][label]["mean_pairwise_distance"] for steps in (2, 8))
        assert few == pytest.approx(many, rel=1e-4) and few > 0
        few, many = (found["state", steps][label]["mean_pairwise_distance"] for steps in (2, 8))
        assert few == pytest.approx(16 * many, rel=1e-3)
        # One step of length 1/2: half of the way to the predicted x0.
        assert few == pytest.approx(found["x0", 2][label]["mean_pairwise_distance"] / 4, rel=1e-4)
        assert 0 <= found["x0", 2][label]["mi_mean"] <= math.log(3)


def test_divergences_need_the_noise_of_ddim(ensemble, tmp_path):
    half = {"distance": "kl", "branching": Branching(at=0.5)}
    row = table(ensemble, tmp_path / "kl", (0,), sampling=Sampling(eta=1.0, steps=4), **half)[0]
    assert 0 < row["mi_mean"] <= math.log(3)
    with pytest.raises(ValueError, match="needs every variance above 0"):
        table(ensemble, tmp_path / "zero", sampling=Sampling("Euler", steps=4), **half)
    with pytest.raises(ValueError, match="which predicted x0 have not"):
        table(ensemble, tmp_path / "both", sampling=Sampling("Euler"), distance="kl", distance_of="x0")


@pytest.mark.parametrize("sampler", ["Euler", "Dopri5"])
def test_grids_and_maps(ensemble, sampler):
    source = EnsembleSource(str(ensemble))
    for kind in (SampleMembers, UncertaintyPixels):
        kind(source, classes=(0, 1), sampling=Sampling(sampler, steps=3), overwrite=True, place=CPU).run()
    assert any(ensemble.glob("samples/*.png")) and any(ensemble.glob("pixel_unc/*.png"))
