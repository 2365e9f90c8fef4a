"""Epistemic uncertainty per pixel: mutual information between a pixel's colour and the ensemble's weights.

Examples:
  python get_unc_pixels.py --path logs/bootstrapped_digits_5
  python get_unc_pixels.py --path logs/bootstrapped_digits_5 --classes 0 3 8 --n 4 --space latent

Writes {path}/pixel_unc/: pixel_unc_branch{u}_{k}.png, images of the base member above their maps, all on one colour
scale, and the maps themselves (.npz).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ldm.arguments import add_ensemble_arguments
from ldm.cli import HelpFormatter, run_script, write_record
from ldm.images import heat_maps
from ldm.modules.distributions.gaussian import Gaussian
from ldm.opened import open_ensemble
from ldm.uncertainty.measures import mutual_information
from ldm.util import atomic_write
from sample_model import describe_class, spread_classes


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_ensemble_arguments(parser)
    parser.add_argument("--classes", type=int, nargs="+", help="classes (default: up to ten, spread over the bins)")
    parser.add_argument("--n", type=int, default=1, help="noises a class")
    parser.add_argument(
        "--space", default="image", choices=["image", "latent"], help="decoded images in [0, 1], or final latents"
    )
    parser.add_argument("--distance_scale", type=float, default=1.0, help="factor on the squared distances of pixels")
    parser.add_argument("--out", help="folder of the output (default: PATH/pixel_unc)")
    return parser


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    opened = open_ensemble(options)
    classes = options.classes or spread_classes(opened.bins, opened.model.null_class)
    out = Path(options.out or Path(options.path) / "pixel_unc")
    images, maps = [], []
    for label in tqdm(classes, desc="pixel maps", unit="class"):
        samples = opened.walk([label] * options.n, list(range(options.n))).samples
        decoded = opened.decode(samples)  # [M, n, C, H, W]
        values = (decoded + 1) / 2 if options.space == "image" else samples
        images.append(decoded[options.base_comp])
        maps.append(mutual_information(Gaussian(values), dims="pixel", scale=options.distance_scale).cpu())
    images, maps = torch.stack(images), torch.stack(maps)  # [K, n, C, H, W], [K, n, H, W]

    limits = (0.0, float(maps.max()))
    titles = [describe_class(opened, label) for label in classes]
    label = f"mutual information per pixel (nats), {options.space}"
    for noise in range(options.n):
        path = out / f"pixel_unc_branch{opened.branch}_{noise}.png"
        heat_maps(images[:, noise], maps[:, noise], path, label, titles, limits, 5, options.overwrite)
        print(path)
    with atomic_write(out / f"pixel_unc_branch{opened.branch}.npz", overwrite=True) as partial:
        np.savez_compressed(partial, images=images.numpy(), mi=maps.numpy(), classes=np.asarray(classes))
    write_record(out / "record.json", options, overwrite=True, settings=opened.describe())
    return out


if __name__ == "__main__":
    run_script(main)
