"""Does leading samples to where members agree do more than leading them anywhere, equally strongly?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import stack_module_state

from ldm.commands.line import run_file
from ldm.diffusion.affine import CosineSchedule
from ldm.diffusion.denoiser import Denoiser, NetworkDenoiser, Target
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.steering import SteeredDenoiser, spread_times
from ldm.diffusion.transition import ddim
from ldm.ensembles.members import MemberNetwork, Members
from ldm.experiments.judged_digits import Classed, Judge
from ldm.experiments.small_networks import SmallNetwork, SmallTraining, read_digits, sampling_times
from ldm.pipelines.steering import edges_of, fixed_direction, members_apart
from ldm.records import Row, write_record
from ldm.report.plots import Curve, curve_plot
from ldm.report.tables import markdown_table, write_csv
from ldm.stats import mean_interval
from ldm.util import generator

# How strongly: the share of the predicted noise by which it is turned.
STRENGTHS = (0.03, 0.06, 0.12, 0.25)
# Deviations of the first noise: the free way to trade variety for likeness.
DEVIATIONS = (0.97, 0.94, 0.88, 0.75)
QUIETER = "less noise at the start"
# Steps of the exact solution, and of the few that times are laid out for.
FINE, FEW = 200, 8
POWERS = (0.5, 1.0)


@dataclass(frozen=True)
class SteeringStudy:
    """Steer the samples of small networks by the members' disagreement, by edges, and by a random direction.

    For each seed --members networks are trained from scratch on the digits, three classes of which have ten images; the
    first one draws 100 images of each class by 40 steps of DDIM. Steering turns the predicted noise by the same share
    of its length whatever steers. Beside it, the free way: a first noise of a smaller deviation. Precision and recall
    are against all real digits, in the features of a classifier of them.

    At equal recall: the precision of steering by disagreement minus that of another way, interpolated on its curve over
    strengths at the same recall, mean over the strengths whose recall the other way's curve reaches.

    Steps: the root mean square difference of 8 steps from 200 steps of the same noise, with times that are even, closer
    where the members disagree, and closer where the predicted noise turns (no members).

    Examples:
      python -m benchmarks.steering --out results/steering

    Writes {out}/steering.csv, equal_recall.csv, steps.csv, steering.png, record.json.
    """

    out: str
    """The folder of the tables and the figure."""
    seeds: int = 3
    """Seeds of trainings and noises."""
    members: int = 5
    """Networks of a seed."""
    each: int = 100
    """Images of each class."""
    training_steps: int = SmallTraining.steps
    """Steps of each training."""
    sampler_steps: int = 40
    """Steps of the sampler."""

    def run(self) -> list[Row]:
        """Train, sample, measure, and write; return the rows of steering.csv."""
        begun = time.process_time()
        judge = Judge.make()
        runs = [self.play(seed, judge) for seed in range(self.seeds)]
        found = [each for each, _ in runs]
        table = make_table(found)
        equal = compare_at_equal_recall(found)
        steps = summarise_steps([each for _, each in runs])
        seconds = time.process_time() - begun
        note = (
            f"{self.seeds} seeds, {self.members} members of 26,000 parameters, {10 * self.each} samples by "
            f"{self.sampler_steps} steps; Student's intervals over seeds; {seconds:.0f} CPU s"
        )
        out = Path(self.out)
        for name, rows in {"steering": table, "equal_recall": equal, "steps": steps}.items():
            print(markdown_table(rows, 3))
            write_csv(out / f"{name}.csv", rows, [note], overwrite=True)
        print(note)
        draw(found, note, out / "steering.png")
        write_record(out / "record.json", self, overwrite=True, note=note)
        return table

    def play(self, seed: int, judge: Judge) -> tuple[dict[tuple[str, float], Classed], dict[str, float]]:
        """Return what is measured of each way and strength, and the errors of few steps by the layout of times."""
        world = SteeredWorld.train(seed, self.members, self.training_steps, self.each)
        times = sampling_times(self.sampler_steps)
        found = {("none", 0.0): judge.measure(world.sample(world.base, times), world.labels)}
        for name, measure in world.measures().items():
            for strength in STRENGTHS:
                steered = SteeredDenoiser(world.base, CosineSchedule(), measure, strength)
                found[name, strength] = judge.measure(world.sample(steered, times), world.labels)
        for deviation in DEVIATIONS:
            samples = world.sample(world.base, times, deviation)
            found[QUIETER, 1 - deviation] = judge.measure(samples, world.labels)
        return found, world.errors_of_few_steps()


@dataclass(frozen=True)
class SteeredWorld:
    """Trained networks of a seed, and the conditions and noises of the samples."""

    networks: list[SmallNetwork]
    labels: Tensor
    seed: int

    @classmethod
    def train(cls, seed: int, members: int, steps: int, each: int) -> SteeredWorld:
        """Train on the digits, three classes of which have ten images."""
        images, labels = read_digits("train")
        few = torch.randperm(10, generator=generator("few classes", seed))[:3].tolist()
        kept = []
        for label in range(10):
            own = (labels == label).nonzero().flatten()
            kept.append(
                own[torch.randperm(len(own), generator=generator("few", seed, label))][: 10 if label in few else None]
            )
        chosen = torch.cat(kept)
        recipe = SmallTraining(steps, target="v")
        drawn = chosen[torch.randint(len(chosen), (members - 1, len(chosen)), generator=generator("bootstrap", seed))]
        networks = recipe.train(images, labels, torch.cat([chosen[None], drawn]), seed)
        return cls(networks, torch.arange(10).repeat_interleave(each), seed)

    @property
    def base(self) -> Denoiser:
        """The network that draws, trained on all images."""
        return NetworkDenoiser(self.networks[0], CosineSchedule(), Target("v"), self.labels)

    @property
    def members(self) -> Denoiser:
        """All networks; the others were trained on bootstraps."""
        stacked = {name: value.detach() for name, value in stack_module_state(self.networks)[0].items()}
        network = MemberNetwork(self.networks[0], Members(stacked), 20_000)
        return NetworkDenoiser(network, CosineSchedule(), Target("v"), self.labels)

    def measures(self) -> dict[str, Callable[[Tensor, Tensor | float], Tensor]]:
        """Return what steers, by name."""
        return {
            "disagreement": members_apart(self.members),
            "edges": edges_of(self.base),
            "random direction": fixed_direction(range(len(self.labels)), self.seed),
        }

    def start(self) -> Tensor:
        """Return the first noises."""
        noise = ImageNoise(self.seed, tuple(range(len(self.labels))))
        return noise.initial((len(self.labels), 1, 8, 8))

    @torch.no_grad()
    def sample(self, denoiser: Denoiser, times: Tensor, deviation: float = 1.0) -> Tensor:
        """Return samples [B, 1, 8, 8] from a first noise of a deviation."""
        *_, last = ddim(denoiser, CosineSchedule(), deviation * self.start(), times)
        return last.x_next

    @torch.no_grad()
    def errors_of_few_steps(self) -> dict[str, float]:
        """Return the root mean square difference from the fine solution, by how the times are laid out."""
        exact = self.sample(self.base, sampling_times(FINE))
        even = sampling_times(FEW)
        apart, turns, before = [], [], None
        members = members_apart(self.members)
        fine = sampling_times(FEW * 8)
        for step in ddim(self.base, CosineSchedule(), self.start(), fine):
            apart.append(float(members(step.x, step.u).mean()))
            turns.append(0.0 if before is None else float((step.eps - before).square().mean()))
            before = step.eps
        turns[0] = turns[1]
        found = {"even": self._error(even, exact)}
        for name, density in {"members' disagreement": apart, "turns of the noise": turns}.items():
            values = torch.tensor(density, dtype=torch.float64)
            for power in POWERS:
                spread = spread_times(fine, values.clamp(min=float(values.max()) * 1e-6), power)[::8]
                found[f"{name}, power {power:g}"] = self._error(spread, exact)
        return found

    def _error(self, times: Tensor, exact: Tensor) -> float:
        return float((self.sample(self.base, times) - exact).square().mean().sqrt())


def make_table(found: list[dict[tuple[str, float], Classed]]) -> list[Row]:
    """Return a row for each way and strength, means over seeds."""
    rows: list[Row] = []
    for name, strength in found[0]:
        own = [each[name, strength] for each in found]
        row: Row = {"steered by": name, "strength": strength}
        for column in ("precision", "recall", "frechet", "recognised"):
            interval = mean_interval([getattr(one, column) for one in own])
            row |= {column: interval.estimate, f"{column} +-": (interval.high - interval.low) / 2}
        rows.append(row)
    return rows


def compare_at_equal_recall(found: list[dict[tuple[str, float], Classed]]) -> list[Row]:
    """Return a row for each other way: the precision that disagreement has over it at the same recall."""
    rows: list[Row] = []
    for other in ("edges", "random direction", QUIETER):
        differences = []
        for each in found:
            own, theirs = curve_of(each, "disagreement"), curve_of(each, other)
            inside = [point for point in own[1:] if theirs[:, 0].min() <= point[0] <= theirs[:, 0].max()]
            order = theirs[theirs[:, 0].argsort()]
            gained = [point[1] - np.interp(point[0], order[:, 0], order[:, 1]) for point in inside]
            if gained:
                differences.append(float(np.mean(gained)))
        interval = mean_interval(differences) if differences else None
        rows.append(
            {
                "against": other,
                "precision at equal recall": None if interval is None else interval.estimate,
                "low": None if interval is None else interval.low,
                "high": None if interval is None else interval.high,
                "seeds": len(differences),
            }
        )
    return rows


def curve_of(each: dict[tuple[str, float], Classed], name: str) -> NDArray[np.float64]:
    """Return recall and precision of one way over strengths [S, 2], unsteered first."""
    points = [each["none", 0.0], *(value for (own, _), value in each.items() if own == name)]
    return np.array([[point.recall, point.precision] for point in points])


def summarise_steps(each: list[dict[str, float]]) -> list[Row]:
    """Return a row for each layout of times: its error over that of even ones, and the error itself."""
    rows: list[Row] = []
    for name in each[0]:
        ratio = mean_interval([own[name] / own["even"] for own in each])
        error = float(np.mean([own[name] for own in each]))
        rows.append({"times": name, "error": error, "over even": ratio.estimate, "low": ratio.low, "high": ratio.high})
    return rows


def draw(found: list[dict[tuple[str, float], Classed]], note: str, path: Path) -> None:
    """Draw precision over recall of each way, means over seeds; the greatest strengths are named."""
    names = list(dict.fromkeys(name for name, _ in found[0] if name != "none"))
    curves = {}
    for name in names:
        points = np.mean([curve_of(each, name) for each in found], 0)
        strengths = [0.0, *(strength for own, strength in found[0] if own == name)]
        names = [f"{one:g}" if one >= max(strengths) / 2 else "" for one in strengths]  # the others lie too close
        curves[name] = Curve(points[:, 0], points[:, 1], names=names)
    curve_plot(curves, path, "recall", "precision", "Steered samples: likeness against variety", note,
               legend="steered by", overwrite=True)  # fmt: skip


if __name__ == "__main__":
    run_file(SteeringStudy)
