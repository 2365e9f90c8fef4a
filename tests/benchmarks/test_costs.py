"""What low ranks cost, what feeds a training, what a command does beside arithmetic: counts that are known."""

import time

import pytest
import torch
from torch import nn

from benchmarks.loading import LoadingTimes
from benchmarks.low_rank import LowRankTimes
from benchmarks.overhead import BACKWARD, FORWARD, UPDATE, CPUShares, counting
from ldm.commands.shared import Placement
from ldm.experiments.timing import TimingPlan
from tests.conftest import tiny_model


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_of_parts_within_parts_the_outermost_counts():
    shares = CPUShares()
    inner = shares.count(lambda: burn(0.02), "inner")
    outer = shares.count(lambda: (burn(0.02), inner()), "outer")
    outer()
    burn(0.05)
    assert shares.seconds.keys() == {"outer"} and 0.04 <= shares.seconds["outer"] < 0.05
    inner()
    assert 0.02 <= shares.seconds["inner"] < 0.03


def test_a_step_of_training_is_counted_and_nothing_stays():
    model, shares = tiny_model(), CPUShares()
    plain = type(model.network).backbone, torch.Tensor.backward
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight])
    with counting(shares):
        out = model.network(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.tensor([1]))
        (weight * out.detach().sum()).backward()
        optimizer.step()
    assert shares.seconds.keys() == {FORWARD, BACKWARD, UPDATE} and shares.depth == 0
    assert (type(model.network).backbone, torch.Tensor.backward) == plain
    optimizer.step()
    assert shares.depth == 0


def test_the_closure_of_an_optimiser_is_no_part_of_it():
    """What a closure does beside the network is overhead: 50 ms of burning count nowhere."""
    shares = CPUShares()
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    for call in (lambda: optimizer.step(lambda: burn(0.05)), lambda: optimizer.step(closure=lambda: burn(0.05))):
        with counting(shares):
            call()
    assert shares.seconds[UPDATE] < 0.05 and shares.depth == 0


@pytest.mark.slow
def test_every_source_is_timed():
    small = {"images": 4, "batch_size": 2, "image_size": 32, "encode": 0}
    found = LoadingTimes(**small, plan=TimingPlan(repeats=1), place=Placement("cpu")).run()
    assert len(found) == 3 and min(found.values()) > 0


def test_members_of_a_low_rank_agree_on_all_sides():
    plan = TimingPlan(repeats=1)
    (found,) = LowRankTimes("tiny", members=(3,), n=1, rank=1, cpu_time=True, plan=plan, place=Placement("cpu")).run()
    assert max(found["differences"].values()) < 1e-4 and set(found["seconds"]) == set(found["memory"])
