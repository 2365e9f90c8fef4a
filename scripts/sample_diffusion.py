"""Sample a diffusion model: any run directory, or a config and a checkpoint, released ones included.

Examples:
  python scripts/sample_diffusion.py --run logs/2026-01-01T00-00-00_digits --n_per_class 10 --out samples/digits
  python scripts/sample_diffusion.py --base configs/latent-diffusion/cin256-v2.yaml \\
      --ckpt pretrained_models/cin256-v2/model.ckpt --classes 25 187 --n_per_class 8 --steps 250 --scale 1.5 \\
      --out samples/imagenet
  python scripts/sample_diffusion.py --run logs/2026-01-01T00-00-00_digits --classes 3 --interpolate 0 1 --frames 9 \\
      --out samples/between
  python scripts/sample_diffusion.py --base configs/guided-diffusion/imagenet-64.yaml \\
      --ckpt pretrained_models/adm/imagenet-64.pt --sampler DDPM --steps 100 --spacing respace --eps_scaler published \\
      --labels random --n 50000 --batch_size 256 --out samples/imagenet-64
  torchrun --nproc_per_node 8 -- scripts/sample_diffusion.py --run RUN --n 50000 --out samples/many

Image i draws from (seed, i, step) whatever the batch size. A stopped run continues when it is started again; processes
of torchrun or of a SLURM array share the work, and the last to finish writes grid.png, samples.npz (arr_0: images uint8
[N, H, W, C]; arr_1: classes [N]) and record.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.arguments import add_model_arguments, count_or_auto, open_model
from ldm.checkpoint import save_tensors, sha256
from ldm.cli import HelpFormatter, run_script
from ldm.data.npz import ChunkedArray, read_labels, write_npz
from ldm.diffusion.noise import ImageNoise, slerp
from ldm.images import save_image, tile_images, to_uint8
from ldm.jobs import WorkList, shard_from_environment, split_range
from ldm.pipelines import ModelPipeline
from ldm.records import write_record
from ldm.util import atomic_write, generator

# Images in a part, the unit that a process takes and that a file holds.
PART = 8
GRID_SIDE = 10


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--out", required=True, help="folder of the output")
    parser.add_argument("--classes", nargs="+", help="classes, or all (default: all; the first with --interpolate)")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--n", type=int, default=16, help="images in all, the classes in turn")
    amount.add_argument("--n_per_class", type=int, help="images of each class, class by class")
    amount.add_argument(
        "--interpolate",
        type=int,
        nargs=2,
        metavar=("SEED_A", "SEED_B"),
        help="instead: from image 0 of one seed to image 0 of another, along the arc between their first noises",
    )
    labels = "instead of classes in turn: random, or a file with the class of every image (text, .npy, .npz: arr_1)"
    parser.add_argument("--labels", metavar="FILE", help=labels)
    parser.add_argument("--frames", type=int, default=9, help="images of each class with --interpolate")
    parser.add_argument("--batch_size", type=count_or_auto, default="auto", help="images that are sampled together")
    parser.add_argument("--pngs", action="store_true", help="also write pngs/{image}.png")
    parser.add_argument("--latents", action="store_true", help="also write latents.safetensors")
    return parser


@dataclass(frozen=True)
class Plan:
    """What image i is: its class, its noise, and where it starts.

    `labels` is [N], or None for an unconditional model. With `arc` [F, C, H, W], image i starts from noise i mod F of
    it, and all images share the later draws.
    """

    count: int
    labels: Sequence[int] | None
    arc: Tensor | None
    columns: int | None

    def sample(self, pipeline: ModelPipeline, images: Sequence[int]) -> Tensor:
        """Latents [B, c, h, w] of the images numbered `images`."""
        labels = None if self.labels is None else [self.labels[image] for image in images]
        if self.arc is None:
            return pipeline.sample_latents(labels, images)
        return pipeline.sample_latents(labels, [0] * len(images), self.arc[[image % len(self.arc) for image in images]])


def classes_of(options: argparse.Namespace, n_classes: int) -> list[int] | None:
    """The classes to sample; the null class, which is no class of `all`, may be named.

    Raises:
        ValueError: if the model is unconditional and classes are given, or a word is no number.
    """
    words = options.classes
    if not n_classes:
        if words or options.n_per_class:
            raise ValueError("this model is unconditional: give --n, without --classes and --n_per_class")
        return None
    if words is None and options.interpolate:
        return [0]
    if words in (None, ["all"]):
        return list(range(n_classes))
    try:
        return [int(word) for word in words]
    except ValueError as error:
        raise ValueError(f"--classes takes numbers, or all; got {' '.join(words)}") from error


def labels_of(options: argparse.Namespace, classes: Sequence[int] | None) -> list[int] | None:
    """The class of every image under `--labels`; None without it.

    Raises:
        ValueError: if the classes are said in another way, too, or the file has another number of labels than `--n`.
    """
    if options.labels is None:
        return None
    if options.interpolate or options.n_per_class or classes is None:
        raise ValueError("--labels goes with --n and a model of classes, without --n_per_class and --interpolate")
    if options.labels == "random":
        drawn = (generator("labels", options.seed, image) for image in range(options.n))
        return [classes[int(torch.randint(len(classes), (), generator=source))] for source in drawn]
    if options.classes:
        raise ValueError("--labels FILE names the class of every image: leave out --classes")
    found = read_labels(options.labels)
    if len(found) < options.n:
        raise ValueError(f"{options.labels} has {len(found)} labels for the {options.n} images of --n")
    return found[: options.n]


def make_plan(options: argparse.Namespace, pipeline: ModelPipeline) -> Plan:
    """Number the images.

    Raises:
        ValueError: if a count is below 1, or a class is not the model's.
    """
    numbers = {name: getattr(options, name) for name in ("n", "n_per_class", "frames", "batch_size")}
    wrong = {name: value for name, value in numbers.items() if value is not None and value < 1}
    if wrong:
        raise ValueError(f"expected counts of at least 1, got {wrong}")
    classes = classes_of(options, pipeline.n_classes)
    if classes is not None:
        pipeline.labels(classes, null=True)
    each = options.frames if options.interpolate else options.n_per_class
    count = options.n if each is None else each * len(classes or [0])
    labels = labels_of(options, classes)
    if labels is not None:
        pipeline.labels(labels, null=True)
    elif classes is not None:
        labels = [classes[i % len(classes) if each is None else i // each] for i in range(count)]
    arc = None
    if options.interpolate:
        shape = (1, *pipeline.model.latent_shape)
        a, b = (ImageNoise(seed, (0,)).initial(shape)[0] for seed in options.interpolate)
        arc = slerp(a, b, torch.linspace(0, 1, options.frames))
    return Plan(count, labels, arc, each)


def settings_of(options: argparse.Namespace, pipeline: ModelPipeline) -> dict[str, Any]:
    """What the images depend on; the number of images and the batch size may change when a run continues."""
    return {
        **pipeline.describe(),
        "classes": classes_of(options, pipeline.n_classes),
        "n_per_class": options.n_per_class,
        "labels": options.labels and ("random" if options.labels == "random" else sha256(options.labels)),
        "interpolate": options.interpolate,
        "frames": options.frames if options.interpolate else None,
    }


def work_off(work: WorkList, parts: dict[str, range], plan: Plan, pipeline: ModelPipeline, batch_size: int) -> None:
    """Sample the parts of this process's share that have no file."""
    pending = work.pending(parts)
    together = max(1, batch_size // PART)
    with tqdm(total=sum(len(parts[key]) for key in pending), desc="images", unit="image") as progress:
        for first in range(0, len(pending), together):
            keys = pending[first : first + together]
            images = [image for key in keys for image in parts[key]]
            latents, pixels = [], []
            for start in range(0, len(images), batch_size):
                z = plan.sample(pipeline, images[start : start + batch_size])
                latents.append(z.float().cpu().numpy())
                pixels.append(to_uint8(pipeline.decode(z)))
            cuts = np.cumsum([len(parts[key]) for key in keys])[:-1]
            for key, z, x in zip(
                keys, np.split(np.concatenate(latents), cuts), np.split(np.concatenate(pixels), cuts), strict=True
            ):
                with atomic_write(work.folder / f"{key}.npz", overwrite=True) as partial:
                    np.savez(partial, images=x, latents=z)
                work.save(key, {"images": list(parts[key])})
            progress.update(len(images))


def pieces(work: WorkList, parts: dict[str, range], name: str) -> ChunkedArray:
    """An array of all parts in their order, read part by part."""

    def rows() -> Iterator[np.ndarray]:
        for key in parts:
            with np.load(work.folder / f"{key}.npz") as content:
                yield content[name]

    first = next(rows())
    return ChunkedArray((sum(map(len, parts.values())), *first.shape[1:]), first.dtype, rows())


def shown_images(plan: Plan, columns: int | None) -> list[int]:
    """Numbers of the images in the grid: the first ones, or the first `columns` of each class."""
    if columns is None:
        return list(range(min(plan.count, GRID_SIDE**2)))
    rows = min(plan.count // plan.columns, GRID_SIDE)
    return [row * plan.columns + column for row in range(rows) for column in range(columns)]


def write_outputs(out: Path, work: WorkList, parts: dict[str, range], plan: Plan, options: argparse.Namespace) -> None:
    """Join the parts into the grid, the npz file, and what else was asked for."""
    arrays = {"arr_0": pieces(work, parts, "images")}  # [N, H, W, C]
    if plan.labels is not None:
        labels = np.asarray(plan.labels)
        arrays["arr_1"] = ChunkedArray(labels.shape, labels.dtype, [labels])
    write_npz(out / "samples.npz", arrays, overwrite=True)
    columns = None
    if plan.columns:
        columns = plan.columns if plan.arc is not None else min(plan.columns, GRID_SIDE)
    wanted = shown_images(plan, columns)
    found: dict[int, np.ndarray] = {}
    for number, image in enumerate(image for part in pieces(work, parts, "images").rows for image in part):
        if options.pngs:
            save_image(image, out / "pngs" / f"{number:06d}.png", overwrite=True)
        if number in wanted:
            found[number] = image
    shown = np.stack([found[number] for number in wanted])
    save_image(tile_images(shown, columns, zoom=max(1, 64 // shown.shape[1])), out / "grid.png", overwrite=True)
    if options.latents:
        latents = np.concatenate(list(pieces(work, parts, "latents").rows))
        save_tensors({"latents": torch.from_numpy(latents)}, out / "latents.safetensors", overwrite=True)


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    out = Path(options.out)
    if (out / "samples.npz").exists() and not (out / "parts" / "settings.json").exists():
        raise FileExistsError(f"{out} holds samples that this script did not make; choose another --out")
    pipeline = open_model(options)
    plan, settings = make_plan(options, pipeline), settings_of(options, pipeline)
    work, parts = WorkList(out / "parts", settings, shard_from_environment()), split_range(plan.count, PART)
    work_off(work, parts, plan, pipeline, options.batch_size or max(PART, pipeline.images_at_once()))
    if not work.complete(parts):
        print(f"{out}: this process is done; the one that finishes last writes the outputs (or running once more)")
        return out
    write_outputs(out, work, parts, plan, options)
    write_record(out / "record.json", vars(options), overwrite=True, settings=settings)
    print(f"{out}: {plan.count} images in samples.npz, the first in grid.png")
    return out


if __name__ == "__main__":
    run_script(main)
