"""Twenty kills: whoever is killed while writing leaves the earlier state or the new one, and the next run is exact."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kills import WRITERS

KILLS = {"ensemble": 6, "posterior": 5, "results": 5, "training": 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_kill_loses_nothing(name, tmp_path):
    """What is left can be read, is whole, and the same call again ends as if there had been no kill."""
    assert KILLS.keys() == WRITERS.keys()
    words = [sys.executable, "-m", "tests.kills", name, str(KILLS[name]), str(tmp_path / "trials")]
    (tmp_path / "trials").mkdir()
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    trials = json.loads(done.stdout.splitlines()[-1])
    assert len(trials) == KILLS[name] and sum(trial["killed"] for trial in trials) > len(trials) / 2
    wrong = [trial for trial in trials if not (trial["whole"] and trial["again"] and trial["equal"])]
    assert wrong == []
