"""What was measured of one method, or sampled of one oracle, in one world: a file each, so that a run continues."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.benchmark.method import (
    METHOD_KINDS,
    Counted,
    MethodCost,
    Scored,
    UncertaintyMethod,
    check_scored,
    score_with_cost,
)
from ldm.benchmark.problem import Problem
from ldm.benchmark.settings import FEW_IMAGES
from ldm.checkpoint import load_state_dict, save_tensors
from ldm.files import read_json, read_metadata, reading

# The oracles: networks whose pictures' variance is what methods are held to.
RETRAINED, LAYER_REFITTED = "retrained from scratch", "last layer refitted"
ORACLES = (RETRAINED, LAYER_REFITTED)
# What mends a cell that cannot be read.
MEASURE_AGAIN = "remove it, and start the command again"
# What the names of tensors by other numbers of steps begin with.
_STEPS = "steps_"


@dataclass(frozen=True)
class ScoreCell:
    """A method's scores of one world's pictures.

    Attributes:
        name, kind, unit: of the method.
        values: of every picture [B]; map: of its pixels [B, D], None where there is none.
        record: command, seed, cost.
        steps: {number of steps: values [b] of some pictures with it}, empty where they were not asked for.
        reals: values [R] of real images, None where they were not asked for.
    """

    name: str
    kind: str
    unit: str
    values: Tensor
    map: Tensor | None
    record: Mapping[str, Any]
    steps: Mapping[int, Tensor] = field(default_factory=dict)
    reals: Tensor | None = None


@dataclass(frozen=True)
class OracleCell:
    """Pictures of an oracle's networks [M, B, D], those of the base [B, D], and some by other numbers of steps.

    Attributes:
        steps: {number of steps: pictures [M, b, D]}, empty where they were not asked for.
    """

    name: str
    pictures: Tensor
    base: Tensor
    steps: Mapping[int, Tensor] = field(default_factory=dict)

    @cached_property
    def variance(self) -> Tensor:
        """The unbiased variance over the networks [B, D]."""
        return self.pictures.double().var(0)


def make_file_name(name: str) -> str:
    """Return a method's name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def measure_method(
    method: UncertaintyMethod, problem: Problem, file: Path, about: Mapping[str, Any], counts: dict[str, Counted]
) -> None:
    """Score a world's pictures by a method, and write its cell.

    Args:
        about: by which command and seed.
        counts: see `score_with_cost`.
    """
    scored, cost = score_with_cost(method, problem, counts)
    settings = problem.settings
    found = {"values": scored.values}
    if scored.map is not None:
        found["map"] = scored.map.flatten(1).float()
    if problem.world.data == FEW_IMAGES:
        for steps in settings.other_steps:
            found[f"{_STEPS}{steps}"] = method.score(problem.with_size(steps, settings.check_noises)).values
    else:
        reals = problem.of_reals()
        given = method.score(reals)
        check_scored(given, reals, f"{method.name}, of real images")
        found["reals"] = given.values
    write_cell(file, method, scored, found, cost, about)


def write_cell(
    file: Path,
    method: UncertaintyMethod,
    scored: Scored,
    found: Mapping[str, Tensor],
    cost: MethodCost,
    about: Mapping[str, Any],
) -> None:
    """Write the tensors of a method with what they are."""
    record = {**about, "cost": asdict(cost)}
    words = {"name": method.name, "kind": method.kind, "unit": scored.unit, "record": json.dumps(record, default=str)}
    save_tensors(dict(found), file, words, overwrite=True)


def read_cell(file: Path) -> ScoreCell:
    """Read a method's cell."""
    words = read_metadata(file, "name", "kind", "unit", "record")
    tensors = load_state_dict(file)
    with reading(file, "the scores of a method", MEASURE_AGAIN):
        return ScoreCell(
            name=words["name"],
            kind=words["kind"],
            unit=words["unit"],
            values=tensors["values"],
            map=tensors.get("map"),
            record=json.loads(words["record"]),
            steps=_read_steps(tensors),
            reals=tensors.get("reals"),
        )


def _read_steps(tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Return {number of steps: tensor} of a cell's tensors."""
    return {int(name.removeprefix(_STEPS)): value for name, value in tensors.items() if name.startswith(_STEPS)}


def read_row(file: str | Path, world: str, pictures: int) -> ScoreCell:
    """Read scores that were made elsewhere: a JSON file {name, kind, unit, worlds: {world: {values, map}}}.

    Args:
        file: see docs/benchmark.md, "A row as a file".
        world: few_0, all_0, few_1 and so on.
        pictures: how many scores it must hold.

    Raises:
        ValueError: saying what is missing or wrong.
    """
    content = read_json(Path(file), "scores of a benchmark's pictures", "see docs/benchmark.md for its form")
    if content.get("kind") not in METHOD_KINDS or not content.get("name"):
        raise ValueError(
            f"{file}: expected a name, and a kind among {', '.join(METHOD_KINDS)}; got {content.get('kind')!r}"
        )
    own = content.get("worlds", {}).get(world)
    if own is None or len(own.get("values", ())) != pictures:
        got = "nothing" if own is None else f"{len(own.get('values', ()))} values"
        raise ValueError(f"{file}: expected {pictures} values of {world}, in the order of its pictures; got {got}")
    values = torch.tensor(own["values"], dtype=torch.float64)
    maps = None if own.get("map") is None else torch.tensor(own["map"], dtype=torch.float32).reshape(pictures, -1)
    return ScoreCell(content["name"], content["kind"], content.get("unit", ""), values, maps, {})


def has_row(file: str | Path, world: str) -> bool:
    """Whether a file of scores that were made elsewhere has some of a world."""
    return world in read_json(Path(file), "scores of a benchmark's pictures", "see docs/benchmark.md").get("worlds", {})


def sample_oracle(name: str, problem: Problem, file: Path) -> None:
    """Sample the pictures of an oracle's networks and write them."""
    settings = problem.settings
    members = problem.trained.retrained if name == RETRAINED else problem.trained.refits()
    found = {"pictures": problem.sample(members).flatten(2), "base": problem.pictures.flatten(1)}
    if problem.world.data == FEW_IMAGES and name == RETRAINED:
        for steps in settings.other_steps:
            found[f"{_STEPS}{steps}"] = problem.with_size(steps, settings.check_noises).sample(members).flatten(2)
    save_tensors(found, file, {"name": name}, overwrite=True)


def read_oracle(file: Path) -> OracleCell:
    """Read an oracle's cell."""
    name = read_metadata(file, "name")["name"]
    tensors = load_state_dict(file)
    with reading(file, "the pictures of an oracle", MEASURE_AGAIN):
        return OracleCell(name, tensors["pictures"], tensors["base"], _read_steps(tensors))
