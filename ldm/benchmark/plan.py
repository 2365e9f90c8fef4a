"""A benchmark as a list of cells, each a file: what is there is kept, so that a run continues where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.benchmark.averaging import measure_averaging
from ldm.benchmark.cells import (
    LAYER_REFITTED,
    MEASURE_AGAIN,
    RETRAINED,
    has_row,
    make_file_name,
    measure_method,
    read_cell,
    read_oracle,
    read_row,
    sample_oracle,
)
from ldm.benchmark.images import BenchmarkImages, read_benchmark_images
from ldm.benchmark.levels import measure_levels
from ldm.benchmark.measures import SeedScores
from ldm.benchmark.method import Counted, UncertaintyMethod, find_gap
from ldm.benchmark.problem import Problem
from ldm.benchmark.quality import KeptPictures, PictureJudge
from ldm.benchmark.settings import CLASS_LEFT_OUT, EVERY_IMAGE, FEW_IMAGES, WORLD_NAMES, BenchmarkSettings, World
from ldm.checkpoint import load_state_dict
from ldm.experiments.small_networks import SmallNetwork, SmallTraining
from ldm.files import read_metadata
from ldm.jobs import WorkList

# Studies of networks: variances at single noise levels, and averaged members.
LEVELS_STUDY, AVERAGING_STUDY = "levels", "averaging"
# What the names of oracles' cells begin with.
_ORACLE = "oracle "
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
        method: None for pictures of an oracle's networks and for studies of networks.
        study: writes those.
    """

    world: World
    name: str
    file: Path
    method: UncertaintyMethod | None = None
    study: Callable[[Problem, Path], None] | None = None

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
        out: the folder of networks and cells.
        rows: files of scores that were made elsewhere.
        images: what is trained on and asked about.
    """

    settings: BenchmarkSettings
    methods: Sequence[UncertaintyMethod]
    out: Path
    rows: Sequence[str] = ()
    images: BenchmarkImages = field(default_factory=lambda: read_benchmark_images(None))
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
        WorkList(self.out / "cells", {**kept, "data": self.images.record})

    @cached_property
    def cells(self) -> list[PlannedCell]:
        """Every cell."""
        found = []
        for seed in range(self.settings.seeds):
            for data in WORLD_NAMES:
                world = World(data, seed)
                folder = self.out / "cells" / world.name
                for name, study in STUDIES[data].items():
                    found.append(PlannedCell(world, name, folder / f"{make_file_name(name)}.safetensors", study=study))
                for method in self.methods:
                    file = folder / f"{make_file_name(method.name)}.safetensors"
                    if method.name not in self.gaps or file.exists():
                        found.append(PlannedCell(world, method.name, file, method))
        return found

    @cached_property
    def gaps(self) -> dict[str, str]:
        """{method: why it cannot be run here}."""
        found = {method.name: find_gap(method) for method in self.methods}
        return {name: reason for name, reason in found.items() if reason}

    def problem(self, world: World) -> Problem:
        """Return the problem of a world, the same object for all of its cells."""
        if world.name not in self._problems:
            self._problems[world.name] = Problem.make(self.settings, world, self.out / "networks", self.images)
        return self._problems[world.name]

    def make(self, cell: PlannedCell, about: Mapping[str, Any]) -> None:
        """Make one cell; `about` says by which command."""
        problem = self.problem(cell.world)
        if cell.method is not None:
            own = {**about, "seed": cell.world.seed}
            measure_method(cell.method, problem, cell.file, own, self._counts)
        elif cell.study is not None:
            cell.study(problem, cell.file)

    def estimate(self, pending: Sequence[PlannedCell]) -> float:
        """Estimate the seconds of what is missing, from a few steps of training and a few evaluations made now."""
        step, evaluation = probe_speed(self.settings, self.images)
        seconds = 0.0
        for name in dict.fromkeys(cell.world.name for cell in pending):
            count = World(name.split("_")[0], 0).retrainings(self.settings)
            if not (self.out / "networks" / name / "scratch.safetensors").exists():
                networks = 2 + self.settings.members + count
                seconds += step * self.settings.steps * networks
                seconds += step * self.settings.head_steps * HEAD_TRAININGS * self.settings.members
        pictures = 10 * self.settings.noises
        sampled = self.settings.retrainings * self.settings.sampler_steps
        for cell in pending:
            seconds += evaluation * pictures * (TYPICAL_EVALUATIONS if cell.method else sampled)
        return seconds

    @cached_property
    def judge(self) -> PictureJudge:
        """What says how good pictures are."""
        return PictureJudge.make(self.images)

    def is_whole(self, seed: int) -> bool:
        """Whether every cell of a seed is there."""
        return all(cell.done for cell in self.cells if cell.world.seed == seed)

    def study_file(self, name: str, data: str, seed: int) -> Path:
        """Return the file of a study of networks."""
        return self.out / "cells" / World(data, seed).name / f"{name}.safetensors"

    def read_study(self, name: str, data: str, seed: int) -> dict[str, Tensor]:
        """Return what a study of networks wrote.

        Raises:
            ValueError: if its file holds something else.
        """
        file = self.study_file(name, data, seed)
        found = read_metadata(file, "name")["name"]
        if found != name:
            raise ValueError(f"{file} holds '{found}', expected {name}; {MEASURE_AGAIN}")
        return load_state_dict(file)

    def read_seed(self, seed: int) -> SeedScores | None:
        """Return what a seed gave; None while a cell of it is missing."""
        if not self.is_whole(seed):
            return None
        cells: dict[str, dict[str, Any]] = {data: {} for data in WORLD_NAMES}
        oracles: dict[str, dict[str, Any]] = {data: {} for data in WORLD_NAMES}
        for cell in self.cells:
            if cell.world.seed != seed:
                continue
            if cell.method is not None:
                cells[cell.world.data][cell.name] = read_cell(cell.file)
            elif cell.name.startswith(_ORACLE):
                oracle = read_oracle(cell.file)
                oracles[cell.world.data][oracle.name] = oracle
        problem = self.problem(World(FEW_IMAGES, seed))
        for data, read in cells.items():
            for file in self.rows:
                if data != CLASS_LEFT_OUT or has_row(file, World(data, seed).name):
                    row = read_row(file, World(data, seed).name, len(problem.labels))
                    read[row.name] = row
        base = {data: own[RETRAINED].base for data, own in oracles.items()}
        sets = self.images.real_sets(self.settings, seed)
        return SeedScores(
            cells,
            oracles,
            problem.is_few.numpy(),
            {data: self.judge.recognised(pictures, problem.labels) for data, pictures in base.items()},
            is_out=problem.is_out.numpy(),
            real_sets=np.array([name for name, own in sets.items() for _ in own]),
            kept=KeptPictures(self.judge, self.judge.features(base[FEW_IMAGES]), seed),
            checked=problem.checked.numpy(),
            sampler_steps=self.settings.sampler_steps,
        )


def _oracle(name: str) -> tuple[str, Callable[[Problem, Path], None]]:
    """Return the name of an oracle's cell and what writes it."""
    return f"{_ORACLE}{name}", partial(sample_oracle, name)


# What is written of networks in each world, beside the scores of methods.
_PICTURES = dict([_oracle(RETRAINED), _oracle(LAYER_REFITTED)])
_AVERAGED: dict[str, Callable[[Problem, Path], None]] = {AVERAGING_STUDY: measure_averaging}
STUDIES: dict[str, dict[str, Callable[[Problem, Path], None]]] = {
    FEW_IMAGES: _PICTURES | {LEVELS_STUDY: measure_levels} | _AVERAGED,
    EVERY_IMAGE: _PICTURES | _AVERAGED,
    CLASS_LEFT_OUT: dict([_oracle(RETRAINED)]),
}


def probe_speed(settings: BenchmarkSettings, source: BenchmarkImages, steps: int = 5) -> tuple[float, float]:
    """Measure the seconds of a step of training a network, and of an evaluation of a picture, many at once."""
    images, labels = source.train, source.labels
    count = settings.members + settings.retrainings
    chosen = torch.arange(len(images)).repeat(count, 1)
    began = time.perf_counter()
    recipe = SmallTraining(steps, settings.batch, settings.rate, width=settings.width)
    networks = recipe.train(images, labels, chosen, 0)
    step = (time.perf_counter() - began) / steps / count
    rows = images[:1000], torch.full((len(images[:1000]),), 0.5), labels[:1000]
    network: SmallNetwork = networks[0]
    began = time.perf_counter()
    for _ in range(5):
        network(*rows)
    return step, (time.perf_counter() - began) / 5 / len(rows[0])
