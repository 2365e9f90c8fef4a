"""A benchmark as a list of cells, each a file: what is there is kept, so that a run continues where it stopped."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ldm.benchmark.cells import (
    ORACLES,
    make_file_name,
    measure_method,
    read_cell,
    read_oracle,
    read_row,
    sample_oracle,
)
from ldm.benchmark.measures import SeedScores
from ldm.benchmark.method import Counted, UncertaintyMethod
from ldm.benchmark.problem import Problem
from ldm.benchmark.settings import EVERY_IMAGE, FEW_IMAGES, BenchmarkSettings, World
from ldm.evaluation.recognition import PixelClassifier
from ldm.experiments.small_networks import SmallNetwork, SmallTraining, read_digits
from ldm.jobs import WorkList

# Evaluations a picture that a method is taken to need in the estimate of time, all numbers of steps together.
TYPICAL_EVALUATIONS = 600
# Heads and further networks that are trained in each world, in heads' trainings.
HEAD_TRAININGS = 5


@dataclass(frozen=True)
class PlannedCell:
    """One cell: an oracle's pictures or a method's scores in one world.

    Attributes:
        world: whose.
        name: of the method or the oracle.
        file: where it is written.
        method: None for an oracle.
    """

    world: World
    name: str
    file: Path
    method: UncertaintyMethod | None = None

    @property
    def key(self) -> str:
        """What --only names it by: few_0/deep-ensemble."""
        return f"{self.world.name}/{self.file.stem}"

    @property
    def done(self) -> bool:
        """Whether it is there."""
        return self.file.exists()


@dataclass(frozen=True)
class BenchmarkPlan:
    """The cells of a benchmark in the order of their making: seed by seed, so that a stopped run has whole seeds.

    Attributes:
        settings: sizes.
        methods: what is compared.
        rows: files of scores that were made elsewhere.
        out: the folder of networks and cells.
    """

    settings: BenchmarkSettings
    methods: Sequence[UncertaintyMethod]
    out: Path
    rows: Sequence[str] = ()
    _problems: dict[str, Problem] = field(default_factory=dict)
    _counts: dict[str, Counted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two methods are called '{twice[0]}': give each a name of its own")

    def check_folder(self) -> None:
        """Make sure that the folder holds cells of these settings; more seeds may be added.

        Raises:
            ValueError: naming the setting that differs.
        """
        kept = {name: value for name, value in self.settings.as_dict().items() if name != "seeds"}
        WorkList(self.out / "cells", kept)

    @cached_property
    def cells(self) -> list[PlannedCell]:
        """Every cell."""
        found = []
        for seed in range(self.settings.seeds):
            for data in (FEW_IMAGES, EVERY_IMAGE):
                world = World(data, seed)
                folder = self.out / "cells" / world.name
                for name in ORACLES:
                    found.append(PlannedCell(world, name, folder / f"oracle-{make_file_name(name)}.safetensors"))
                for method in self.methods:
                    file = folder / f"{make_file_name(method.name)}.safetensors"
                    found.append(PlannedCell(world, method.name, file, method))
        return found

    def problem(self, world: World) -> Problem:
        """Return the problem of a world, the same object for all of its cells."""
        if world.name not in self._problems:
            self._problems[world.name] = Problem.make(self.settings, world, self.out / "networks")
        return self._problems[world.name]

    def make(self, cell: PlannedCell, about: Mapping[str, Any]) -> None:
        """Make one cell; `about` says by which command."""
        problem = self.problem(cell.world)
        if cell.method is None:
            sample_oracle(cell.name, problem, cell.file)
        else:
            own = {**about, "seed": cell.world.seed}
            measure_method(cell.method, problem, cell.file, own, self._counts)

    def estimate(self, pending: Sequence[PlannedCell]) -> float:
        """Estimate the seconds of what is missing, from a few steps of training and a few evaluations made now."""
        step, evaluation = probe_speed(self.settings)
        seconds = 0.0
        for name in dict.fromkeys(cell.world.name for cell in pending):
            few = name.startswith(FEW_IMAGES)
            count = self.settings.retrainings if few else self.settings.control_retrainings
            if not (self.out / "networks" / name / "scratch.safetensors").exists():
                networks = 2 + self.settings.members + count
                seconds += step * self.settings.steps * networks
                seconds += step * self.settings.head_steps * HEAD_TRAININGS * self.settings.members
        pictures = 10 * self.settings.noises
        sampled = self.settings.retrainings * self.settings.sampler_steps
        for cell in pending:
            seconds += evaluation * pictures * (TYPICAL_EVALUATIONS if cell.method else sampled)
        return seconds

    def read_seed(self, seed: int) -> SeedScores | None:
        """Return what a seed gave; None while a cell of it is missing."""
        own = [cell for cell in self.cells if cell.world.seed == seed]
        if not all(cell.done for cell in own):
            return None
        images, labels = read_digits("train")
        classifier = PixelClassifier(images.numpy(), labels.numpy())
        cells: dict[str, dict[str, Any]] = {FEW_IMAGES: {}, EVERY_IMAGE: {}}
        oracles: dict[str, dict[str, Any]] = {FEW_IMAGES: {}, EVERY_IMAGE: {}}
        for cell in own:
            if cell.method is None:
                oracles[cell.world.data][cell.name] = read_oracle(cell.file)
            else:
                cells[cell.world.data][cell.name] = read_cell(cell.file)
        problem = self.problem(World(FEW_IMAGES, seed))
        for data, read in cells.items():
            for file in self.rows:
                row = read_row(file, World(data, seed).name, len(problem.labels))
                read[row.name] = row
        recognised = {
            data: classifier.recognised(next(iter(own.values())).base.numpy(), problem.labels.numpy())
            for data, own in oracles.items()
        }
        return SeedScores(cells, oracles, problem.is_few.numpy(), recognised)


def probe_speed(settings: BenchmarkSettings, steps: int = 5) -> tuple[float, float]:
    """Measure the seconds of a step of training a network, and of an evaluation of a picture, many at once."""
    images, labels = read_digits("train")
    count = settings.members + settings.retrainings
    chosen = torch.arange(len(images)).repeat(count, 1)
    began = time.perf_counter()
    networks = SmallTraining(steps, settings.batch, settings.rate).train(images, labels, chosen, 0)
    step = (time.perf_counter() - began) / steps / count
    rows = images[:1000], torch.full((1000,), 0.5), labels[:1000]
    network: SmallNetwork = networks[0]
    began = time.perf_counter()
    for _ in range(5):
        network(*rows)
    return step, (time.perf_counter() - began) / 5 / len(rows[0])
