"""Measure images: FID, sFID, Inception Score, KID, CMMD, precision, recall, density and coverage, with intervals.

`ref` extracts the features of a reference set once, `calc` compares images with it:
  python scripts/evaluate.py ref  --data target=ldm.data.idx.MNIST params.root=data/mnist \\
      --features classifier --weights models/mnist.safetensors --out results/mnist-train
  python scripts/evaluate.py calc --images samples/digits/samples.npz --ref results/mnist-train --out results/samples
  python scripts/evaluate.py calc --run logs/2026-01-01T00-00-00_mnist --n 10000 --steps 50 --ref results/mnist-train \\
      --out results/run
  python scripts/evaluate.py calc --images samples.npz --features inception --ref VIRTUAL_imagenet256_labeled.npz \\
      --metrics fid sfid is --out results/imagenet
  python scripts/evaluate.py calc --images samples/ --ref results/mnist-train --sample_sizes 500 1000 2000 5000 \\
      --out results/study
  python scripts/evaluate.py calc --data configs/latent-diffusion/mnist.yaml:validation --ref results/mnist-train \\
      --distortions blur noise swaps --out results/distortions

Images: --images (folder or .zip of pictures, sorted by path; .npz with arr_0; .pt or .safetensors), --data (one of the
project's data sets: words target=.. params.x=.., or CONFIG.yaml:train), or a model to sample from: --run or --base and
--ckpt with the options of sample_diffusion.py. Position i of a list in --keep is image i of that order.
A stopped extraction continues; processes of torchrun or of a SLURM array share it, and the last to finish measures.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from ldm.arguments import add_model_arguments, open_model
from ldm.cli import HelpFormatter, run_script
from ldm.evaluation.distortions import DISTORTIONS, distort, named_strength
from ldm.evaluation.extraction import FeatureSet, ImageSource, extract, is_feature_folder, open_features
from ldm.evaluation.extractors import make_extractor
from ldm.evaluation.features import Extractor
from ldm.evaluation.metrics import METRICS, MetricRow, Options, Reference, measure, obstacle
from ldm.evaluation.sample_sizes import sample_sizes, summarise_sizes, without_bias
from ldm.evaluation.statistics import load_statistics
from ldm.image_arguments import add_image_arguments, images_of
from ldm.jobs import pick_device, shard_from_environment
from ldm.pipelines.images import load_images
from ldm.records import write_record
from ldm.report.evaluation import distortion_plot, sample_size_plot
from ldm.util import atomic_write

LEVELS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    words = {"formatter_class": HelpFormatter, "allow_abbrev": False}
    ref = commands.add_parser("ref", help="features and statistics of a reference set", description=__doc__, **words)
    calc = commands.add_parser("calc", help="metrics of images against a reference", description=__doc__, **words)
    for command in (ref, calc):
        command.add_argument("--out", required=True, help="folder of the output")
        add_image_arguments(command)
        _add_feature_arguments(command)
    _add_metric_arguments(calc)
    return parser


def _add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", help="inception, clip, classifier or a dotted target (default: the reference's)")
    parser.add_argument("--weights", help="the extractor's weights")
    parser.add_argument("--features_params", nargs="+", default=[], metavar="A=B", help="keywords of the extractor")
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3), help="channels for a dotted target")
    parser.add_argument("--distort", metavar="NAME:STRENGTH", help=f"distort first: {', '.join(DISTORTIONS)}; 0 .. 1")


def _add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Options()
    ref = "folder that `ref` wrote; .npz with mu and sigma, or arr_0; or images as for --images"
    parser.add_argument("--ref", required=True, help=ref)
    parser.add_argument("--metrics", nargs="+", choices=tuple(METRICS), help="what to compute (default: what can be)")
    parser.add_argument("--resamples", type=int, default=defaults.resamples, help="bootstrap resamples, 0 for none")
    parser.add_argument("--fid_resamples", type=int, default=defaults.fid_resamples, help="the same for FID and sFID")
    parser.add_argument("--sigma", type=float, default=defaults.sigma, help="CMMD's kernel width, in feature units")
    parser.add_argument("--kid_subsets", type=int, default=defaults.kid_subsets, help="draws of the published KID")
    parser.add_argument("--kid_subset_size", type=int, default=defaults.kid_subset_size, help="images in each draw")
    parser.add_argument("--splits", type=int, default=defaults.splits, help="parts of the published Inception Score")
    parser.add_argument("--sample_sizes", type=int, nargs="+", metavar="N", help="also: metrics of draws of N images")
    parser.add_argument("--repeats", type=int, default=5, help="draws of each size")
    parser.add_argument("--distortions", nargs="+", choices=tuple(DISTORTIONS), help="also: metrics under distortion")
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS), help="strengths of the distortions")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; words that are not this script's are those of a model to sample from, in `sampling`."""
    options, rest = get_parser().parse_known_args(argv)
    options.sampling = None
    if rest:
        shared = ["--seed", str(options.seed), "--device", options.device]
        model_parser = argparse.ArgumentParser(prog="evaluate.py", allow_abbrev=False)
        add_model_arguments(model_parser)
        options.sampling = model_parser.parse_args([*rest, *shared])
    return options


def extractor_of(options: argparse.Namespace, reference: Mapping[str, Any]) -> Extractor:
    """The extractor of the options, else that of the reference's settings.

    Raises:
        ValueError: if neither names one, or it is not the one the reference was made with.
    """
    made = reference.get("features") or {}
    if options.features is None and not made:
        raise ValueError("--features is needed: inception, clip, classifier or a dotted target")
    if options.features is None:
        extractor = make_extractor(
            made["extractor"],
            options.weights or made.get("weights"),
            made.get("params"),
            made.get("channels", options.channels),
        )
    else:
        params = OmegaConf.to_container(OmegaConf.from_dotlist(options.features_params))
        extractor = make_extractor(options.features, options.weights, params, options.channels)
    found = extractor.describe()
    if made and found["sha256"] != made["sha256"]:
        raise ValueError(
            f"the reference was made with {made['extractor']} {made.get('weights')}, this is {found['extractor']} "
            f"{found.get('weights')} with other weights: values of different features cannot be compared"
        )
    return extractor


def features_of(
    source: ImageSource,
    extractor: Extractor,
    folder: Path,
    options: argparse.Namespace,
    change: tuple[str, float] | None,
) -> FeatureSet | None:
    """Extract the features of images, distorted if `change` = (name, strength); None while other processes work."""
    more: dict[str, Any] = {}
    if change is not None:
        name, strength = change
        more["change"] = partial(distort, name=name, strength=strength, seed=options.seed)
        more["change_settings"] = {"distortion": name, "strength": strength, "seed": options.seed}
    device = pick_device(options.device)
    with tqdm(total=len(source), desc=str(folder), unit="image") as bar:
        return extract(
            source,
            extractor.to(device),
            folder,
            batch_size=options.batch_size,
            device=device,
            shard=shard_from_environment(),
            progress=bar.update,
            **more,
        )


def reference_settings(path: str) -> dict[str, Any]:
    """How a reference folder's features were made; {} for anything else."""
    return dict(open_features(path).settings) if is_feature_folder(path) else {}


def open_reference(path: str, extractor: Extractor, options: argparse.Namespace) -> FeatureSet | None:
    """The reference: a folder of `ref`, published statistics with or without images, or images."""
    if is_feature_folder(path):
        return open_features(path)
    given = load_statistics(path) if path.endswith(".npz") else {}
    if given and options.metrics and all(METRICS[name].reference != "features" for name in options.metrics):
        return FeatureSet(given=given)
    try:
        source = load_images(path, extractor.channels, options.image_size)
    except ValueError:
        if not given:
            raise
        return FeatureSet(given=given)
    found = features_of(source, extractor, Path(options.out) / "reference", options, None)
    if found is None or not given:
        return found
    return FeatureSet(found.pooled, found.logits, found.spatial, {**found.given, **given}, found.settings)


def metric_options(options: argparse.Namespace) -> Options:
    """The metrics' options."""
    names = ("resamples", "fid_resamples", "seed", "sigma", "kid_subsets", "kid_subset_size", "splits")
    return Options(**{name: getattr(options, name) for name in names}, device=pick_device(options.device))


def chosen_metrics(options: argparse.Namespace, reference: FeatureSet, samples: FeatureSet) -> list[str]:
    """The metrics asked for, else all that can be computed, telling which cannot and why."""
    if options.metrics:
        return options.metrics
    reasons = {name: obstacle(name, reference, samples) for name in METRICS}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"no {name}: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys as CSV."""
    with atomic_write(path, overwrite=True) as partial_path, partial_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def show(rows: Sequence[MetricRow]) -> None:
    """Print a line a number."""
    for row in rows:
        between = f"  [{row.low:.5g}, {row.high:.5g}]  {row.interval}" if not math.isnan(row.low) else ""
        print(f"{row.metric:>14}  {row.value:.6g}{between}")


def study_sizes(
    out: Path, names: list[str], reference: Reference, samples: FeatureSet, options: argparse.Namespace
) -> None:
    """Write sample_sizes.csv and sample_sizes.png."""
    rows = sample_sizes(names, reference, samples, options.sample_sizes, options.repeats, metric_options(options))
    summaries = summarise_sizes(rows)
    write_table(out / "sample_sizes.csv", [asdict(summary) for summary in summaries])
    unbiased = None
    if "fid" in names and len(set(options.sample_sizes)) > 1:
        unbiased = without_bias(rows)
        print(f"FID extrapolated to infinitely many images: {unbiased:.6g}")
    sample_size_plot(summaries, out / "sample_sizes.png", unbiased_fid=unbiased, overwrite=True)


def study_distortions(
    out: Path,
    names: list[str],
    reference: Reference,
    source: ImageSource,
    extractor: Extractor,
    options: argparse.Namespace,
) -> bool:
    """Write distortions.csv and distortions.png; False while other processes extract."""
    table, curves = [], {}
    for name in options.distortions:
        for level in options.levels:
            folder = out / "distortions" / f"{name}_{level:g}"
            samples = features_of(source, extractor, folder, options, (name, level))
            if samples is None:
                return False
            for row in measure(names, reference, samples, metric_options(options)):
                table.append({"distortion": name, "strength": level, **asdict(row)})
                points = curves.setdefault(row.metric, {}).setdefault(name, [])
                points.append((level, row.value, row.low, row.high))
    write_table(out / "distortions.csv", table)
    distortion_plot(curves, out / "distortions.png", overwrite=True)
    return True


def finish(
    options: argparse.Namespace, extractor: Extractor, source: ImageSource, rows: Sequence[MetricRow] = ()
) -> None:
    """Write metrics.csv, metrics.json and record.json."""
    out, features = Path(options.out), extractor.describe()
    if rows:
        table = [{**asdict(row), "features": extractor.name, "seed": options.seed} for row in rows]
        write_table(out / "metrics.csv", table)
        with atomic_write(out / "metrics.json", overwrite=True) as file:
            file.write_text(json.dumps({row["metric"]: row for row in table}, indent=1) + "\n")
    write_record(out / "record.json", vars(options), overwrite=True, features=features, images=source.describe())


def main(argv: list[str] | None = None) -> list[MetricRow] | None:
    options = parse(argv)
    out, made = Path(options.out), reference_settings(options.ref) if options.command == "calc" else {}
    extractor = extractor_of(options, made)
    pipeline = open_model(options.sampling) if options.sampling is not None else None
    source = images_of(options, extractor.channels, pipeline)
    change = named_strength(options.distort) if options.distort else None
    samples = features_of(source, extractor, out, options, change)
    found = open_reference(options.ref, extractor, options) if options.command == "calc" else samples
    if samples is None or found is None:
        print(f"{out}: this process is done; the one that finishes last goes on (or running once more)")
        return None
    if options.command == "ref":
        finish(options, extractor, source)
        print(f"{out}: features of {len(samples)} images")
        return None
    reference, names = Reference(found), chosen_metrics(options, found, samples)
    rows = []
    for name in (bar := tqdm(names, unit="metric")):
        bar.set_description(name)
        rows += measure([name], reference, samples, metric_options(options))
    show(rows)
    if options.sample_sizes:
        study_sizes(out, names, reference, samples, options)
    if options.distortions and not study_distortions(out, names, reference, source, extractor, options):
        return rows
    finish(options, extractor, source, rows)
    return rows


if __name__ == "__main__":
    run_script(main)
