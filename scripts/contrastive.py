"""Alignment and uniformity of a diffusion model's features, over the checkpoints of a training and its layers.

Examples:
  python scripts/contrastive.py --run logs/2026-01-01T00-00-00_mnist --t 11 --layers all --out results/contrastive
  python scripts/contrastive.py --run RUN --epochs 9 19 29 --n 5000 --positives noise class --out results/contrastive
  python scripts/contrastive.py --base CONFIG --ckpt model.ckpt --index 4 --layers all --out results/contrastive

Alignment is the mean squared distance of positive pairs at unit length (two noises of one image; with `class` also two
images of one class), uniformity the logarithm of the mean of exp(-2 d^2) over all pairs of images; both over all
images at once, whatever the batch. Lower is better. Checkpoints: those that --run kept by name (main.py
--every_n_epochs), or --epochs. Writes contrastive.csv and contrastive.png; a
stopped run continues with the checkpoints that are not in --out yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.arguments import add_reading_arguments, add_source_arguments, make_feature_reading, open_model
from ldm.checkpoint import sha256
from ldm.cli import HelpFormatter, add_device_arguments, run_script
from ldm.evaluation.contrastive import alignment, class_pairs, uniformity
from ldm.evaluation.grid_features import read_features
from ldm.evaluation.taps import Backbone, Reading
from ldm.experiments.probes import draw_probe_positions
from ldm.jobs import WorkList
from ldm.pipelines import load_weights
from ldm.pipelines.features import DataStates, make_backbone, make_reading
from ldm.records import refuse_existing, write_record
from ldm.report.probes import trajectories
from ldm.report.tables import markdown_table, write_csv
from ldm.training.runs import find_run
from ldm.util import generator, instantiate_from_config

# Columns of alignment, and what they are called.
KINDS = {"alignment": "alignment: two noises of an image", "class_alignment": "alignment: two images of a class"}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_source_arguments(parser)
    add_reading_arguments(parser)
    parser.add_argument("--epochs", type=int, nargs="+", help="kept epochs (default: all that --run kept by name)")
    parser.add_argument("--n", type=int, help="training images, drawn by --seed (default: all)")
    pairs = "noise: two noises of one image; class: two images of one class"
    parser.add_argument("--positives", nargs="+", default=["noise"], choices=("noise", "class"), help=pairs)
    parser.add_argument("--out", required=True, help="folder of the output")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    add_device_arguments(parser)
    return parser


def checkpoints_of(options: argparse.Namespace) -> dict[str, Path]:
    """{name: checkpoint} to be compared, in the order of training.

    Raises:
        ValueError: if epochs are asked for without a run.
    """
    if not options.run or Path(options.run).is_file():
        if options.epochs:
            raise ValueError("--epochs chooses among the checkpoints of a run directory: give it as --run")
        path = Path(options.run or options.ckpt)
        return {path.stem: path}
    run, last = find_run(options.run)
    if options.epochs:
        return {f"epoch {epoch}": run.checkpoint(epoch) for epoch in options.epochs}
    return run.kept() or {"last": last}


def settings_of(options: argparse.Namespace, reading: Reading, states: DataStates) -> dict[str, Any]:
    """What a checkpoint's rows depend on but its weights."""
    given = {name: getattr(options, name) for name in ("ema", "pretrained", "label", "positives", "precision", "seed")}
    return {**given, "reading": reading.describe(), "states": states.describe()}


def measure(
    trunk: Backbone, states: DataStates, reading: Reading, positives: Sequence[str], options: argparse.Namespace
) -> list[dict]:
    """A row a place: alignment for each kind of positives, and uniformity averaged over the two noises."""
    draws = len(reading.draws)
    with tqdm(total=2 * len(states), desc="features", unit="image", leave=False) as bar:
        sets = [
            read_features(
                states, trunk, replace(reading, draws=tuple(range(k * draws, (k + 1) * draws))),
                batch_size=options.images_per_pass, progress=bar.update,
            )
            for k in (0, 1)
        ]  # fmt: skip
    pairs = class_pairs(states.labels, generator("class pairs", options.seed)) if "class" in positives else None
    rows = []
    for place in reading.places:
        x, y = (torch.from_numpy(found.arrays[place]).to(options.device_used) for found in sets)
        row = {"t": place[0], "layer": place[1]}
        if "noise" in positives:
            row["alignment"] = alignment(x, y)
        if pairs is not None:
            row["class_alignment"] = alignment(x[pairs[0]], x[pairs[1]])
        rows.append({**row, "uniformity": (uniformity(x) + uniformity(y)) / 2})
    return rows


def draw(rows: Sequence[dict], path: Path, overwrite: bool) -> None:
    """Uniformity against each alignment: a curve a place, along the checkpoints."""
    several = len({row["t"] for row in rows}) > 1
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for kind, xlabel in KINDS.items():
        for row in (row for row in rows if kind in row):
            name = row["layer"] + (f", t = {row['t']:.4g}" if several else "")
            x, y = panels.setdefault(xlabel, {}).setdefault(name, ([], []))
            x.append(row[kind])
            y.append(row["uniformity"])
    count = len({row["checkpoint"] for row in rows})
    title = f"layers along {count} checkpoints, the last as a large dot" if count > 1 else ""
    trajectories(panels, path, "uniformity", title, overwrite)


def main(argv: list[str] | None = None) -> list[dict]:
    options = get_parser().parse_args(argv)
    out = Path(options.out)
    refuse_existing([out / "contrastive.csv"], options.overwrite)
    pipeline = open_model(options)
    options.device_used = str(pipeline.device)
    data = instantiate_from_config(pipeline.config["data"]["params"]["train"])
    positions = draw_probe_positions(len(data), options.n, options.seed)
    trunk = make_backbone(pipeline.model, options.label)
    reading = make_reading(
        pipeline, trunk, make_feature_reading(options), search=options.layers is None, seed=options.seed
    )
    states, checkpoints = DataStates(pipeline.model, data, positions), checkpoints_of(options)
    work = WorkList(out / "parts", settings_of(options, reading, states))
    names = {f"{name}_{sha256(checkpoint)[:12]}": name for name, checkpoint in checkpoints.items()}
    for key in tqdm(work.pending(names), desc="checkpoints", unit="checkpoint"):
        load_weights(pipeline.model, checkpoints[names[key]], options.ema, options.pretrained, pipeline.config)
        work.save(key, {"rows": measure(trunk, states, reading, options.positives, options)})
    rows = [{"checkpoint": name, **row} for key, name in names.items() for row in work.load(key)["rows"]]
    note = "features at unit length: mean squared distance of positive pairs; ln mean exp(-2 d^2) of all pairs"
    write_csv(out / "contrastive.csv", rows, [note], options.overwrite)
    draw(rows, out / "contrastive.png", options.overwrite)
    write_record(out / "record.json", vars(options), overwrite=True, images=len(positions))
    print(markdown_table(rows))
    return rows


if __name__ == "__main__":
    run_script(main)
