"""Epistemic uncertainty per class: mutual information between a sample and the ensemble's members at the branch.

Examples:
  python get_unc_synsets.py --path logs/bootstrapped_digits_5
  python get_unc_synsets.py --path logs/bootstrapped_digits_5 --unc_branch 0 --n 16 --ddim_steps 50
  python get_unc_synsets.py --path logs/bootstrapped_digits_5 --branch_at 0 0.5 0.98 --diversity --curve
  python get_unc_synsets.py --path logs/bootstrapped_digits_5 --base_comp all --ci_width 0.01 --max_n 200
  torchrun --nproc_per_node 4 -- get_unc_synsets.py --path ENSEMBLE     (classes are shared out; results are merged)

One-step (the default, cheap): of the first step after the branch, given the state z_b that all members share.
Multi-step (--curve): of every later step too, between chains that have parted.

Writes {path}/samps_uncs_branch{u}/: uncertainty.csv (a row a class), summary.json and .md, uncertainty.png and
distributions.png (per bin), with --curve curve.csv and curve.png, and one file a class under classes_*/, so that a run
that was stopped continues where it was. With several branch points also {path}/by_branch.csv and its plots.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ldm.arguments import add_ensemble_arguments, count_or_auto, fill_in_published, scale_of
from ldm.checkpoint import save_tensors
from ldm.cli import HelpFormatter, run_script
from ldm.evaluation.diversity import load_lpips
from ldm.experiments.classes import LATENTS, MEMBER_DISTANCES, OBJECTS, Plan, measure_classes
from ldm.images import labelled_grid
from ldm.jobs import WorkList, shard_from_environment
from ldm.pipelines import EnsemblePipeline, open_ensemble
from ldm.records import write_record
from ldm.report.class_report import write_branch_report, write_class_report
from ldm.uncertainty import information as measures
from ldm.uncertainty.quantities import Estimator

KEEPABLE = ("grid", "tensors")
# The published scripts draw ten noises and score the first five: their estimator slices the wrong axis.
PUBLISHED_N = 5


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_ensemble_arguments(parser)
    add = parser.add_argument
    add("--n", type=int, help="noises a class, with --ci_width of one round (config, else 10; published: 5 are scored)")
    add(
        "--ci_width", type=float, help="add noises to a class until its 95%% interval is this narrow (nats, end to end)"
    )
    add("--max_n", type=int, default=100, help="noises a class at most, with --ci_width")
    add("--classes", type=int, nargs="+", help="classes (default: all)")
    add("--quickrun", action="store_true", help="eight classes, spread over the bins")
    distance = "distance between members; the published one is wasserstein (squared), the others need --ddim_eta > 0"
    add("--distance", choices=sorted(measures.DISTANCES), default="wasserstein", help=distance)
    scale = "sum over dimensions (as published), mean, or a factor on the sum"
    add("--distance_scale", type=scale_of, default="sum", help=scale)
    of = "between the states after the step, as published, or the predicted x0, whatever the step's length"
    add("--distance_of", choices=sorted(OBJECTS), help=f"{of} (config's uncertainty.distance_of, else state)")
    add("--curve", "--steps_curve", action="store_true", help="mutual information of every step: walks to the end")
    add("--diversity", action="store_true", help="structural similarity of the members' pictures: walks to the end")
    add("--lpips", metavar="FILE", help="with --diversity: the learned perceptual distance too, with these weights")
    keep = "keep a picture of members x noises (times), latents and distances (tensors) of each class under kept/"
    add("--keep_images", nargs="*", choices=KEEPABLE, help=keep)
    add("--classes_at_once", type=count_or_auto, default="auto", help="classes in one batch")
    add("--out", help="folder of the output (default: PATH/samps_uncs_branch{u})")
    return parser


def plan_of(options: argparse.Namespace, pipeline: EnsemblePipeline) -> Plan:
    """What the options say to measure.

    Raises:
        ValueError: if weights of LPIPS come without --diversity.
    """
    if options.lpips and not options.diversity:
        raise ValueError("--lpips goes with --diversity")
    own = pipeline.setting("distance_of", "state") if options.distance == "wasserstein" else "state"
    return Plan(
        Estimator(options.distance, options.distance_scale),
        n=pipeline.setting("n", 10) if options.n is None else options.n,
        width=options.ci_width,
        most=options.max_n,
        curve=options.curve,
        diversity=options.diversity,
        lpips=None if options.lpips is None else load_lpips(options.lpips).to(pipeline.device),
        keep=options.keep_images is not None,
        of=options.distance_of or own,
    )


def keep(result: dict[str, Tensor], label: int, kinds: list[str], folder: Path, pipeline: EnsemblePipeline) -> None:
    """Write what --keep_images asks for, and take it out of the result."""
    latents, distances = result.pop(LATENTS), result.pop(MEMBER_DISTANCES)
    if "tensors" in kinds:
        save_tensors(
            {LATENTS: latents, MEMBER_DISTANCES: distances}, folder / f"class{label}.safetensors", overwrite=True
        )
    if "grid" in kinds:
        columns = [f"{mi:.4f}" for mi in result["mi"].tolist()]
        title = f"{pipeline.describe_class(label)}: MI (nats) of each noise".replace("\n", ", ")
        names = pipeline.member_names(label)
        labelled_grid(pipeline.decode(latents), folder / f"class{label}.png", names, columns, title, overwrite=True)


def report(pipeline: EnsemblePipeline, classes: list[int], plan: Plan) -> list[dict[str, Any]] | None:
    """Measure at one branch point, continue what is there, write the report; None while other processes work."""
    options = pipeline.options
    name = f"samps_uncs_branch{pipeline.branch}"
    out = Path(options.out or Path(options.path) / name)
    out = out / name if options.out and len(options.branch_steps) > 1 else out
    settings, kinds = {**pipeline.describe(), **plan.describe()}, sorted(set(options.keep_images or ["grid"]))
    if plan.keep:
        settings["kept"] = kinds
    work = WorkList.apart(out / "classes", settings, shard_from_environment())
    keys = [str(label) for label in classes]
    pending = [int(key) for key in work.pending(keys)]
    measured = measure_classes(pipeline, pending, plan, options.classes_at_once)
    done = len(classes) - len(pending)
    for label, result in tqdm(measured, desc="classes", unit="class", total=len(classes), initial=done):
        if plan.keep:
            keep(result, label, kinds, out / "kept", pipeline)
        work.save(str(label), {name: value.tolist() for name, value in result.items()})
    if not work.complete(keys):
        print(f"{out}: this process is done; the one that finishes last (or one more call) writes the table")
        return None
    results = {label: work.load(str(label)) for label in classes}
    rows, words = write_class_report(out, results, pipeline, settings, plan.estimator.units)
    write_record(out / "record.json", options, overwrite=True, settings=settings)
    print("\n".join([f"step {pipeline.branch} of {len(pipeline.times) - 1}:", *words, str(out / "uncertainty.csv")]))
    return rows


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    fill_in_published(options, n=PUBLISHED_N)
    pipeline = open_ensemble(options)
    options.branch_steps = pipeline.branches
    plan = plan_of(options, pipeline)
    classes = pipeline.choose_classes(options.classes, 8 if options.quickrun else None)
    tables = {part.branch: report(part, classes, plan) for part in pipeline.at_branches()}
    folder = Path(options.out or options.path)
    if len(tables) > 1 and None not in tables.values():
        times = {step: float(pipeline.times[step]) for step in tables}
        comments = [f"{key}: {value}" for key, value in {**pipeline.describe_sampling(), **plan.describe()}.items()]
        name = pipeline.ensemble.spec["name"]
        title = f"{name}: {pipeline.members} members; {options.distance}, {options.distance_scale}"
        print("\n".join(map(str, write_branch_report(folder, tables, times, comments, title))))
    return folder if options.out or len(tables) > 1 else folder / f"samps_uncs_branch{pipeline.branch}"


if __name__ == "__main__":
    run_script(main)
