"""Choose lambda of epsilon scaling for a model, a sampler and a number of steps; write a schedule that samplers read.

Examples:
  python scripts/choose_eps_scaling.py --method norms --run logs/2026-01-01T00-00-00_digits --steps 20 --n 2000 \\
      --out results/lambda_norms
  python scripts/choose_eps_scaling.py --method search --metric fid --run logs/2026-01-01T00-00-00_digits --steps 20 \\
      --n 2000 --ref results/digits-train --out results/lambda_search
  python scripts/choose_eps_scaling.py --method search --metric norms --eps_slope 0.001 --steps 20 --n 500 \\
      --run logs/2026-01-01T00-00-00_digits --out results/lambda_norms_b
  python scripts/sample_diffusion.py --run logs/2026-01-01T00-00-00_digits --steps 20 --n 100 \\
      --eps_schedule results/lambda_norms/schedule.yaml --out samples/scaled

norms: lambda of each step is the mean norm of the network's eps in sampling over that in training, measured again
under the schedule so far (--rounds) because early corrections change later norms.
search: the b with the least metric, a grid that narrows (--rounds) around its best; b = 1 is always among them. Where
the best lies at the edge of the times it says so; a wider one with --overwrite measures only what is new.
  fid    Frechet distance of --n samples to --ref (a folder of `evaluate.py ref`), the same seeds for every b
  norms  mean over steps of the squared relative difference of corrected norms from training's
  states mean over steps of the squared distance of x_t in sampling from the true x_t: no reference, no features
With --eps_slope k the search is of b in k t + b. Writes schedule.yaml, choice.csv, choice.png and record.json; what was
measured is kept below parts/, and a stopped choice continues. One process chooses.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ldm.arguments import add_model_arguments, open_model
from ldm.cli import HelpFormatter, run_script
from ldm.diffusion.epsilon_scaling import EpsilonScaling, noise_level, save_scaling, tabulated
from ldm.evaluation.exposure import state_distance
from ldm.evaluation.extraction import extract, open_features
from ldm.evaluation.extractors import make_extractor
from ldm.evaluation.metrics import Options, Reference, measure
from ldm.evaluation.scaling_choice import Search, estimated_factors, search_b
from ldm.experiments.exposure import Chains, MomentsByName, load_split, measured
from ldm.jobs import WorkList, split_range
from ldm.pipelines import ModelPipeline
from ldm.pipelines.images import SampledImages
from ldm.records import refuse_existing, write_record
from ldm.report.exposure import compute_factors
from ldm.report.plots import Curve, curve_plot
from ldm.report.tables import markdown_table, write_csv


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_arguments(parser, steps=20)
    parser.add_argument("--out", required=True, help="folder of the output")
    parser.add_argument("--method", choices=("norms", "search"), default="norms", help="how lambda is chosen")
    parser.add_argument(
        "--metric", choices=("fid", "norms", "states"), default="fid", help="what the search makes small"
    )
    parser.add_argument("--n", type=int, default=1000, help="images of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of the estimate, or of the search")
    parser.add_argument("--low", type=float, default=0.99, help="least b of the search")
    parser.add_argument("--high", type=float, default=1.04, help="largest b of the search")
    parser.add_argument("--points", type=int, default=6, help="values of b in each round of the search")
    parser.add_argument("--ref", help="reference of --metric fid: a folder that evaluate.py ref wrote")
    parser.add_argument("--split", default="train", help="data.params.SPLIT of the config, for norms")
    parser.add_argument("--batch_size", type=int, default=100, help="images in one pass")
    parser.add_argument("--overwrite", action="store_true", help="replace a schedule that exists")
    return parser


def measure_norms(
    pipeline: ModelPipeline, options: argparse.Namespace, name: str, scaling: EpsilonScaling, training: bool
) -> MomentsByName:
    """Norms of a chain under `scaling`, and in training if asked for; kept in parts/NAME."""
    chains = Chains(pipeline, load_split(pipeline.config, options.split), {"sampling": scaling}, training)
    settings = {**pipeline.describe(), "split": options.split, "epsilon_scaling": scaling.as_dict()}
    work = WorkList(Path(options.out) / "parts" / name, settings)
    parts = split_range(options.n, options.batch_size)
    with tqdm(total=options.n, desc=name, unit="image") as bar:
        return measured(chains, work, parts, bar.update)


def estimate(pipeline: ModelPipeline, options: argparse.Namespace) -> tuple[EpsilonScaling, list[dict[str, float]]]:
    """The fixed point of lambda = norms in sampling over norms in training, and every round as a table."""
    path, times, direction = pipeline.model.schedule, pipeline.times, options.eps_direction or "full"
    scaling, training = EpsilonScaling(direction=direction), None
    rows = [{"step": step, "minus_log_snr": float(level)} for step, level in enumerate(noise_level(path, times[:-1]))]
    for number in range(options.rounds):
        moments = measure_norms(pipeline, options, f"round{number}", scaling, number == 0)
        training = moments.get("training", training)
        factors = estimated_factors(moments["sampling"], training)
        for row, factor in zip(rows, factors.tolist(), strict=True):
            row[f"lambda_{number}"] = factor
        scaling = tabulated(path, times, factors, direction)
    return scaling, rows


def search(pipeline: ModelPipeline, options: argparse.Namespace) -> tuple[EpsilonScaling, Search]:
    """The b with the least metric."""
    base = pipeline.wrappers.scaling
    metric = frechet(pipeline, options, base) if options.metric == "fid" else distance(pipeline, options, base)
    found = search_b(metric, options.low, options.high, options.points, options.rounds)
    return replace(base, b=found.best), found


def frechet(pipeline: ModelPipeline, options: argparse.Namespace, base: EpsilonScaling) -> Callable[[float], float]:
    """b -> Frechet distance of samples to the reference, in the features the reference was made with."""
    reference = Reference(open_features(options.ref))
    made = reference.features.settings["features"]
    extractor = make_extractor(made["extractor"], made.get("weights"), made.get("params"), made.get("channels", 3))
    extractor, chosen = extractor.to(pipeline.device), Options(fid_resamples=0, device=pipeline.device)

    def score(b: float) -> float:
        source = SampledImages(under(pipeline, replace(base, b=b)), options.n)
        folder = Path(options.out) / "parts" / f"b{b:.6f}"
        with tqdm(total=options.n, desc=f"b = {b:g}", unit="image") as bar:
            size = {"batch_size": options.batch_size, "device": pipeline.device, "progress": bar.update}
            samples = extract(source, extractor, folder, **size)
        return measure(["fid"], reference, samples, chosen)[0].value

    return score


def under(pipeline: ModelPipeline, scaling: EpsilonScaling) -> ModelPipeline:
    """The model under another scaling."""
    return pipeline.with_scaling(scaling)


def distance(pipeline: ModelPipeline, options: argparse.Namespace, base: EpsilonScaling) -> Callable[[float], float]:
    """b -> mean over steps of (corrected norm / norm in training - 1)^2, or of the distance of x_t from the truth."""
    seen: dict[str, Tensor] = {}
    path, times = pipeline.model.schedule, pipeline.times

    def score(b: float) -> float:
        scaling, by_states = replace(base, b=b), options.metric == "states"
        moments = measure_norms(pipeline, options, f"b{b:.6f}", scaling, not by_states and "training" not in seen)
        if by_states:
            return float(state_distance(path, times, moments["sampling/states"], moments["data"].pooled()).mean())
        if "training" in moments:
            seen["training"] = moments["training"].mean
        corrected = moments["sampling"].mean / compute_factors(path, times, scaling)
        return float((corrected / seen["training"] - 1).square().mean())

    return score


def write_choice(out: Path, rows: list[dict[str, Any]], curves: Mapping[str, Curve], *labels: str) -> None:
    """The table of the choice, its figure, and the table on the screen."""
    write_csv(out / "choice.csv", rows, overwrite=True)
    curve_plot(curves, out / "choice.png", *labels, invert_x="SNR" in labels[0], overwrite=True)
    print(markdown_table(rows, 5))


def main(argv: list[str] | None = None) -> EpsilonScaling:
    options = get_parser().parse_args(argv)
    out, schedule = Path(options.out), Path(options.out) / "schedule.yaml"
    refuse_existing([schedule], options.overwrite)
    if options.eps_scaler is not None or options.eps_schedule is not None:
        raise ValueError("this script chooses lambda: leave out --eps_scaler and --eps_schedule")
    if options.method == "norms" and (options.eps_slope is not None or options.eps_window is not None):
        raise ValueError("--method norms finds lambda step by step: leave out --eps_slope and --eps_window")
    if (options.method, options.metric) == ("search", "fid") and options.ref is None:
        raise ValueError("--metric fid needs --ref: a folder that `python scripts/evaluate.py ref ...` wrote")
    pipeline = open_model(options)
    if options.method == "norms":
        scaling, rows = estimate(pipeline, options)
        levels = [row["minus_log_snr"] for row in rows]
        curves = {f"round {k}": Curve(levels, [row[f"lambda_{k}"] for row in rows]) for k in range(options.rounds)}
        write_choice(out, rows, curves, "-log SNR = 2 ln(sigma / alpha)", "lambda")
    else:
        scaling, found = search(pipeline, options)
        rows = [{"b": b, options.metric: value} for b, value in found.tried.items()]
        curves = {options.metric: Curve(list(found.tried), list(found.tried.values()))}
        write_choice(out, rows, curves, "b", options.metric)
        if found.at_edge:
            print(f"the best b is the {found.at_edge} that was tried: widen --low or --high, and add --overwrite")
    save_scaling(scaling, schedule, options.overwrite)
    write_record(
        out / "record.json", vars(options), overwrite=True, scaling=scaling.as_dict(), settings=pipeline.describe()
    )
    print(f"{schedule}: " + (f"a table of {len(scaling.table)} levels" if scaling.table else f"b = {scaling.b:g}"))
    return scaling


if __name__ == "__main__":
    run_script(main)
