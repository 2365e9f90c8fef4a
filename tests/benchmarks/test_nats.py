"""The study of a common unit on a tiny ensemble beside itself in other units: only the default measure differs."""

import pytest

from benchmarks.nats import CommonUnit
from ldm.commands.shared import Placement
from tests.ensembles import write_ensemble


def test_an_ensemble_compares_with_itself(tmp_path, capsys):
    folder = str(write_ensemble(tmp_path))
    options = {"classes": (0, 1), "noise": (0.1,), "n": 2, "steps": 4, "place": Placement("cpu")}
    rows = CommonUnit((folder, folder), **options).run()
    assert [row["compared"] for row in rows] == ["state, sum (default)", "x0, noise 0.1", "image, noise 0.1"]
    assert all(row["ratio of the means"] == row["most"] == 1 and row["first"] > 0 for row in rows)
    assert "2 of 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="two ensembles"):
        CommonUnit((folder,))
