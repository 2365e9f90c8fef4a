"""Benchmarks compare equal results: whatever they time, both sides compute the same. (No time is asserted.)"""

import json

import pytest
import torch

from ldm.experiments.timing import Timing, operations, ratios, table
from scripts import benchmark_growth, benchmark_members, benchmark_sampling, benchmark_training
from tests.ensembles import write_ensemble

TINY = ["--size", "tiny", "--repeats", "1", "--device", "cpu"]


def test_the_member_loop_and_ours_agree(tmp_path):
    file = tmp_path / "numbers.json"
    words = ["--steps", "2", "--n", "1", "--members", "2", "--variants", "float32", "channels_last", "bf16"]
    found = benchmark_members.main([*TINY, *words, "--json", str(file)])
    assert max(found["differences"][name] for name in ("float32", "channels_last")) < 1e-4
    assert 1e-4 < found["differences"]["bf16"] < 0.2 or "bf16" not in found["rates"]
    assert found["executed"] < found["nominal"]
    written = json.loads(file.read_text())
    assert written["numbers"]["executed"] == found["executed"] and len(written["table"]) == 4
    with pytest.raises(ValueError, match="unknown"):
        benchmark_members.main([*TINY, *words[:-1], "float8"])


def test_training_together_equals_runs_that_encode():
    found = benchmark_training.main([*TINY, "--members", "2", "--batch_size", "2"])
    assert found["difference"] < 1e-5
    assert 1 < found["ratio"] < 2.2, "a step is forward and the gradients of activations, of the conditioned part alone"


def test_operations_grow_as_members_do_and_passes_bound_memory():
    words = ["--members", "2", "4", "--n", "1", "--steps", "3", "--latents", "1", "--chunk"]
    four, all_at_once = (benchmark_growth.main([*TINY, *words, chunk]) for chunk in ("4", "100"))
    usual, more = four
    assert more["operations"] == pytest.approx(2 * usual["operations"], rel=0.2)
    assert more["bytes"] < 1.3 * usual["bytes"] and all_at_once[1]["bytes"] > 1.6 * all_at_once[0]["bytes"]


def test_samplers_are_ranked_against_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_sampling, "REFERENCE", ("DDIM", 8))
    path = write_ensemble(tmp_path)
    words = ["--path", str(path), "--samplers", "Heun", "--step_counts", "4", "--n", "1", "--device", "cpu"]
    heun, reference = benchmark_sampling.main(words)
    assert reference["spearman"] == pytest.approx(1) and -1 <= heun["spearman"] <= 1
    assert (reference["evaluations"], heun["evaluations"]) == (5, 6), "half of the steps and the branched one"


def test_helpers():
    slow, fast = Timing((2.0, 4.0, 3.0)), Timing((1.0, 1.0, 2.0))
    assert ratios(slow, fast) == (2.0, 1.5, 4.0) and str(fast) == "1000.0 ms [1000.0 .. 2000.0]"
    assert operations(lambda: torch.zeros(3, 4) @ torch.zeros(4, 5)) == 2 * 3 * 4 * 5
    assert table([{"a": 1, "b": 2}]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
