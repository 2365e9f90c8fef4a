"""Go back to an intermediate step and finish again from states around it: other good samples, and repair.

Examples:
  python scripts/resample_laplace.py --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --n 8 \\
      --steps 20 --cut 10 --out results/variants
  python scripts/resample_laplace.py --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --n 200 \\
      --steps 5 --cut 3 --strength 4 --classifier models/digits.safetensors --out results/repair

The walk with its variance stops after --cut steps. From there --variants states per image (the state itself first) are
finished by the plain sampler. A kind: variance draws N(x, var) as BayesDiff; uniform spreads the same total evenly, the
control that shows what the map adds; members takes the sampled states themselves. Writes for every kind of --kinds
variants_KIND.png (a row an image), variants_KIND.npz (arr_0 uint8 [N V, H, W, C], image by image) and a row of
numbers.csv:
  diversity    mean distance between variants, root mean square over pixels in [-1, 1]
  ssim         mean structural similarity of pairs of variants (images of 6 pixels a side or more)
  recognised   share of plain samples, and of variants, that --classifier recognises as their class
  repaired     share of the plain samples not recognised for which some variant is
  broken       share of the variants of recognised samples that are not
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.arguments import add_model_arguments, add_posterior_arguments, open_walks
from ldm.cli import HelpFormatter, run_script
from ldm.diffusion.noise import ImageNoise
from ldm.evaluation.classifier import SmallClassifier, load_classifier, signed
from ldm.evaluation.diversity import pairwise_ssim
from ldm.images import save_image, tile_images, to_uint8
from ldm.pipelines import METHODS, SAMPLED, PosteriorPipeline
from ldm.records import write_record
from ldm.report.tables import markdown_table, write_csv
from ldm.uncertainty.resampling import VARIANT_KINDS, finished, step_at, variants
from ldm.util import atomic_write, derive_seed

SHOWN = 8


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_arguments(parser, steps=20)
    add_posterior_arguments(parser)
    add = parser.add_argument
    add("--out", required=True, help="folder of the output")
    add("--method", default="persistent", choices=list(METHODS), help="see scripts/sample_laplace.py")
    add("--cut", type=int, required=True, help="steps before the walk is left, 1 .. steps - 1")
    add("--kinds", nargs="+", default=["variance", "uniform"], choices=VARIANT_KINDS, help="how states are drawn")
    add("--strength", type=float, default=1.0, help="multiplies the standard deviation")
    add("--variants", type=int, default=8, help="states of each image, the plain one included")
    add("--n", type=int, default=8, help="images, the classes in turn")
    add("--batch_size", type=int, default=50, help="images walked together")
    add("--classifier", help="weights of train_classifier.py, for repair")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def varied(walks: PosteriorPipeline, kind: str, images: list[int], options: argparse.Namespace) -> Tensor:
    """Pictures [V, B, C, H, W] in [-1, 1] of the variants of some images."""
    pipeline, model, labels = walks.pipeline, walks.pipeline.model, walks.pipeline.cycle_classes(images)
    at = step_at(walks.steps(options.method, labels, images), options.cut)
    noise = ImageNoise(derive_seed("variants", options.seed), tuple(images), device=pipeline.device)
    states = variants(at, options.variants, noise, kind, options.strength)
    denoiser = walks.build(labels)(model.network)
    sampler_noise = pipeline.noise(images)
    return pipeline.decode(
        finished(walks.sampler(labels), denoiser, model.schedule, states, pipeline.times, options.cut, sampler_noise)
    )


def numbers_of(pictures: Tensor, classifier: SmallClassifier | None, classes: int) -> dict[str, float]:
    """The numbers of one kind from pictures [V, N, C, H, W]."""
    away = (pictures[:, None] - pictures[None]).square().mean((-3, -2, -1)).sqrt()
    pairs = len(pictures) * (len(pictures) - 1)
    found = {"diversity": float(away.sum((0, 1)).mean() / pairs)}
    if min(pictures.shape[-2:]) >= 6:
        found["ssim"] = float(pairwise_ssim(pictures).mean())
    if classifier is None:
        return found
    labels = torch.arange(pictures.shape[1]) % classes
    bytes_ = torch.from_numpy(to_uint8(pictures.flatten(0, 1))).permute(0, 3, 1, 2)
    right = classifier(signed(bytes_)).argmax(1).unflatten(0, pictures.shape[:2]) == labels
    good, bad = right[1:, right[0]], right[1:, ~right[0]]
    return found | {
        "recognised_plain": float(right[0].double().mean()),
        "recognised_variants": float(right[1:].double().mean()),
        "repaired": float(bad.any(0).double().mean()) if bad.numel() else float("nan"),
        "broken": float((~good).double().mean()) if good.numel() else float("nan"),
    }


def write_pictures(pictures: Tensor, out: Path, kind: str) -> None:
    """Variants [V, N, C, H, W] image by image, as a grid of the first and as numbers."""
    pixels = to_uint8(pictures.transpose(0, 1).flatten(0, 1))
    count = len(pictures)
    canvas = tile_images(pixels[: SHOWN * count], count, zoom=max(1, 48 // pixels.shape[1]))
    save_image(canvas, out / f"variants_{kind}.png", overwrite=True)
    with atomic_write(out / f"variants_{kind}.npz", overwrite=True) as partial:
        np.savez_compressed(partial, arr_0=pixels)


@torch.no_grad()
def main(argv: list[str] | None = None) -> list[dict]:
    options = get_parser().parse_args(argv)
    out = Path(options.out)
    if "members" in options.kinds and (options.method not in SAMPLED or options.draws < options.variants - 1):
        raise ValueError(
            f"--kinds members takes --method {' or '.join(SAMPLED)} and {options.variants - 1} --draws for "
            f"{options.variants} --variants, got {options.method} and {options.draws}"
        )
    if (out / "numbers.csv").exists() and not options.overwrite:
        raise FileExistsError(f"{out} holds variants; choose another folder, or --overwrite")
    walks = open_walks(options)
    walks.check(options.method)
    if not 1 <= options.cut < len(walks.pipeline.times) - 1:
        raise ValueError(f"--cut {options.cut} is not inside the walk: expected 1 .. {len(walks.pipeline.times) - 2}")
    if options.classifier and not walks.pipeline.n_classes:
        raise ValueError("--classifier recognises classes, and this model is unconditional")
    classifier = load_classifier(options.classifier).eval() if options.classifier else None
    rows = []
    for kind in options.kinds:
        starts = tqdm(range(0, options.n, options.batch_size), desc=kind, unit="batch")
        spans = [list(range(start, min(start + options.batch_size, options.n))) for start in starts]
        pictures = torch.cat([varied(walks, kind, span, options) for span in spans], 1)
        rows.append({"kind": kind, **numbers_of(pictures, classifier, walks.pipeline.n_classes)})
        write_pictures(pictures, out, kind)
    note = f"{options.n} images, {options.variants} variants from step {options.cut}, strength {options.strength:g}"
    print(markdown_table(rows, 3), note, sep="\n")
    write_csv(out / "numbers.csv", rows, [note], overwrite=True)
    write_record(out / "record.json", vars(options), overwrite=True)
    return rows


if __name__ == "__main__":
    run_script(main)
