"""Rollouts, one figure a class: the chain that all members share up to the branch, and each member's path after it.

Examples:
  python sample_model_rollout.py --path logs/bootstrapped_digits_5 --branch_at 0.5
  python sample_model_rollout.py --path logs/bootstrapped_digits_5 --classes 3 8 --show x
  python sample_model_rollout.py --path logs/bootstrapped_digits_5 --pair        (a certain class, an uncertain one)

Writes {path}/samps_uncs_branch{u}/rollout_sample/: rollout_bin{B}_{class}_{name}.png, or with --pair one figure of two
classes side by side, rollout_pair.png (masked_classes: of the members that saw a class and those that did not).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from ldm.arguments import add_ensemble_arguments, fill_in_published
from ldm.cli import HelpFormatter, run_script
from ldm.images import labelled_grid, side_by_side
from ldm.pipelines import EnsemblePipeline, open_ensemble
from ldm.records import refuse_existing, write_record
from ldm.report.rollouts import pair_panels, rollout

PAIR = "rollout_pair.png"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_ensemble_arguments(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--classes", type=int, nargs="+", help="classes (default: up to ten, spread over the bins)")
    pair = "one figure: a certain class (default: of the largest bin) and an uncertain one (of the smallest)"
    what.add_argument("--pair", type=int, nargs="*", metavar="CLASS", help=pair)
    parser.add_argument("--columns", type=int, default=8, help="moments shown before and after the branch together")
    parser.add_argument(
        "--show", default="x0", choices=["x0", "x"], help="the predicted image, or the noisy state itself"
    )
    parser.add_argument("--out", help="folder of the output (default: PATH/samps_uncs_branch{u}/rollout_sample)")
    return parser


def pictures(pipeline: EnsemblePipeline, label: int, out: Path) -> dict[int, Path]:
    """{base member: its picture} of a class."""
    bases, stem = (
        pipeline.bases(label),
        f"rollout_bin{pipeline.bins.get(label, 'NA')}_{label}_{pipeline.class_names[label]}",
    )
    names = {base: f"{stem}_base{base}.png" if len(bases) > 1 else f"{stem}.png" for base in bases}
    return {base: out / name.replace(" ", "_").replace("/", "_") for base, name in names.items()}


def draw_class(pipeline: EnsemblePipeline, label: int, out: Path) -> None:
    """A figure for each base member of the class."""
    options, where = pipeline.options, f"members part at step {pipeline.branch} of {len(pipeline.times) - 1}"
    for base, path in pictures(pipeline, label, out).items():
        images, moments = rollout(pipeline, label, base, options.columns, options.show)
        title = f"{pipeline.describe_class(label)}: {where}, base member {base}".replace("\n", ", ")
        labelled_grid(images, path, pipeline.member_names(label), moments, title, options.overwrite)


def folder_of(part: EnsemblePipeline, several: bool) -> Path:
    """Where the pictures of a branch point go; `several` of them lie in folders of their own."""
    options, name = part.options, f"samps_uncs_branch{part.branch}"
    if options.out:
        return Path(options.out) / name if several else Path(options.out)
    return Path(options.path) / name / "rollout_sample"


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    fill_in_published(options)
    pipeline = open_ensemble(options)
    classes = pipeline.choose_classes(options.classes)
    folders = [(part, folder_of(part, len(pipeline.branches) > 1)) for part in pipeline.at_branches()]
    for part, out in folders:
        singles = (path for label in classes for path in pictures(part, label, out).values())
        refuse_existing(singles if options.pair is None else [out / PAIR], options.overwrite)
    for part, out in folders:
        if options.pair is not None:
            panels = pair_panels(part, options.pair, options.columns, options.show)
            side_by_side(panels, out / PAIR, options.overwrite)
        else:
            for label in tqdm(classes, desc="rollouts", unit="class"):
                draw_class(part, label, out)
        write_record(out / "record.json", options, overwrite=True, settings=part.describe())
        print(out)
    return out


if __name__ == "__main__":
    run_script(main)
