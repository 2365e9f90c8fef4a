"""Which sampler and how many steps an uncertainty needs: rank correlation with the 200-step answer, and the cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any

from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.diffusion.denoiser import Prediction
from ldm.experiments.timing import write_numbers
from ldm.options import option
from ldm.pipelines import EnsemblePipeline, load_ensemble
from ldm.pipelines.information import measure_classes
from ldm.report.tables import markdown_table
from ldm.settings import Branching, SamplerName, Sampling
from ldm.stats import spearman
from ldm.uncertainty.branch import branch

REFERENCE = ("DDIM", 200)


class CountedDenoiser:
    """A denoiser that counts its evaluations."""

    def __init__(self, denoiser: Any, calls: list[int]):
        self.denoiser = denoiser
        self.calls = calls

    def __call__(self, *args: Any) -> Prediction:
        self.calls[0] += 1
        return self.denoiser(*args)


def measure_information(pipeline: EnsemblePipeline, n: int) -> tuple[list[float], float]:
    """Return the mutual information of every class, in nats, and the seconds that it took."""
    began = time.perf_counter()
    found = {
        result.label: result for result in measure_classes(pipeline, range(pipeline.n_classes), pipeline.make_plan(n))
    }
    taken = time.perf_counter() - began
    return [float(found[label].mi.mean()) for label in range(pipeline.n_classes)], taken


def count_evaluations(pipeline: EnsemblePipeline) -> int:
    """Count evaluations of the network up to the branched step, on one image."""
    calls = [0]
    chains = pipeline._chains([0], [0], pipeline.bases(0))
    counted = {name: CountedDenoiser(chains.pop(name), calls) for name in ("base", "members")}
    branch(**counted, **chains, only_first=True)
    return calls[0]


@dataclass(frozen=True)
class SamplerStudy:
    """Ask which sampler and how many steps an uncertainty needs.

    For each sampler and number of steps: Spearman correlation over classes of the mutual information at the branch with
    that of DDIM at 200 steps on the same noises, evaluations of the network (each is of all members, guided), seconds.
    The last line is the 200-step answer on other noises: what cannot be distinguished from chance lies above it.

    Examples:
      python benchmarks/sampling.py --path logs/bootstrapped_digits_5 --json results/sampling.json
      python benchmarks/sampling.py --path logs/bootstrapped_digits_5 --samplers DDIM --step_counts 5 --branch_at 0
    """

    path: str
    """The folder that save_ensemble.py (decu gather) wrote."""
    samplers: tuple[SamplerName, ...] = ("DPM-Solver++", "Heun", "DDIM")
    """The samplers that are compared."""
    step_counts: tuple[int, ...] = (5, 10, 20, 50)
    """Their numbers of steps."""
    branch_at: float = 0.5
    """Where members branch, as a fraction of the steps."""
    n: int = 16
    """Noises of a class."""
    seed: int = 42
    """The seed of the noises."""
    json: Annotated[str | None, option(metavar="FILE", default="the numbers are printed only")] = None
    """Write the numbers to this file, too."""
    place: Placement = Placement()

    def run(self) -> list[dict[str, Any]]:
        """Print a table of a line a sampler and number of steps, and return its numbers."""
        pipeline = load_ensemble(self.path, branching=Branching(at=self.branch_at), device=self.place.device)

        def under(sampler: str, steps: int, seed: int = self.seed) -> EnsemblePipeline:
            return pipeline.with_(sampling=Sampling(sampler, steps, seed=seed))

        reference, slow = measure_information(under(*REFERENCE), self.n)
        other, _ = measure_information(under(*REFERENCE, self.seed + 1), self.n)
        runs = [(sampler, steps) for sampler in self.samplers for steps in self.step_counts]
        rows, numbers = [], []
        for sampler, steps in [*runs, REFERENCE]:
            again = (sampler, steps) == REFERENCE
            mi, taken = (reference, slow) if again else measure_information(under(sampler, steps), self.n)
            evaluations = count_evaluations(under(sampler, steps))
            found = {"sampler": sampler, "steps": steps, "evaluations": evaluations}
            correlation = spearman(mi, reference)
            numbers.append({**found, "spearman": correlation, "seconds": taken, "mi": mi})
            rows.append({**found, "spearman": f"{correlation:.3f}", "seconds": f"{taken:.2f}"})
        chance = spearman(other, reference)
        last = {"sampler": "DDIM, other noises", "steps": 200, "evaluations": None}
        rows.append({**last, "spearman": f"{chance:.3f}", "seconds": None})
        print(f"{self.path}: branch at {self.branch_at:g}, {self.n} noises a class")
        print(markdown_table(rows))
        write_numbers(self.json, self, rows, {"runs": numbers, "other_noises": chance}, pipeline.device)
        return numbers


if __name__ == "__main__":
    run_file(SamplerStudy)
