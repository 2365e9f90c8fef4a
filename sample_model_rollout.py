"""Rollouts, one figure a class: the chain that all members share up to the branch, and each member's path after it.

Examples:
  python sample_model_rollout.py --path logs/bootstrapped_digits_5 --branch_at 0.5
  python sample_model_rollout.py --path logs/bootstrapped_digits_5 --classes 3 8 --show x
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.arguments import add_ensemble_arguments
from ldm.cli import HelpFormatter, run_script, write_record
from ldm.images import labelled_grid
from ldm.opened import open_ensemble
from sample_model import describe_class, spread_classes


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_ensemble_arguments(parser)
    parser.add_argument("--classes", type=int, nargs="+", help="classes (default: up to ten, spread over the bins)")
    parser.add_argument("--columns", type=int, default=8, help="moments shown before and after the branch together")
    parser.add_argument(
        "--show", default="x0", choices=["x0", "x"], help="the predicted image, or the noisy state itself"
    )
    parser.add_argument("--out", help="folder of the output (default: PATH/samps_uncs_branch{u}/rollout_sample)")
    return parser


def moments(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of `count` indices, evenly spaced, first and last included."""
    return (
        sorted({round(place) for place in torch.linspace(0, count - 1, max(1, min(wanted, count))).tolist()})
        if count
        else []
    )


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    opened = open_ensemble(options)
    classes = options.classes or spread_classes(opened.bins, opened.model.null_class)
    steps, at = len(opened.grid) - 1, opened.branch
    out = Path(options.out or Path(options.path) / f"samps_uncs_branch{at}" / "rollout_sample")
    share = round(options.columns * at / steps)
    chosen = [*moments(at, share), *[at + k for k in moments(steps - at, max(2, options.columns - share))]]
    for label in tqdm(classes, desc="rollouts", unit="class"):
        branched = opened.walk([label], images=[0], keep_before=True, keep_after=True)
        pictures, titles = [], []
        for step in (step for step in [*branched.before, *branched.after] if step.index in chosen):
            last = step.index == steps - 1
            picture = step.x0 if options.show == "x0" and not last else step.x_next
            picture = picture if picture.ndim == 5 else picture.expand(opened.members, *picture.shape)
            pictures.append(opened.decode(picture[:, 0]))
            titles.append(f"t={step.u:g}\n{'shared' if step.index < at else 'own'}" if not last else "final\nown")
        name = opened.class_names[label]
        labelled_grid(
            torch.stack(pictures, 1),
            out / f"rollout_bin{opened.bins.get(label, 'NA')}_{label}_{name}.png".replace(" ", "_"),
            [f"member {index}" for index in range(opened.members)],
            titles,
            f"{describe_class(opened, label)}: members part at step {at} of {steps}".replace("\n", ", "),
            options.overwrite,
        )
    write_record(out / "record.json", options, overwrite=True, settings=opened.describe())
    print(out)
    return out


if __name__ == "__main__":
    run_script(main)
