"""Hold propagated variances against sampled weights, and posteriors against bootstraps, the published beside ours.

Examples:
  python scripts/benchmark_bayesdiff.py propagation --run logs/2026-01-01T00-00-00_digits \\
      --posterior results/laplace/digits --published results/laplace/published --out results/propagation
  python scripts/benchmark_bayesdiff.py calibration --run logs/2026-01-01T00-00-00_digits \\
      --posterior results/laplace/digits --published results/laplace/published --out results/calibration

propagation: --truth weights of the posterior, each held for a whole walk from the same noise, give the true variance;
every method is compared with it on the same images (ranks of pixels and of images, total), at each of --grids steps.
calibration: the last layer is refitted to --bootstraps draws of the training images, with as many noise draws an image
as the posterior's fit had; predictive variances of held-out (x_t, t) are compared with the refits' for each curvature.

Posteriors are those of decu laplace fit (--also sandwich gathers for all curvatures); the one of --published was fitted
with --published. Any run will do. Tables go to the screen and to --out.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from ldm.arguments import add_model_arguments, add_posterior_arguments, open_walks
from ldm.cli import HelpFormatter, run_script
from ldm.laplace import LastLayerLaplace, Observation, bootstrap_refits, load_laplace
from ldm.pipelines import PosteriorPipeline, chosen_positions, observations
from ldm.records import write_record
from ldm.report.tables import markdown_table, write_csv
from ldm.training.config import read_data_config
from ldm.uncertainty.agreement import agreement
from ldm.uncertainty.propagation import all_directions
from ldm.util import generator, instantiate_from_config

PROPAGATIONS = ("persistent", "tangents", "bayesdiff", "bayesdiff_skip", "path", "published", "published_skip")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = {"formatter_class": HelpFormatter, "description": __doc__}
    first = commands.add_parser("propagation", help="methods against sampled weights", **shared)
    second = commands.add_parser("calibration", help="posteriors against bootstraps", **shared)
    for command in (first, second):
        add_model_arguments(command, steps=10)
        add_posterior_arguments(command)
        command.add_argument("--published", help="posterior of decu laplace fit --published, for the published method")
        command.add_argument("--out", required=True, help="folder of the tables")
    first.add_argument("--n", type=int, default=20, help="images")
    first.add_argument("--grids", type=int, nargs="+", default=[10, 40], help="numbers of steps")
    first.add_argument("--truth", type=int, nargs="+", default=[128], help="sampled weights of the truth, of each grid")
    first.add_argument("--methods", nargs="+", default=list(PROPAGATIONS), choices=PROPAGATIONS, help="what to compare")
    first.add_argument("--exact", action="store_true", help="also tangents in every direction of the weights")
    first.add_argument("--batch_size", type=int, default=20, help="images walked together")
    second.add_argument("--bootstraps", type=int, default=60, help="refits")
    second.add_argument("--held_out", type=int, default=64, help="images of the validation split, one draw each")
    second.add_argument("--data", nargs="+", metavar="WORD", help="training images, where the run's config has none")
    second.add_argument(
        "--curvatures", nargs="+", default=["sandwich", "full", "kron", "lowrank", "diag", "ef", "isotropic"]
    )
    return parser


def final_variances(
    walks: PosteriorPipeline, method: str, labels: list[int] | None, options: argparse.Namespace
) -> Tensor:
    """Variance [N, c, h, w] of the last states."""
    parts = []
    for start in range(0, options.n, options.batch_size):
        images = list(range(start, min(start + options.batch_size, options.n)))
        own = None if labels is None else [labels[image] for image in images]
        *_, last = walks.steps(method, own, images)
        parts.append(last.var.cpu())
    return torch.cat(parts)


def with_steps(walks: PosteriorPipeline, steps: int) -> PosteriorPipeline:
    """The same on another times."""
    return replace(walks, pipeline=walks.pipeline.with_(steps=steps), _members=[])


def propagated(
    walks: PosteriorPipeline, truth: int, options: argparse.Namespace
) -> Iterator[tuple[str, Tensor, float]]:
    """(method, variances, CPU seconds) on one times, the truth first."""
    labels = walks.pipeline.cycle_classes(range(options.n))
    cases = [("truth", "persistent", replace(walks, draws=truth))]
    # Other weights than the truth's, so that they do not share its sampling error.
    apart = argparse.Namespace(**{**vars(options), "seed": options.seed + 1})
    other = replace(walks, _members=[walks.laplace.sample(walks.draws, generator("other members", apart.seed))])
    if options.exact:
        cases.append(("tangents, all directions", "tangents", replace(walks, _members=[all_directions(walks.laplace)])))
    for method in options.methods:
        cases.append((named(method, walks), method, other))
    if options.published:
        laplace = load_laplace(options.published, walks.pipeline.model.network)
        cases.append(("published, its own posterior", "published", replace(walks, laplace=laplace, _members=[])))
    for name, method, own in tqdm(cases, desc=f"{len(walks.pipeline.times) - 1} steps"):
        began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        found = final_variances(own, method, labels, options)
        yield name, found, resource.getrusage(resource.RUSAGE_SELF).ru_utime - began


def named(method: str, walks: PosteriorPipeline) -> str:
    """A method with the numbers that decide its cost."""
    draws = {"persistent": f"{walks.draws} weights", "tangents": f"{walks.draws} directions"}
    skip = f", every {walks.every}" if method.endswith("_skip") else ""
    default = "no further evaluations" if method == "path" else f"{walks.particles} states{skip}"
    return f"{method}, {draws.get(method, default)}"


def propagation(walks: PosteriorPipeline, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a method and times; `growth` is its total over that on the first times, beside the truth's."""
    for method in [*options.methods, *(["published"] if options.published else [])]:
        walks.check(method)
    rows, totals = [], {}
    counts = options.truth * (len(options.grids) if len(options.truth) == 1 else 1)
    for steps, count in zip(options.grids, counts, strict=True):
        truth = None
        for name, found, seconds in propagated(with_steps(walks, steps), count, options):
            truth = found if truth is None else truth
            first = totals.setdefault(name, float(found.sum()))
            rows.append(
                {
                    "steps": steps,
                    "method": name,
                    **agreement(found, truth).row(),
                    "growth": float(found.sum()) / first,
                    "cpu_seconds": seconds,
                }
            )
    return rows


def held_out(walks: PosteriorPipeline, options: argparse.Namespace) -> list[Observation]:
    """One draw of each of some validation images."""
    config = OmegaConf.select(OmegaConf.create(walks.pipeline.config), "data.params.validation")
    if config is None:
        raise ValueError("calibration needs data.params.validation in the run's config")
    data = instantiate_from_config(OmegaConf.to_container(config, resolve=True))
    positions = chosen_positions(len(data), min(options.held_out, len(data)), options.seed)
    return list(observations(walks.pipeline.model, data, positions, draws=1, seed=options.seed + 1))


def refits_of(walks: PosteriorPipeline, options: argparse.Namespace):
    """Bootstraps over the training images, with the fit's own draws."""
    pipeline, laplace = walks.pipeline, walks.laplace
    if options.data is not None:
        config = read_data_config(options.data)
    else:
        config = OmegaConf.to_container(OmegaConf.create(pipeline.config), resolve=True)["data"]["params"]["train"]
    data, images, draws = instantiate_from_config(config), int(laplace.fitted().images), laplace.repeats
    seed = fit_seed(options.posterior, options.seed)
    rows = observations(pipeline.model, data, chosen_positions(len(data), images, seed), draws=draws, seed=seed)
    rows = tqdm(rows, total=-(-images // 16), desc="refits")
    source = generator("bootstrap", options.seed)
    return bootstrap_refits(laplace, rows, images=images, draws=draws, count=options.bootstraps, source=source)


def fit_seed(posterior: str, default: int) -> int:
    """The seed that the fit drew its images and noises from."""
    record = OmegaConf.load(Path(posterior) / "laplace.yaml").get("record") or {}
    return int(record.get("seed", default))


def candidates(walks: PosteriorPipeline, options: argparse.Namespace) -> Iterator[tuple[str, LastLayerLaplace]]:
    """The posteriors to compare."""
    for name in options.curvatures:
        yield f"{name}, sigma from residuals", walks.laplace.with_curvature(name)
    plain = walks.laplace.with_curvature("full")
    plain.sigma_noise, plain.prior_precision = 1.0, 1.0
    yield "full, sigma 1, precision 1", plain
    if options.published:
        yield (
            "published (ef doubled, sigma 1, precision 1)",
            load_laplace(options.published, walks.pipeline.model.network),
        )


def calibration(walks: PosteriorPipeline, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a posterior: mean predictive variance over that of the refits, and the ranks of all values."""
    batches, refits = held_out(walks, options), refits_of(walks, options)
    features = [walks.laplace.features(batch.x, batch.t, batch.cond) for batch in batches]
    truth = torch.cat([refits.variance(each) for each in features])
    rows = []
    for name, laplace in candidates(walks, options):
        found = agreement(torch.cat([laplace.predict(each)[1] for each in features]), truth)
        rows.append({"posterior": name, "ratio": found.total, "rank": found.overall, "pixel": found.pixel})
    return rows


@torch.no_grad()
def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options = get_parser().parse_args(argv)
    walks, out = open_walks(options), Path(options.out)
    rows = propagation(walks, options) if options.command == "propagation" else calibration(walks, options)
    fitted = walks.laplace
    note = (
        f"{fitted.curvature}, {int(fitted.fitted().images)} images with {fitted.repeats} draws each, sigma "
        f"{fitted.sigma_noise.tolist()}, precision {fitted.prior_precision:.4g}; guidance {walks.pipeline.scale}"
    )
    print(markdown_table(rows, 3), note, sep="\n")
    write_csv(out / f"{options.command}.csv", rows, [note], overwrite=True)
    write_record(out / "record.json", vars(options), overwrite=True)
    return rows


if __name__ == "__main__":
    run_script(main)
