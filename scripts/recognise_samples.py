"""How many class-conditional samples does a classifier trained on the real images recognise, and are they copies?

Examples:
  python scripts/recognise_samples.py --run logs/2026-01-01T00-00-00_digits --n 50
  python scripts/recognise_samples.py --base configs/latent-diffusion/digits.yaml --ckpt trunk.ckpt

The classifier and its own accuracy come from the config's training and validation data. Also prints how far samples,
and real test images, lie from their nearest training image: copies would lie nearer than test images do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ldm.arguments import add_model_arguments, open_model
from ldm.cli import HelpFormatter, run_script
from ldm.evaluation.recognition import PixelClassifier, nearest_distances
from ldm.images import save_image, tile_images
from ldm.pipelines.images import real_images


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_arguments(parser, steps=50)
    parser.add_argument("--n", type=int, default=50, help="samples a class")
    parser.add_argument(
        "--real", type=int, default=10000, help="training and test images used at most, drawn by --seed"
    )
    parser.add_argument("--grid", help="also write ten samples a class to this picture")
    return parser


def main(argv: list[str] | None = None) -> float:
    options = get_parser().parse_args(argv)
    pipeline = open_model(options)
    config = pipeline.config

    real, tests = (
        real_images(config.data.params[split], options.real, options.seed) for split in ("train", "validation")
    )
    classifier = PixelClassifier(*real)
    own = classifier.recognised(*tests).mean()
    rates, every = [], []
    for label in tqdm(range(pipeline.n_classes), desc="classes", unit="class"):
        labels = [label] * options.n
        images = pipeline.decode(pipeline.sample_latents(labels, range(label * options.n, (label + 1) * options.n)))
        every.append(images)
        rates.append(classifier.recognised(images.permute(0, 2, 3, 1), labels).mean())
    if options.grid:
        save_image(
            tile_images(torch.cat([images[:10] for images in every]), columns=10, zoom=4),
            Path(options.grid),
            overwrite=True,
        )
    print("  ".join(f"{label}: {rate:.1%}" for label, rate in enumerate(rates)))
    print(f"recognised {np.mean(rates):.2%} of {options.n * len(rates)} samples; real test images {own:.2%}")
    near, far = (nearest_distances(images, real[0]) for images in (torch.cat(every).permute(0, 2, 3, 1), tests[0]))
    print(
        f"distance to the nearest training image (RMS of -1 .. 1), median and smallest: samples {np.median(near):.3f}, "
        f"{near.min():.3f}; real test images {np.median(far):.3f}, {far.min():.3f}"
    )
    return float(np.mean(rates))


if __name__ == "__main__":
    run_script(main)
