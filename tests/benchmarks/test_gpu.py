"""The table of one device: what a cell says where it runs, and where its time is over."""

import pytest

from benchmarks.gpu import DeviceTable
from ldm.commands.shared import Placement
from ldm.experiments.timing import TimingPlan

SMALL = {"sizes": ("tiny",), "n": 1, "steps": 2, "batch_size": 2}
SMALL |= {"plan": TimingPlan(repeats=1), "place": Placement("cpu")}


@pytest.mark.slow
def test_every_cell_is_measured():
    found = DeviceTable(**SMALL, members=(1, 2), variants=("float32",)).run()
    assert [row["result"] for row in found["sampling"] + found["training"]] == ["ok"] * 4
    alone, both = found["sampling"]
    assert alone["MI from float32 (nats)"] == "", "one member has no mutual information"
    assert both["MI from float32 (nats)"].startswith("0.0e+00"), "float32 is what it is compared with"


def test_what_the_time_does_not_reach_is_said():
    found = DeviceTable(**SMALL, members=(2,), variants=("float32",), minutes=-1).run()
    assert [row["result"] for row in found["sampling"]] == ["not run: the -1 minutes were over"]


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="unknown"):
        DeviceTable(**SMALL, members=(1,), variants=("float8",)).run()
