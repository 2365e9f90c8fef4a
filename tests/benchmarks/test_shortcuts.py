"""What shortcuts do to an answer: errors that are known, and a study of a small ensemble."""

import numpy as np
import pytest
import torch

from benchmarks.shortcuts import Shortcuts, resample_ranks
from ldm.commands.shared import Placement
from ldm.experiments.ways import Answer
from ldm.pipelines.speed import supported
from tests.ensembles import write_ensemble


def test_errors_are_those_that_were_made():
    """All values twice as large, and those of one class three times: the ranks stay."""
    mi = np.array([[1.0, 3.0], [4.0, 4.0], [5.0, 11.0]])
    wrong = 2 * mi
    wrong[1] = 12
    found = Shortcuts("", n=2).compare(Answer(wrong, 6, 1.0), Answer(mi, 12, 4.0))
    means = np.array([1, 2, 1])
    assert found["bias"] == pytest.approx(means.mean())
    assert found["of_class"] == pytest.approx(np.sqrt((means**2).mean()))
    assert found["of_noise"] == pytest.approx(found["of_class"]) and found["seconds"] == 0.25
    assert found["evaluations"] == 0.5 and found["rank"] == pytest.approx(1)


def test_ranks_are_drawn_on_the_same_noises():
    values = np.array([[1.0, 9.0], [2.0, 3.0], [5.0, 4.0]])
    assert resample_ranks(values, values, 50, 0) == (1, 1, 1)
    rank, low, high = resample_ranks(-values, values, 50, 0)
    assert (rank, low, high) == pytest.approx((-1, -1, -1))


@pytest.mark.slow
def test_a_small_ensemble_is_compared(tmp_path):
    path = str(write_ensemble(tmp_path, spread=0.01 * torch.ones(11)))
    study = Shortcuts(path, steps=4, deep_everys=(2,), shallow_blocks=(1,), n=2, resamples=5, place=Placement("cpu"))
    rows = {one["shortcut"]: one for one in study.run()}
    assert rows["deep every 2, 1 shallow"]["evaluations"] < 1 == rows["other noises"]["evaluations"]
    if supported("bf16", torch.device("cpu")) is not None:
        assert rows["bf16"]["of_class"] < 0.1 < rows["bf16, a row a pass"]["of_class"]
