"""Command-line arguments that name a set of images, and the images they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.evaluation.extraction import ImageSource
from ldm.pipelines.images import Chosen, DataSetImages, SampledImages, load_images, positions_of
from ldm.training.config import read_data_config
from ldm.util import instantiate_from_config


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, and how many of them."""
    parser.add_argument("--images", help="folder, .zip, .npz, .pt or .safetensors")
    parser.add_argument("--data", nargs="+", metavar="WORD", help="target=.. params.x=..; or CONFIG.yaml:train a.b=c")
    parser.add_argument("--n", type=int, help="the first n images; how many to sample with --run")
    parser.add_argument("--keep", help="file with a line an image to keep: its position, or its path below the folder")
    parser.add_argument("--image_size", type=int, help="scale picture files to this side and cut the centre square")
    parser.add_argument("--batch_size", type=int, default=100, help="images in one pass")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    parser.add_argument("--seed", type=int, default=42, help="seed of everything that is drawn")


def images_of(options: argparse.Namespace, channels: int, pipeline: Any = None) -> ImageSource:
    """The images that the options of `add_image_arguments` name, in their order.

    Args:
        channels: of picture files, 1 or 3.
        pipeline: a model (`ldm.pipelines.open_model`) to sample --n images from, instead of --images and --data.

    Raises:
        ValueError: if none or several sets are named, or there are fewer images than --n.
    """
    if sum(given is not None for given in (options.images, options.data, pipeline)) != 1:
        raise ValueError("expected one of --images, --data, and --run (or --base with --ckpt)")
    if any(value is not None and value < 1 for value in (options.n, options.batch_size)):
        raise ValueError(f"--n and --batch_size must be at least 1, got {options.n} and {options.batch_size}")
    if pipeline is not None:
        if options.n is None:
            raise ValueError("--n is needed: how many images to sample")
        source: ImageSource = SampledImages(pipeline, options.n)
    elif options.data is not None:
        config = read_data_config(options.data)
        source = DataSetImages(instantiate_from_config(config), config)
    else:
        source = load_images(options.images, channels, options.image_size)
    if options.keep is not None:
        lines = Path(options.keep).read_text().splitlines()
        source = Chosen(source, positions_of(source, lines), f"those of {options.keep}")
    if options.n is not None and options.n > len(source):
        raise ValueError(f"--n {options.n}: there are {len(source)} images")
    if options.n is not None and options.n < len(source):
        source = Chosen(source, range(options.n), f"the first {options.n}")
    return source
