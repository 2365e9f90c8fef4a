"""Epistemic uncertainty per pixel: mutual information between a pixel of the final sample and the ensemble's members.

Examples:
  python get_unc_pixels.py --path logs/bootstrapped_digits_5
  python get_unc_pixels.py --path logs/bootstrapped_digits_5 --classes 0 3 8 --n 4 --space image latent --mean

Writes {path}/pixel_unc/: pixel_unc_branch{u}_{k}.png for noise k (with --mean one picture, of the mean over noises),
images of the base member above their maps, all maps on one colour scale, and the maps themselves (.npz). Maps of
latents go to files with `latent` in their names.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.arguments import add_ensemble_arguments, fill_in_published, scale_of
from ldm.cli import HelpFormatter, run_script
from ldm.images import heat_maps
from ldm.pipelines import EnsemblePipeline, open_ensemble
from ldm.records import refuse_existing, write_record
from ldm.uncertainty.quantities import pixel_maps
from ldm.util import atomic_write

SPACES = {"image": "decoded images in [0, 1]", "latent": "final latents"}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_ensemble_arguments(parser, published_branch=0)
    add = parser.add_argument
    add("--classes", type=int, nargs="+", help="classes (default: up to ten, spread over the bins)")
    add("--n", type=int, default=1, help="noises a class")
    add("--mean", action="store_true", help="one map a class: the mean over its noises, under the image of the first")
    add(
        "--space", nargs="+", default=["image"], choices=SPACES, help="decoded images in [0, 1], final latents, or both"
    )
    scale = "squared distances of a pixel: sum over its channels, mean, or a factor on the sum"
    add("--distance_scale", type=scale_of, default="sum", help=scale)
    channels = "a pixel's channels as one event (joint), or one by one and averaged (mean; --published)"
    add("--channels", choices=["joint", "mean"], help=channels + " (joint)")
    add("--limit", type=float, help="top of the colour scale (nats), to compare runs (default: the largest value)")
    add("--out", help="folder of the output (default: PATH/pixel_unc)")
    return parser


def measure(pipeline: EnsemblePipeline, labels: list[int]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Of each class: images [n, C, H, W] of its first base member, maps [n, h, w] in each space, means over bases."""
    options = pipeline.options
    numbers = list(range(options.n)) * len(labels)
    samples = pipeline.member_samples([label for label in labels for _ in range(options.n)], numbers)
    joint = options.channels != "mean"
    for label, own in zip(labels, samples.split(options.n, 1), strict=True):  # own [M, n, K, c, h, w]
        decoded = pipeline.decode(own)
        values = {"image": (decoded + 1) / 2, "latent": own}
        maps = {name: pixel_maps(values[name], options.distance_scale, joint).mean(1).cpu() for name in options.space}
        yield decoded[pipeline.bases(label)[0], :, 0], maps


def measure_all(pipeline: EnsemblePipeline, labels: list[int]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The same for any number of classes, as many at once as fill a pass of the network."""
    most = max(len(pipeline.bases(label)) for label in labels)
    together = pipeline.images_at_once(pipeline.options.n * pipeline.members * most)
    batches = [labels[first : first + together] for first in range(0, len(labels), together)]
    with tqdm(desc="pixel maps", unit="class", total=len(labels)) as progress:
        found = []
        for batch in batches:
            for one in measure(pipeline, batch):
                found.append(one)
                progress.update()
    return found


def stem_of(pipeline: EnsemblePipeline, space: str) -> str:
    """What the names of a space's outputs begin with."""
    return f"pixel_unc{'' if space == 'image' else '_latent'}_branch{pipeline.branch}"


def pictures(pipeline: EnsemblePipeline, space: str, out: Path) -> list[Path]:
    """The pictures of a space: one a noise, or that of their mean."""
    names = ["mean"] if pipeline.options.mean else range(pipeline.options.n)
    return [out / f"{stem_of(pipeline, space)}_{name}.png" for name in names]


def draw(pipeline: EnsemblePipeline, images: Tensor, maps: Tensor, titles: list[str], space: str, out: Path) -> None:
    """A picture of all classes a noise, from images [K, n, C, H, W] and maps [K, n, h, w], and the numbers."""
    options, paths = pipeline.options, pictures(pipeline, space, out)
    shown = maps.mean(1, keepdim=True) if options.mean else maps
    limits = (0.0, float(shown.max()) if options.limit is None else options.limit)
    label = f"mutual information per pixel (nats)\n{SPACES[space]}, distance {options.distance_scale}"
    label += ", channel by channel" if options.channels == "mean" else ""
    label += f", mean over {options.n} noises" if options.mean else ""
    for noise, path in enumerate(paths):
        heat_maps(images[:, noise], shown[:, noise], path, label, titles, limits, 5, options.overwrite)
        print(path)
    numbers = {"images": images.numpy(), "mi": maps.numpy(), "classes": np.asarray(options.classes)}
    with atomic_write(out / f"{stem_of(pipeline, space)}.npz", overwrite=True) as partial:
        np.savez_compressed(partial, **numbers)


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    fill_in_published(options, channels="mean")
    if options.n < 1:
        raise ValueError(f"--n is the number of noises of a class: expected at least 1, got {options.n}")
    pipeline = open_ensemble(options)
    options.classes = pipeline.choose_classes(options.classes)
    titles = [pipeline.describe_class(label) for label in options.classes]
    out = Path(options.out or Path(options.path) / "pixel_unc")
    parts = list(pipeline.at_branches())
    refuse_existing(
        [path for part in parts for space in options.space for path in pictures(part, space, out)], options.overwrite
    )
    for part in parts:
        found = measure_all(part, options.classes)
        images = torch.stack([shown for shown, _ in found])
        for space in options.space:
            draw(part, images, torch.stack([maps[space] for _, maps in found]), titles, space, out)
        settings = {**part.describe(), "distance": "wasserstein", "distance_scale": options.distance_scale}
        write_record(out / f"record_branch{part.branch}.json", options, overwrite=True, settings=settings)
    return out


if __name__ == "__main__":
    run_script(main)
