"""Benchmarks compare equal results: whatever they time, both sides compute the same. (No time is asserted.)"""

import json
import math

import pytest
import torch

from benchmarks import laplace, probe
from benchmarks.blocks import BlockTimes
from benchmarks.growth import Growth
from benchmarks.members import MemberTimes
from benchmarks.tangents import TangentTimes
from benchmarks.training import TrainingTimes
from ldm import Sampling, Speed
from ldm.commands.line import parse
from ldm.commands.shared import Placement
from ldm.experiments.timing import (
    Timing,
    TimingPlan,
    compare_rounds,
    count_operations,
    draw_model,
    load_size_config,
)
from ldm.experiments.training_timing import count_saved_bytes, make_whole_step
from ldm.training.blocks import BlockOptions
from tests.ensembles import write_ensemble
from tests.posteriors import write_model

CPU = Placement("cpu")
ONCE = TimingPlan(repeats=1)
AGAIN = BlockOptions(gradient_checkpointing=True)


@pytest.mark.slow
def test_the_member_loop_and_ours_agree(tmp_path):
    file = tmp_path / "numbers.json"
    variants = ("float32", "channels_last", "bf16")
    numbers = {"members": 2, "n": 1, "steps": 2}
    plan = TimingPlan(repeats=1, json=str(file))
    found = MemberTimes("tiny", **numbers, variants=variants, plan=plan, place=CPU).run()
    assert max(found["differences"][name] for name in ("float32", "channels_last")) < 1e-4
    assert 1e-4 < found["differences"]["bf16"] < 0.2 or "bf16" not in found["rates"]
    assert found["executed"] < found["nominal"]
    written = json.loads(file.read_text())
    assert written["numbers"]["executed"] == found["executed"] and len(written["table"]) == 4
    assert written["options"]["variants"] == list(variants)
    with pytest.raises(ValueError, match="unknown"):
        MemberTimes("tiny", **numbers, variants=("float8",), plan=ONCE, place=CPU).run()


def test_members_of_an_ensemble_are_timed(tmp_path):
    found = MemberTimes(path=str(write_ensemble(tmp_path)), n=1, steps=2, plan=ONCE, place=CPU).run()
    assert found["differences"]["float32"] < 1e-4


def test_a_step_of_the_whole_network_is_one_however_its_blocks_run():
    """Two steps with recomputed blocks have the losses of plain ones; the model itself stays as it was."""
    model = draw_model(load_size_config("tiny"), torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = torch.Generator().manual_seed(0)
    batch = {"image": torch.randn(2, 8, 8, 1, generator=source), "class_label": torch.tensor([1, 2])}
    batch["encoded"] = torch.ones(2, dtype=torch.bool)
    steps = [make_whole_step(model, batch, None, options) for options in (BlockOptions(), AGAIN)]
    plain, again = ([float(step()) for _ in range(2)] for step in steps)
    assert plain == again and plain[0] != plain[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_a_step_keeps_is_counted():
    """A linear layer keeps its inputs [4, 8], exp its results [4, 3]; weights are there anyway."""
    layer = torch.nn.Linear(8, 3)
    inputs = torch.randn(4, 8)
    assert count_saved_bytes(lambda: layer(inputs).exp().sum().backward()) == 4 * (4 * 8 + 4 * 3)


def test_recomputed_blocks_keep_less_and_lose_the_same():
    plain, recomputed = BlockTimes("tiny", 2, ways=("recomputed",), cpu_time=True, plan=ONCE, place=CPU).run()
    kept = "kept for the backward pass, MB"
    assert float(recomputed[kept]) < 0.5 * float(plain[kept])
    assert float(recomputed["loss beside plain"]) == 0
    with pytest.raises(ValueError, match="--ways takes 'plain'"):
        BlockTimes(ways=("quick",))


@pytest.mark.slow
def test_training_together_equals_runs_that_encode():
    found = TrainingTimes("tiny", members=2, batch_size=2, plan=ONCE, place=CPU).run()
    assert found["difference"] < 1e-5
    assert 1 < found["ratio"] < 2.2, "a step is forward and the gradients of activations, of the conditioned part alone"


@pytest.mark.slow
def test_operations_grow_as_members_do_and_passes_bound_memory():
    few = {"members": (2, 4), "n": (1,), "steps": (3,), "latents": (1,), "plan": ONCE, "place": CPU}
    four, all_at_once = (Growth("tiny", **few, speed=Speed(chunk)).run() for chunk in (4, 100))
    usual, more = four
    assert more["operations"] == pytest.approx(2 * usual["operations"], rel=0.2)
    assert more["bytes"] < 1.3 * usual["bytes"] and all_at_once[1]["bytes"] > 1.6 * all_at_once[0]["bytes"]


@pytest.mark.slow
def test_tangents_are_timed_against_the_same_work(tmp_path):
    source = write_model(tmp_path)
    out = str(tmp_path / "t.csv")
    rows = TangentTimes(source, k=2, repeats=1, out=out, sampling=Sampling(steps=3), place=CPU).run()
    assert rows[0]["over_plain"] == 1 and all(math.isfinite(row["seconds"]) for row in rows)
    assert len((tmp_path / "t.csv").read_text().splitlines()) >= 5


def test_heads_are_the_same_both_ways():
    rows = probe.ProbeTimes(n=20, t=(1, 21), layers=("out_1", "out_2"), place=CPU).run()
    assert [row["heads"] for row in rows] == [4, 4, 4]
    assert all(row["largest difference"] < 1e-4 for row in rows)


def test_the_closed_form_is_the_mean_of_the_draws(tmp_path):
    file = tmp_path / "laplace.json"
    small = {"features": 8, "outputs": 2, "side": 16, "draws": 400, "rank": 64, "repeats": 1}
    laplace.PredictiveVariance(**small, json=str(file)).run()
    rows = {row["predictive variance"]: row for row in json.loads(file.read_text())["rows"]}
    drawn, diag = (rows[name]["mean over the exact mean"] for name in ("400 weight draws", "diag"))
    assert drawn == pytest.approx(diag, rel=0.1)
    assert rows["full"]["mean over the exact mean"] == 1


def test_words_make_a_benchmark():
    words = ["--size", "tiny", "--members", "2", "4", "--repeats", "7", "--chunk", "3", "--device", "cpu"]
    found = parse(Growth, words, "growth.py")
    assert (found.size, found.members, found.plan.repeats) == ("tiny", (2, 4), 7)
    assert (found.speed.chunk, found.place.device) == (3, "cpu")


def test_helpers():
    slow = Timing((2.0, 4.0, 3.0))
    fast = Timing((1.0, 1.0, 2.0))
    assert compare_rounds(slow, fast) == (2.0, 1.5, 4.0) and str(fast) == "1000.0 ms [1000.0 .. 2000.0]"
    assert count_operations(lambda: torch.zeros(3, 4) @ torch.zeros(4, 5)) == 2 * 3 * 4 * 5
