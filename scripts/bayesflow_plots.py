"""Every figure of BayesFlow for a flow and its diffusion twin: curves, grids, maps of all methods, both uncertainties.

Examples:
  bash scripts/bayesflow_plots.sh --data digits                     (trains and fits what is missing, then calls this)
  python scripts/bayesflow_plots.py --flow logs/2026-01-01T00-00-00_digits-flow \\
      --diffusion logs/2026-01-01T00-10-00_digits-diffusion --flow_posterior posteriors/digits-flow \\
      --diffusion_posterior posteriors/digits-diffusion --out results/bayesflow/digits

Writes {out}/: by_class.png and by_pixel.png (variance over the walk), grid_flow.png and grid_diffusion.png (images
between their maps), methods.png, two_kinds.png (epistemic and aleatoric of the same images), totals_by_steps.png,
quality_by_steps.png with quality.csv, record.json. --diffusion may be left out. A latent model is shown in its latents.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.arguments import add_model_arguments, add_posterior_arguments, open_walks
from ldm.cli import HelpFormatter, run_script
from ldm.evaluation.recognition import PixelClassifier
from ldm.experiments import variance_benchmarks as benchmarks
from ldm.pipelines import PosteriorPipeline
from ldm.pipelines.images import real_images
from ldm.records import write_record
from ldm.report import flow_plots
from ldm.report.tables import write_csv
from ldm.uncertainty.aleatoric import data_posterior
from ldm.util import generator


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--flow", required=True, help="run of the flow")
    add("--flow_posterior", required=True, help="its posterior, from fit_laplace.py")
    add("--diffusion", help="run of the diffusion twin")
    add("--diffusion_posterior", help="its posterior")
    add("--out", required=True, help="folder of the figures")
    add("--n", type=int, default=60, help="images of the curves, the classes in turn")
    add("--shown", type=int, default=10, help="images of the maps")
    add("--method", default="tangents", help="method of the curves and grids, see sample_laplace.py --help")
    add("--draws", type=int, default=16, help="tangents or sampled weights")
    add("--flow_steps", type=int, help="steps of the flow (default: its config's)")
    add("--diffusion_steps", type=int, help="steps of the diffusion (default: its config's)")
    add("--by_steps", type=int, nargs="+", default=[2, 5, 10, 20, 40], help="numbers of steps of the last two figures")
    add("--quality_n", type=int, default=20, help="samples a class whose recognition is counted")
    add("--real", type=int, default=10000, help="real images for the classifier")
    add("--noise_share", type=float, default=0.5, help="where the aleatoric map is read")
    add("--probes", type=int, default=64, help="Hutchinson's probes of the aleatoric map, 0: exact")
    add("--device", default="auto", help="auto, cpu or cuda[:N]")
    add("--seed", type=int, default=42, help="seed of noises, weights and probes")
    return parser


def walks_of(options: argparse.Namespace, kind: str) -> PosteriorPipeline:
    """A run with its posterior, as sample_laplace.py opens it."""
    parser = argparse.ArgumentParser()
    add_model_arguments(parser, steps=10 if kind == "flow" else 50)
    add_posterior_arguments(parser)
    run, posterior, steps = (getattr(options, f"{kind}{name}") for name in ("", "_posterior", "_steps"))
    words = ["--run", run, "--posterior", posterior, "--draws", options.draws, "--seed", options.seed]
    words += ["--device", options.device, *(["--steps", steps] if steps else [])]
    return open_walks(parser.parse_args([*map(str, words)]))


def quality(walks: PosteriorPipeline, steps: Sequence[int], options: argparse.Namespace) -> dict[int, float]:
    """Share of samples recognised as their class, for each number of steps."""
    pipeline = walks.pipeline
    classifier = PixelClassifier(*real_images(pipeline.config["data"]["params"]["train"], options.real, options.seed))
    labels = [label for label in range(pipeline.n_classes) for _ in range(options.quality_n)]
    found = {}
    for count in steps:
        images = opened_at(walks, count).decode(opened_at(walks, count).sample(labels, range(len(labels))))
        found[count] = float(classifier.recognised(images.permute(0, 2, 3, 1), labels).mean())
    return found


def opened_at(walks: PosteriorPipeline, steps: int):
    return benchmarks.at_steps(walks, steps).pipeline


def aleatoric(walks: PosteriorPipeline, images: Sequence[int], options: argparse.Namespace) -> torch.Tensor:
    """Variance of the data [N, h, w] given each sample's own walk at the noise share asked for."""
    labels, path = walks.pipeline.cycle_classes(range(len(images))), walks.pipeline.model.schedule
    u = float(path.time_at(options.noise_share / (1 - options.noise_share)))
    # The state of the walk that is nearest to that share.
    step = min(walks.plain(labels, images), key=lambda step: abs(step.u - u))
    denoiser = walks.pipeline.model.denoiser(None if labels is None else walks.pipeline.labels(labels))
    probes = options.probes or None
    source = generator("probes", options.seed) if probes else None
    return data_posterior(denoiser, path, step.x, step.u, probes=probes, generator=source, chunk=64).var.mean(1).cpu()


def maps_of(walks: PosteriorPipeline, images: Sequence[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pictures and the maps [N, h, w] of every method that the path knows."""
    labels = walks.pipeline.cycle_classes(range(len(images))) or []
    chosen = dict(benchmarks.applicable(walks))
    chosen.pop("tangents, every direction")
    maps = {"sampled weights, K = 64": benchmarks.truth(walks, labels, images, 64)}
    maps |= {name: method.run(walks, labels, images) for name, method in chosen.items()}
    pictures = walks.pipeline.decode(walks.pipeline.sample_latents(labels, images))
    return pictures, {name: value.mean(1).cpu() for name, value in maps.items()}


def totals(walks: PosteriorPipeline, steps: Sequence[int], images: Sequence[int]) -> dict[str, dict[int, float]]:
    """Mean variance of an element at the end against the number of steps."""
    labels = walks.pipeline.cycle_classes(range(len(images))) or []
    names = ["tangents, K = 8", "fresh weights, total variance, S = 10"]
    names += [name for name, _ in benchmarks.applicable(walks) if name.startswith("BayesFlow as published, S")]
    return {
        name: {
            count: float(
                benchmarks.BENCHMARKED_METHODS[name].run(benchmarks.at_steps(walks, count), labels, images).mean()
            )
            for count in steps
        }
        for name in names
    }


@torch.no_grad()
def draw(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every figure; returns the rows of quality.csv."""
    out, kinds = Path(options.out), ["flow", *(["diffusion"] if options.diffusion else [])]
    pipeline = {kind: walks_of(options, kind) for kind in kinds}
    write = {"overwrite": True}
    bar = tqdm(total=2 * len(kinds) + 3, desc="figures", unit="part")
    every = list(range(options.n))
    trajectories = []
    for kind, walks in pipeline.items():
        labels = walks.pipeline.cycle_classes(range(options.n))
        trajectories.append(flow_plots.sample_trajectory(walks, kind, options.method, labels, every))
        flow_plots.interleaved(trajectories[-1], out / f"grid_{kind}.png", **write)
        bar.update()
    flow_plots.curves_by_class(trajectories, out / "by_class.png", **write)
    flow_plots.curves_by_pixel(trajectories, out / "by_pixel.png", **write)
    flow, images = pipeline["flow"], list(range(options.shown))
    pictures, maps = maps_of(flow, images)
    flow_plots.maps_by_method(pictures, maps, out / "methods.png", **write)
    bar.update()
    both = {"epistemic (sampled weights)": maps["sampled weights, K = 64"]}
    both |= {f"aleatoric, noise share {options.noise_share:g}": aleatoric(flow, images, options)}
    flow_plots.maps_by_method(pictures, both, out / "two_kinds.png", **write)
    bar.update()
    flow_plots.against_steps(
        totals(flow, options.by_steps, images), out / "totals_by_steps.png", "variance of an element", **write
    )
    bar.update()
    rates: dict[str, dict[int, float]] = {}
    for kind, walks in pipeline.items():
        if walks.pipeline.n_classes:
            rates[kind] = quality(walks, options.by_steps, options)
        bar.update()
    rows = [
        {"model": kind, "steps": count, "recognised": rate} for kind in rates for count, rate in rates[kind].items()
    ]
    if rows:
        flow_plots.against_steps(rates, out / "quality_by_steps.png", "samples recognised", log=False, **write)
        write_csv(out / "quality.csv", rows, overwrite=True)
    return rows


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    if bool(options.diffusion) != bool(options.diffusion_posterior):
        raise ValueError("--diffusion and --diffusion_posterior go together")
    rows, out = draw(options), Path(options.out)
    write_record(out / "record.json", vars(options), overwrite=True)
    for row in rows:
        print(f"{row['model']:>10}, {row['steps']:>3} steps: {row['recognised']:.1%} recognised")
    print(*sorted(str(path) for path in out.glob("*.png")), sep="\n")
    return out


if __name__ == "__main__":
    run_script(main)
