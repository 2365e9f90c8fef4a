"""Mutual information of the same classes by ensembles in pixels and in latents, in a unit that they have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.experiments.timing import write_numbers
from ldm.options import option
from ldm.pipelines import EnsemblePipeline, load_ensemble
from ldm.pipelines.information import COMPARED
from ldm.pipelines.noise_levels import count_elements, draw_data_samples, find_deviation
from ldm.report.tables import markdown_table
from ldm.settings import Branching, Sampling
from ldm.uncertainty.channel import NoiseLevel
from ldm.uncertainty.quantities import Estimator, compute_quantities


@dataclass(frozen=True)
class CommonUnit:
    """Measure the same classes by two ensembles of the same data: one in pixels, one in latents.

    By the default measure their numbers do not compare; seen through noise of some standard deviations of the data they
    should. A line a measure: mutual information in nats of both, mean over the classes, and the geometric mean over the
    classes of the larger to the smaller.

    Examples:
      python benchmarks/nats.py --paths logs/bootstrapped_digits_5 logs/latent_digits_5
    """

    paths: tuple[str, ...]
    """The folders of two ensembles, which save_ensemble.py (decu gather) wrote."""
    classes: Annotated[tuple[int, ...], option(metavar="CLASS ...", default="all classes of the first")] = ()
    """The classes."""
    noise: tuple[float, ...] = (0.05, 0.1, 0.2)
    """The noise levels, in standard deviations of the data."""
    n: int = 16
    """Noises of a class."""
    steps: int = 20
    """Steps of the sampler."""
    branch_at: float = 0.5
    """Where members branch, as a fraction of the steps."""
    scale: float = 1.0
    """The scale of guidance, the same for both: guidance multiplies what members disagree on."""
    json: Annotated[str | None, option(metavar="FILE", default="the numbers are printed only")] = None
    """Write the numbers to this file, too."""
    place: Placement = Placement()

    def __post_init__(self) -> None:
        if len(self.paths) != 2:
            raise ValueError(f"--paths takes two ensembles, one in pixels and one in latents; got {len(self.paths)}")

    def run(self) -> list[dict[str, Any]]:
        """Print a table of a line a measure, and return its numbers."""
        sampling = Sampling(steps=self.steps, scale=self.scale)
        branching = Branching(at=self.branch_at)
        both = [load_ensemble(path, sampling, branching, device=self.place.device) for path in self.paths]
        labels = list(self.classes) or list(range(both[0].n_classes))
        first, second = (self.measure(pipeline, labels) for pipeline in both)
        rows = [compare(name, first[name], second[name]) for name in first]
        print(f"{self.paths[0]}, {self.paths[1]}: classes {labels}, {self.n} noises, branch at {self.branch_at:g}")
        print(markdown_table([{name: show(value) for name, value in row.items()} for row in rows]))
        numbers = {name: [first[name].tolist(), second[name].tolist()] for name in first}
        write_numbers(self.json, self, rows, {"classes": labels, "mi": numbers}, both[0].device)
        return rows

    def measure(self, pipeline: EnsemblePipeline, labels: list[int]) -> dict[str, np.ndarray]:
        """Return the mutual information of each class in nats, mean over the noises, by every measure.

        What `information` gives under each of them, from one evaluation of the members.
        """
        latents = draw_data_samples(pipeline)
        estimators = {"state, sum (default)": ("state", Estimator())}
        for compared in ("x0", "image"):
            data = find_deviation(pipeline.decode(latents) if compared == "image" else latents)
            size = count_elements(pipeline, compared == "image")
            for level in self.noise:
                seen = Estimator("kl", noise=NoiseLevel(level, data, size))
                estimators[f"{compared}, noise {level:g}"] = (compared, seen)
        found: dict[str, list[float]] = {name: [] for name in estimators}
        for label in labels:
            step = next(pipeline.branched_steps([label] * self.n, range(self.n), pipeline.bases(label)))
            for name, (compared, estimator) in estimators.items():
                mi = compute_quantities(COMPARED[compared](pipeline, step), estimator).mi
                found[name].append(float(mi.mean()))
        return {name: np.array(values) for name, values in found.items()}


def compare(name: str, first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Return the line of a measure: means over classes, and the larger to the smaller, geometric mean and most."""
    apart = np.abs(np.log(first / second))
    return {
        "compared": name,
        "first": float(first.mean()),
        "second": float(second.mean()),
        "ratio of the means": float(first.mean() / second.mean()),
        "factor of a class": math.exp(float(apart.mean())),
        "most": math.exp(float(apart.max())),
        "classes within 2": f"{int((apart <= math.log(2)).sum())} of {len(apart)}",
    }


def show(value: Any) -> Any:
    """Return a number with three digits, anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else value


if __name__ == "__main__":
    run_file(CommonUnit)
