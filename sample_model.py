"""A grid of samples: a row for each member of the ensemble, a column for each class, the same noise everywhere.

Examples:
  python sample_model.py --path logs/bootstrapped_digits_5
  python sample_model.py --path logs/bootstrapped_digits_5 --classes 0 3 7 --branch_at 0 0.5 0.98 --base_comp all

Writes {path}/samples/members_branch{u}.png and the latents beside it, for each branch point and base member.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ldm.arguments import add_ensemble_arguments, fill_in_published
from ldm.checkpoint import save_tensors
from ldm.cli import HelpFormatter, run_script
from ldm.images import labelled_grid
from ldm.pipelines import EnsemblePipeline, open_ensemble
from ldm.records import refuse_existing, write_record


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_ensemble_arguments(parser)
    parser.add_argument("--classes", type=int, nargs="+", help="classes (default: up to ten, spread over the bins)")
    parser.add_argument("--out", help="folder of the output (default: PATH/samples)")
    return parser


def pictures(part: EnsemblePipeline, label: int, out: Path) -> dict[int, Path]:
    """{base member: its picture} at a branch point; with --uncertain_comp the one picture of every class's own base."""
    bases = part.bases(label)
    names = {base: f"_base{base}" if len(bases) > 1 else "" for base in bases}
    return {base: out / f"members_branch{part.branch}{name}.png" for base, name in names.items()}


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    fill_in_published(options)
    pipeline = open_ensemble(options)
    classes = pipeline.choose_classes(options.classes)
    columns = [pipeline.describe_class(label) for label in classes]
    names = pipeline.member_names(classes[0] if len(classes) == 1 else None)
    out, parts = Path(options.out or Path(options.path) / "samples"), list(pipeline.at_branches())
    paths = [path for part in parts for path in pictures(part, classes[0], out).values()]
    refuse_existing(paths, options.overwrite)
    for part in parts:
        samples = part.member_samples(classes, images=[0] * len(classes))  # [M, classes, bases, c, h, w]
        found = pictures(part, classes[0], out)
        for place, (base, path) in enumerate(found.items()):
            latents = samples[:, :, place]
            title = f"members part at step {part.branch} of {len(part.times) - 1}, guidance {part.scale:g}"
            title += f", base member {base}" if len(found) > 1 else ""
            labelled_grid(part.decode(latents), path, names, columns, title, options.overwrite)
            tensors = {"latents": latents.contiguous(), "classes": torch.tensor(classes)}
            save_tensors(tensors, path.with_suffix(".safetensors"), overwrite=True)
            write_record(path.with_suffix(".json"), options, overwrite=True, settings=part.describe())
    print("\n".join(map(str, paths)))
    return paths[0]


if __name__ == "__main__":
    run_script(main)
