"""BayesFlow's benchmarks in one table: the published method's figures beside ours, each against another truth.

Examples:
  python scripts/benchmark_bayesflow.py --run logs/2026-01-01T00-00-00_digits --out results/bayesflow
  python scripts/benchmark_bayesflow.py --run RUN --out results/bayesflow --only fidelity cost
  python scripts/benchmark_bayesflow.py --run RUN --out results/bayesflow --only low_data --seeds 0 1

  Y1 fidelity      variance maps against many sampled weights held for the walk, 10 steps
  Y2 consistency   total variance at the second of --grids steps over that at the first, over the truth's ratio
  Y3 calibration   predictive variances against bootstraps of the last layer over images
  Y4 low_data       samples of low_data classes found, minus the same score of a model that saw all data: trains
                   {models} small models a seed (two classes with 8 images each) and a control, with --low_data_base
  Y6 alignment     the closed-form aleatoric map against squared errors on held-out images
  Y8 scaling       epistemic variance against the number of images, slope in logarithms
  Y9 cost          evaluations and seconds an image of every method

The model is a run of configs/flow-matching (any flow; a diffusion gives what its path knows). Parts that exist in
--out are kept, of low_data each model's scores ({{out}}/low_data/scores_*.json): a stopped call continues, and more
--seeds add to what there is. Writes {{out}}/: report.md, a table (.csv) a part, record.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils.data import Subset

from ldm.arguments import add_model_arguments, open_model
from ldm.cli import HelpFormatter, run_script
from ldm.experiments import low_data as low_data
from ldm.experiments import variance_benchmarks as benchmarks
from ldm.jobs import WorkList
from ldm.pipelines import ModelPipeline, PosteriorPipeline, chosen_positions
from ldm.records import write_record
from ldm.report.benchmark_table import benchmark_overview
from ldm.report.tables import markdown_table, read_csv, write_csv
from ldm.settings import Training
from ldm.training.config import load_config
from ldm.training.runs import runs_named
from ldm.training.session import train
from ldm.util import atomic_write, instantiate_from_config

ROOT = Path(__file__).resolve().parent.parent
ROTATIONS = (0, 2, 4, 6, 8)
KEPT = 8  # images of a low_data class
PARTS = ("fidelity", "consistency", "calibration", "low_data", "alignment", "scaling", "cost")
NAME = "low_data"
CONFIGS = ("configs/flow-matching/digits.yaml", "configs/flow-matching/digits-small.yaml")
LOW_DATA_SCORES = ("gamma^2 along the path", "tangents, K = 8", "BayesFlow as published, S = 100")
SHARES = (0.1, 0.3, 0.5, 0.7)
__doc__ = __doc__.format(models=len(ROTATIONS))


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_arguments(parser, steps=10)
    add = parser.add_argument
    add("--out", required=True, help="folder of everything")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    add("--n", type=int, default=20, help="images of fidelity, consistency and cost, the classes in turn")
    add("--grids", type=int, nargs=2, default=[10, 40], help="numbers of steps of consistency")
    add("--truth", type=int, default=128, help="sampled weights that the truth is made of")
    add("--images", type=int, help="training images of the posteriors of all parts but low_data (default: all)")
    add("--draws", type=int, default=4, help="noise draws for each image of a fit")
    add("--bootstraps", type=int, default=240, help="refits of calibration (and as many more for its ceiling)")
    add("--tests", type=int, default=200, help="held-out images of calibration and alignment")
    add("--probes", type=int, help="of the aleatoric map, for large images (default: its exact diagonal)")
    add(
        "--low_data_base",
        nargs="+",
        default=[str(ROOT / name) for name in CONFIGS],
        help="configs of the low_data models",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1], help="trainings of each low_data model")
    add("--per_class", type=int, default=24, help="samples a class of the low_data models")
    return parser


def data_of(pipeline: ModelPipeline, split: str, count: int | None = None) -> Any:
    """A split of the run's data, or `count` images of it."""
    data = instantiate_from_config(pipeline.config["data"]["params"][split])
    return data if count is None else Subset(data, chosen_positions(len(data), count, pipeline.sampling.seed))


def walks_of(options: argparse.Namespace) -> PosteriorPipeline:
    """The run with the evidence-tuned posterior of its last layer."""
    pipeline = open_model(options)
    return low_data.fit_posterior(pipeline, data_of(pipeline, "train", options.images), options.draws)


def numbers(walks: PosteriorPipeline, count: int) -> tuple[list[int], list[int]]:
    """Labels and image numbers of `count` samples."""
    classes = walks.pipeline.n_classes
    return [image % classes for image in range(count)], list(range(count))


def cost(walks: PosteriorPipeline, labels: list[int], images: list[int]) -> list[dict[str, Any]]:
    """Seconds and evaluations an image of every method, all in one run, beside plain sampling."""
    steps = len(walks.pipeline.times) - 1
    tasks = {"plain sampling": (lambda: list(walks.plain(labels, images)), steps)}
    for name, method in benchmarks.applicable(walks):
        if method.evaluations(steps):
            tasks[name] = (lambda method=method: method.run(walks, labels, images), method.evaluations(steps))
    rows = []
    with torch.no_grad():
        for name, (task, evaluations) in tasks.items():
            task()
            began = time.perf_counter()
            task()
            each = (time.perf_counter() - began) / len(images)
            rows.append({"method": name, "evaluations": evaluations, "seconds": each})
    for row in rows:
        row["times_plain"] = row["seconds"] / rows[0]["seconds"]
    return rows


def low_data_run(options: argparse.Namespace, rotation: int | None, seed: int) -> Path:
    """The run of a low_data model (or the control), trained if it is not there; a stopped training continues."""
    from scripts import make_bins

    folder = Path(options.out).resolve() / NAME
    logs = folder / f"{'control' if rotation is None else rotation}_{seed}"
    known = runs_named(logs, NAME) if logs.is_dir() else []
    gpus = "0" if options.device == "cpu" else "0,"
    if known and known[-1].finished.exists():
        return known[-1].path
    if known and (known[-1].checkpoints / "last.ckpt").exists():
        return train(Training(resume=str(known[-1].path), gpus=gpus))
    changes = []
    if rotation is not None:
        bins, key = folder / f"bins_{rotation}", "data.params.train"
        if not (bins / "subsets_binned_classes.yaml").exists():
            asked = ["--base", options.low_data_base[0], "--rotation", rotation, "--components", 1, "--out", bins]
            make_bins.main([*map(str, asked), "--classes_per_bin", f"{KEPT}:2", "all:8"])
        data = load_config(options.low_data_base).data.params.train
        changes = [f"{key}.target=ldm.data.subsets.ComponentSubset", f"{key}.params.folder={bins}"]
        changes += [f"{key}.params.dataset.target={data.target}"]
        changes += [f"{key}.params.dataset.params.{name}={value}" for name, value in data.get("params", {}).items()]
    training = Training(
        base=tuple(options.low_data_base),
        gpus=gpus,
        name=NAME,
        logdir=str(logs),
        seed=seed,
        scale_lr=False,
        changes=tuple(changes),
    )
    return train(training)


def once(path: Path, make: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a table, made if it is not there."""
    if not path.exists():
        write_csv(path, make())
    return read_csv(path)


def low_data_work(options: argparse.Namespace) -> WorkList:
    """The scores of every low_data model and control, beside their runs, under what they depend on."""
    names = ("draws", "per_class", "sampler", "ddim_steps", "spacing", "scale", "seed")
    config = OmegaConf.to_container(load_config(options.low_data_base), resolve=True)
    settings = {"config": config, **{name: getattr(options, name) for name in names}, "scores": LOW_DATA_SCORES}
    return WorkList(Path(options.out) / NAME, settings)


def low_data_scores(options: argparse.Namespace, rotation: int | None, seed: int) -> list[dict[str, Any]]:
    """The scores of the samples of a low_data model (or the control), see `score_rows`."""
    run = low_data_run(options, rotation, seed)
    pipeline = open_model(argparse.Namespace(**{**vars(options), "run": str(run)}))
    train = data_of(pipeline, "train")
    labels = [label for label in range(pipeline.n_classes) for _ in range(options.per_class)]
    walks = low_data.fit_posterior(pipeline, train, options.draws)
    few = [] if rotation is None else [label for label, class_size in train.bins.items() if class_size == KEPT]
    return low_data.score_rows(low_data.sample_scores(walks, train, labels, LOW_DATA_SCORES), labels, few)


def low_data_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """See `detection_rows`, for every rotation and seed; a model that was scored is not scored again."""
    work, rows = low_data_work(options), []

    def scores(rotation: int | None, seed: int) -> list[dict[str, Any]]:
        key = f"scores_{'control' if rotation is None else rotation}_{seed}"
        if work.pending([key]):
            work.save(key, {"rows": low_data_scores(options, rotation, seed)})
        return work.load(key)["rows"]

    for seed in options.seeds:
        control = scores(None, seed)
        for rotation in ROTATIONS:
            own = scores(rotation, seed)
            few = sorted({row["class"] for row in own if row["low_data"]})
            named = {"seed": seed, "classes": " ".join(map(str, few))}
            rows += [{**named, **row} for row in low_data.detection_rows(own, control)]
    return rows


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The tables of the chosen parts."""
    out, made = Path(options.out), []

    def walks() -> PosteriorPipeline:
        if not made:
            made.append(walks_of(options))
        return made[0]

    def sampled(count: int) -> tuple[PosteriorPipeline, list[int], list[int]]:
        return walks(), *numbers(walks(), count)

    def data(split: str) -> Any:
        return data_of(walks().pipeline, split, options.images if split == "train" else None)

    own = {"draws": options.draws, "tests": options.tests}
    parts: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "fidelity": lambda: benchmarks.fidelity(*sampled(options.n), options.truth),
        "consistency": lambda: benchmarks.consistency(
            *sampled(options.n), tuple(options.grids), draws=max(2, options.truth // 2)
        ),
        "calibration": lambda: benchmarks.calibration(
            walks().pipeline, data("train"), data("validation"), count=options.bootstraps, **own
        ),
        "low_data": lambda: low_data_rows(options),
        "alignment": lambda: benchmarks.error_alignment(
            walks().pipeline, data("validation"), SHARES, count=options.tests, probes=options.probes
        ),
        "scaling": lambda: benchmarks.data_scaling(walks().pipeline, data("train"), data("validation"), **own),
        "cost": lambda: cost(*sampled(options.n)),
    }
    tables = {}
    for name in (name for name in PARTS if name in options.only):
        if name == "low_data":  # its models' scores are what is kept
            write_csv(out / f"{name}.csv", parts[name](), overwrite=True)
        tables[name] = once(out / f"{name}.csv", parts[name])
    return tables


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    out = Path(options.out)
    tables = measure(options)
    if "low_data" in tables:
        tables["low_data_summary"] = low_data.summary(tables["low_data"])
    lines = ["# Benchmarks", "", markdown_table(benchmark_overview(tables)), ""]
    for name, rows in tables.items():
        lines += [f"## {name}", "", markdown_table(rows), ""]
    with atomic_write(out / "report.md", overwrite=True) as partial:
        partial.write_text("\n".join(lines))
    write_record(out / "record.json", vars(options), overwrite=True)
    print((out / "report.md").read_text())
    return out


if __name__ == "__main__":
    run_script(main)
