"""A method of a benchmark: what it is asked for, and what its answer costs.

A method of one's own is a class of a page: a name, a kind, and `score`. In a file `mine.py`,

    class PredictedNorm:
        name = "size of the predicted noise"
        kind = "control"

        def score(self, problem):
            *_, last = problem.walk(problem.build()(problem.base))
            return Scored(last.eps.square())

and in the config `benchmark_methods: [{target: mine.PredictedNorm}]`.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ldm.benchmark.problem import Problem
from ldm.experiments.timing import count_operations
from ldm.memory import peak_bytes

# Epistemic: of the weights. Aleatoric: of the data. Control: what knows of neither, or only of counts.
MethodKind = Literal["epistemic", "aleatoric", "control"]
METHOD_KINDS = ("epistemic", "aleatoric", "control")
# Noises of every class at which operations and memory are counted.
COUNTED_NOISES = 1


@dataclass(frozen=True)
class Scored:
    """What a method says of the pictures of a problem.

    Attributes:
        map: one value a pixel [B, C, H, W], larger where less is known; None where a method has no map.
        value: one number a picture [B]; the sum of the map where it is not given.
        unit: "variance" where the map is a variance of the picture's pixels, whose size can be held to an oracle's.
    """

    map: Tensor | None = None
    value: Tensor | None = None
    unit: str = ""

    @property
    def values(self) -> Tensor:
        """One number a picture [B], float64."""
        if self.value is not None:
            return self.value.double()
        if self.map is None:
            raise ValueError("a method gives a map, a value of each picture, or both; this one gave neither")
        return self.map.double().flatten(1).sum(1)


@runtime_checkable
class UncertaintyMethod(Protocol):
    """What is compared: a way to say of every picture, and of its pixels, how little is known."""

    name: str
    kind: MethodKind

    def score(self, problem: Problem) -> Scored:
        """Return the scores of a problem's pictures, in their order."""


def find_gap(method: object) -> str:
    """Return why a method cannot be run here, "" where it can.

    A method that stands on a library of an extra names its module and the extra by `needs = (module, extra)`.
    """
    needs = getattr(method, "needs", None)
    if needs is None or importlib.util.find_spec(needs[0]) is not None:
        return ""
    return f"not run: {needs[0]} is not installed (pip install 'decu-uncertainty[{needs[1]}]')"


@dataclass(frozen=True)
class Counted:
    """What one picture takes of a method, the same in every world.

    Attributes:
        evaluations: multiplications and additions, in evaluations of the network.
        memory_bytes: the most that tensors took at once for one picture of every class.
    """

    evaluations: float
    memory_bytes: int


@dataclass(frozen=True)
class MethodCost:
    """What the scores of a problem's pictures cost, beside the base network.

    Attributes:
        evaluations: multiplications and additions of one picture, in evaluations of the network.
        seconds: of all pictures.
        train_seconds: of what had to be trained first, once; networks trained together share theirs by their number.
        disk_bytes: of what has to be kept beside the base network.
        memory_bytes: the most that tensors took at once for one picture of every class.
    """

    evaluations: float
    seconds: float
    train_seconds: float
    disk_bytes: int
    memory_bytes: int


def count_evaluation(problem: Problem) -> int:
    """Return the operations of one evaluation of the base network for one picture."""
    labels = torch.zeros(1, dtype=torch.long)
    return count_operations(lambda: problem.base(torch.zeros(1, *problem.shape), torch.zeros(1), labels))


def count_method(method: UncertaintyMethod, problem: Problem) -> Counted:
    """Count what a method takes for one picture of every class."""
    own = problem.with_size(noises=COUNTED_NOISES)
    method.score(own)  # trains and fits what is missing
    operations = count_operations(lambda: method.score(own))
    memory = peak_bytes(lambda: method.score(own))
    return Counted(operations / count_evaluation(problem) / len(own.labels), memory)


def score_with_cost(
    method: UncertaintyMethod, problem: Problem, counts: dict[str, Counted]
) -> tuple[Scored, MethodCost]:
    """Score the pictures, and say what it costs.

    Args:
        counts: {method: what one picture takes}; one that is missing is counted, and added.

    Raises:
        ValueError: if a value or a map has another shape than the pictures, or is not finite.
    """
    if method.name not in counts:
        counts[method.name] = count_method(method, problem)
    method.score(problem.with_size(noises=COUNTED_NOISES))  # trains and fits what is missing in this world
    problem.trained.artefacts.used.clear()
    began = time.perf_counter()
    scored = method.score(problem)
    seconds = time.perf_counter() - began
    check_scored(scored, problem, method.name)
    used = {name: one for name, one in problem.trained.artefacts.used.items() if name != "scratch"}
    kept = sum(one.bytes for one in used.values())
    trained = sum(one.seconds for one in used.values())
    if "ensemble" in used:
        trained += problem.trained.scratch_seconds(problem.settings.members)
    own = counts[method.name]
    return scored, MethodCost(own.evaluations, seconds, trained, kept, own.memory_bytes)


def check_scored(scored: Scored, problem: Problem, name: str) -> None:
    """Make sure that scores are of these pictures.

    Raises:
        ValueError: naming the method, what was expected, and what came.
    """
    count = len(problem.labels)
    if scored.values.shape != (count,):
        raise ValueError(f"{name}: expected a value of each of {count} pictures, got {list(scored.values.shape)}")
    if scored.map is not None and scored.map.shape != (count, *problem.shape):
        raise ValueError(f"{name}: expected a map {[count, *problem.shape]}, got {list(scored.map.shape)}")
    parts = [scored.values] if scored.map is None else [scored.values, scored.map]
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise ValueError(f"{name}: scores hold values that are not finite")
