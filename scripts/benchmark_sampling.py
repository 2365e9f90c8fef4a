"""Which sampler and how many steps an uncertainty needs: rank correlation with the 200-step answer, and the cost.

Examples:
  python scripts/benchmark_sampling.py --path logs/bootstrapped_digits_5 --json results/sampling.json
  python scripts/benchmark_sampling.py --path logs/bootstrapped_digits_5 --samplers DDIM --step_counts 5 --branch_at 0

For each sampler and number of steps: Spearman correlation over classes of the mutual information at the branch with
that of DDIM at 200 steps on the same noises, evaluations of the network (each is of all members, guided), seconds. The
last line is the 200-step answer on other noises: what cannot be told from chance lies above it.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from ldm.cli import HelpFormatter, run_script
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.samplers import SAMPLERS
from ldm.experiments import timing
from ldm.pipelines import EnsemblePipeline, load_ensemble
from ldm.pipelines.information import measure_classes
from ldm.settings import Branching, Sampling
from ldm.stats import spearman
from ldm.uncertainty.branch import branch

REFERENCE = ("DDIM", 200)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--path", required=True, help="folder that save_ensemble.py wrote")
    add("--samplers", nargs="+", default=["DPM-Solver++", "Heun", "DDIM"], choices=sorted(SAMPLERS), help="samplers")
    add("--step_counts", type=int, nargs="+", default=[5, 10, 20, 50], help="numbers of steps")
    add("--branch_at", type=float, default=0.5, help="where members part, as a fraction of the steps")
    add("--n", type=int, default=16, help="noises a class")
    add("--seed", type=int, default=42, help="seed of the noises")
    add("--device", default="auto", help="auto, cpu or cuda[:N]")
    add("--json", metavar="FILE", help="also write the numbers here")
    return parser


class Counted:
    """A denoiser that counts its evaluations."""

    def __init__(self, denoiser: Any, calls: list[int]):
        self.denoiser, self.calls = denoiser, calls

    def __call__(self, *args: Any) -> Prediction:
        self.calls[0] += 1
        return self.denoiser(*args)


def load(options: argparse.Namespace, sampler: str, steps: int, seed: int) -> EnsemblePipeline:
    """The ensemble under a sampler."""
    sampling = Sampling(sampler, steps, seed=seed)
    return load_ensemble(options.path, sampling, Branching(at=options.branch_at), device=options.device)


def measure(options: argparse.Namespace, sampler: str, steps: int, seed: int) -> tuple[list[float], float]:
    """(mutual information of every class, seconds)."""
    pipeline = load(options, sampler, steps, seed)
    plan = pipeline.make_plan(options.n)
    began = time.perf_counter()
    found = {result.label: result for result in measure_classes(pipeline, range(pipeline.n_classes), plan)}
    taken = time.perf_counter() - began
    return [float(found[label].mi.mean()) for label in range(pipeline.n_classes)], taken


def evaluations(options: argparse.Namespace, sampler: str, steps: int) -> int:
    """Evaluations of the network up to the branched step, counted on one image."""
    pipeline = load(options, sampler, steps, options.seed)
    calls, chains = [0], pipeline._chains([0], [0], pipeline.bases(0))
    counted = {name: Counted(chains.pop(name), calls) for name in ("base", "members")}
    branch(**counted, **chains, only_first=True)
    return calls[0]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options = get_parser().parse_args(argv)
    reference, slow = measure(options, *REFERENCE, options.seed)
    other, _ = measure(options, *REFERENCE, options.seed + 1)
    runs = [(sampler, steps) for sampler in options.samplers for steps in options.step_counts] + [REFERENCE]
    rows, numbers = [], []
    for sampler, steps in runs:
        mi, taken = (
            (reference, slow) if (sampler, steps) == REFERENCE else measure(options, sampler, steps, options.seed)
        )
        number = {"sampler": sampler, "steps": steps, "evaluations": evaluations(options, sampler, steps)}
        number |= {"spearman": spearman(mi, reference), "seconds": taken, "mi": mi}
        numbers.append(number)
        rows.append({**number, "spearman": f"{number['spearman']:.3f}", "seconds": f"{taken:.2f}"})
        del rows[-1]["mi"]
    rows.append({"sampler": "DDIM, other noises", "steps": 200, "evaluations": "", "spearman": "", "seconds": ""})
    rows[-1]["spearman"] = f"{spearman(other, reference):.3f}"
    print(f"{options.path}: branch at {options.branch_at:g}, {options.n} noises a class")
    print(timing.table(rows))
    timing.report(options, rows, {"runs": numbers, "other_noises": spearman(other, reference)})
    return numbers


if __name__ == "__main__":
    run_script(main)
