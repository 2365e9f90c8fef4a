"""Alignment and uniformity of a diffusion model's features, over the checkpoints of a training and its layers.

Examples:
  python scripts/contrastive.py --run logs/2026-01-01T00-00-00_mnist --t 11 --layers all --out results/contrastive
  python scripts/contrastive.py --run RUN --epochs 9 19 29 --n 5000 --positives noise class --out results/contrastive
  python scripts/contrastive.py --base CONFIG --ckpt model.ckpt --index 4 --layers all --out results/contrastive

Alignment is the mean squared distance of positive pairs at unit length (two noises of one image; with `class` also two
images of one class), uniformity the logarithm of the mean of exp(-2 d^2) over all pairs of images; both over all
images at once, whatever the batch. Lower is better. Checkpoints: those that --run kept by name (main.py
--every_n_epochs), or --epochs. Writes contrastive.csv and contrastive.png.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.arguments import add_source_arguments
from ldm.cli import HelpFormatter, add_device_arguments, run_script, write_record
from ldm.evaluation.contrastive import alignment, class_pairs, uniformity
from ldm.evaluation.grid_features import read_features
from ldm.evaluation.taps import Reading, Trunk
from ldm.opened import load_weights, open_model
from ldm.opened.probing import chosen_positions
from ldm.opened.trunk import DataStates, add_reading_arguments, reading_of, trunk_of
from ldm.report.probes import lines
from ldm.report.tables import markdown_table, write_csv
from ldm.training.runs import find_run
from ldm.util import generator, instantiate_from_config


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


def measure(
    trunk: Trunk, states: DataStates, reading: Reading, positives: Sequence[str], options: argparse.Namespace
) -> list[dict]:
    """A row a place: alignment for each kind of positives, and uniformity averaged over the two noises."""
    draws = len(reading.draws)
    with tqdm(total=2 * len(states), desc="features", unit="image") as bar:
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


def main(argv: list[str] | None = None) -> list[dict]:
    options = get_parser().parse_args(argv)
    out = Path(options.out)
    if (out / "contrastive.csv").exists() and not options.overwrite:
        raise FileExistsError(f"{out / 'contrastive.csv'} exists; choose another --out, or add --overwrite")
    opened = open_model(options)
    options.device_used = str(opened.device)
    data = instantiate_from_config(opened.config["data"]["params"]["train"])
    positions = chosen_positions(len(data), options.n, options.seed)
    rows = []
    for name, checkpoint in checkpoints_of(options).items():
        load_weights(opened.model, checkpoint, options.ema, options.pretrained)
        trunk = trunk_of(opened.model, options.label)
        reading = reading_of(opened, trunk, copy.copy(options), grid=options.layers is None, seed=options.seed)
        states = DataStates(opened.model, data, positions)
        rows += [{"checkpoint": name, **row} for row in measure(trunk, states, reading, options.positives, options)]
    note = "features at unit length: mean squared distance of positive pairs; ln mean exp(-2 d^2) of all pairs"
    write_csv(out / "contrastive.csv", rows, [note], options.overwrite)
    kinds = [key for key in rows[0] if key in ("alignment", "class_alignment")]
    curves = {}
    for place in dict.fromkeys((row["t"], row["layer"]) for row in rows):
        own = [row for row in rows if (row["t"], row["layer"]) == place]
        curves[f"{place[1]}, t={place[0]:.4g}"] = ([row[kinds[0]] for row in own], [row["uniformity"] for row in own])
    title = "each curve: one layer, along the checkpoints" if len(rows) > len(curves) else ""
    lines(curves, out / "contrastive.png", kinds[0].replace("_", " "), "uniformity", title, overwrite=options.overwrite)
    write_record(out / "record.json", options, overwrite=True, images=len(positions))
    print(markdown_table(rows))
    return rows


if __name__ == "__main__":
    run_script(main)
