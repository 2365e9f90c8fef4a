"""Alignment and uniformity of a backbone's features at every place that is read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.evaluation.contrastive import alignment, class_pairs, uniformity
from ldm.evaluation.grid_features import read_features
from ldm.evaluation.taps import Backbone, Reading
from ldm.pipelines.features import DataStates
from ldm.training.runs import find_run
from ldm.util import generator


def find_checkpoints(run: str | None, ckpt: str | None, epochs: Sequence[int] = ()) -> dict[str, Path]:
    """Return {name: checkpoint} to be compared, in the order of training.

    Args:
        run: a run directory, whose kept checkpoints are compared, or a checkpoint in one.
        ckpt: the one checkpoint where there is no run.
        epochs: those of the kept checkpoints; all where none is named.

    Raises:
        ValueError: if epochs are asked for without a run directory.
    """
    if not run or Path(run).is_file():
        if epochs:
            raise ValueError("--epochs chooses among the checkpoints of a run directory: give it as --run")
        path = Path(str(run or ckpt))
        return {path.stem: path}
    directory, last = find_run(run)
    if epochs:
        return {f"epoch {epoch}": directory.checkpoint(epoch) for epoch in epochs}
    return directory.kept() or {"last": last}


def measure_contrast(
    backbone: Backbone,
    states: DataStates,
    reading: Reading,
    positives: Collection[str],
    seed: int,
    images_per_pass: int = 100,
) -> list[dict[str, Any]]:
    """Return a row a place: alignment for each kind of positives, and uniformity averaged over two noises.

    Args:
        positives: noise (two noises of one image), class (two images of one class), or both.
        seed: of the pairs of one class.
    """
    draws = len(reading.draws)
    with tqdm(total=2 * len(states), desc="features", unit="image", leave=False) as bar:
        sets = [
            read_features(
                states,
                backbone,
                replace(reading, draws=tuple(range(k * draws, (k + 1) * draws))),
                batch_size=images_per_pass,
                progress=bar.update,
            )
            for k in (0, 1)
        ]
    pairs = class_pairs(states.labels, generator("class pairs", seed)) if "class" in positives else None
    rows = []
    for place in reading.places:
        x, y = (torch.from_numpy(found.arrays[place]).to(states.model.device) for found in sets)
        row: dict[str, Any] = {"t": place[0], "layer": place[1]}
        if "noise" in positives:
            row["alignment"] = alignment(x, y)
        if pairs is not None:
            row["class_alignment"] = alignment(x[pairs[0]], x[pairs[1]])
        rows.append({**row, "uniformity": (uniformity(x) + uniformity(y)) / 2})
    return rows
