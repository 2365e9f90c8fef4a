"""Sample a diffusion model with a variance for every pixel, from the Laplace posterior of its last layer.

Examples:
  python scripts/sample_laplace.py --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --n 64 \\
      --out results/samples
  python scripts/sample_laplace.py --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --n 1000 \\
      --method bayesdiff_skip --sampler Heun --steps 20 --out results/skip
  python scripts/sample_laplace.py --run logs/2026-01-01T00-00-00_mnist --posterior results/laplace/mnist --n 64 \\
      --features classifier --weights models/mnist.safetensors --masks threshold saliency \\
      --control_maps energy edges differences seeds --out results/mnist
  torchrun --nproc_per_node 4 -- scripts/sample_laplace.py --run RUN --posterior POSTERIOR --n 5000 --out results/many

Methods (any path, any sampler but for the published ones; images are the plain sampler's):
{methods}

Of a latent model the maps are those of the decoded pixels. --mask names a segmentation model: a function of images
[B, C, H, W] in [-1, 1], giving [B, H, W] in [0, 1] or logits [B, K, H, W] whose class 0 is background (or either as
entry `out`, as torchvision's); or a class or builder of one, with --mask_params. A stopped run continues; processes of
torchrun or of a SLURM array share it, and the last to finish writes

  samples.npz   arr_0 images uint8 [N, H, W, C], arr_1 classes, map [N, H, W], variance and latents [N, c, h, w],
                step_sums [N, S], times [S], step_maps [SHOWN, S, h, w] of the first images
  scores.csv    a row an image
  maps.png, steps.png, ranked.png, record.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from ldm.arguments import add_model_arguments, add_posterior_arguments, open_walks
from ldm.cli import HelpFormatter, run_script
from ldm.evaluation.extractors import make_extractor
from ldm.images import heat_maps, without_outliers
from ldm.jobs import WorkList, shard_from_environment, split_range
from ldm.pipelines import METHODS, PosteriorPipeline
from ldm.records import write_record
from ldm.report.tables import write_csv
from ldm.report.variance import CONTROL_MAPS, Measures, measure_batch, ranked_figure, score_names, step_maps_figure
from ldm.uncertainty.scores import MASKS, model_mask
from ldm.util import atomic_write, get_obj_from_str

__doc__ = __doc__.format(methods="\n".join(f"  {name:15} {what}" for name, what in METHODS.items()))


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_arguments(parser, steps=50)
    add_posterior_arguments(parser)
    add = parser.add_argument
    add("--out", required=True, help="folder of the output")
    add("--method", default="persistent", choices=list(METHODS), help="see above")
    add("--n", type=int, default=16, help="images, the classes in turn")
    add("--classes", type=int, nargs="+", help="classes (default: all)")
    add("--batch_size", type=int, default=16, help="images walked together, and the unit that a file holds")
    add("--masks", nargs="*", default=["threshold"], choices=sorted(MASKS), help="masks that need no weights")
    add("--mask", metavar="TARGET", help="a segmentation model as package.module.name: a function, or what builds one")
    add(
        "--mask_params",
        nargs="+",
        metavar="A=B",
        help="keywords that build the model; a class is built without as well",
    )
    add("--features", help="entropy of features over members: inception, clip, classifier or a dotted target")
    add("--weights", help="the extractor's weights")
    add("--features_params", nargs="+", default=[], metavar="A=B", help="keywords of the extractor")
    add("--control_maps", nargs="*", default=[], choices=CONTROL_MAPS, help="score maps that know no posterior as well")
    add("--seeds", type=int, default=8, help="noises of the control map seeds")
    add("--percentile", type=float, default=95.0, help="of the score percentile")
    add("--patches", type=int, default=4, help="patches a side of the score patch_max")
    add("--rank_by", default="sum", help="score of ranked.png")
    add("--shown", type=int, default=16, help="images in maps.png; steps.png has up to 8")
    return parser


def segmentation_model(target: str, params: dict[str, Any], device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function that a dotted target names, or the module that its class or builder gives for `params`."""
    found = get_obj_from_str(target)
    if params or isinstance(found, type):
        found = found(**params)
    return found.to(device).eval() if isinstance(found, nn.Module) else found


def check(options: argparse.Namespace) -> None:
    """Raise a ValueError for what could only fail late: this takes no model."""
    if options.n < 1 or options.batch_size < 1:
        raise ValueError(f"--n and --batch_size must be at least 1, got {options.n} and {options.batch_size}")
    masks = [*options.masks, *(["model"] if options.mask is not None else [])]
    names = score_names(masks, options.control_maps, options.features is not None)
    if options.rank_by not in names:
        raise ValueError(f"--rank_by must be a score of this run, one of {', '.join(names)}; got '{options.rank_by}'")
    if options.features is not None and options.method != "persistent":
        raise ValueError(f"--features needs sampled weights: --method persistent, got {options.method}")
    if "seeds" in options.control_maps and options.seeds < 2:
        raise ValueError(f"a variance over --seeds needs at least 2, got {options.seeds}")


def measures_of(options: argparse.Namespace, walks: PosteriorPipeline) -> Measures:
    """What is measured of every image."""
    masks = {name: MASKS[name] for name in options.masks}
    if options.mask is not None:
        params = OmegaConf.to_container(OmegaConf.from_dotlist(options.mask_params or []))
        masks["model"] = model_mask(segmentation_model(options.mask, params, walks.pipeline.device))
    extractor = None
    if options.features is not None:
        params = OmegaConf.to_container(OmegaConf.from_dotlist(options.features_params))
        extractor = make_extractor(options.features, options.weights, params, walks.pipeline.model.channels)
        extractor = extractor.to(walks.pipeline.device)
    names = (options.control_maps, options.percentile, options.patches, options.seeds)
    return Measures(masks, extractor, *names, step_maps=True)


def labels_of(options: argparse.Namespace, walks: PosteriorPipeline) -> list[int] | None:
    """The class of each image; None for an unconditional model.

    Raises:
        ValueError: for classes that the model does not have.
    """
    if not walks.pipeline.n_classes:
        if options.classes:
            raise ValueError("this model is unconditional: leave out --classes")
        return None
    classes = options.classes or list(range(walks.pipeline.n_classes))
    walks.pipeline.labels(classes)
    return [classes[image % len(classes)] for image in range(options.n)]


def settings_of(options: argparse.Namespace, walks: PosteriorPipeline) -> dict[str, Any]:
    """What the results depend on; the number of images may change when a run continues."""
    names = (
        "method",
        "classes",
        "batch_size",
        "masks",
        "mask",
        "mask_params",
        "features",
        "weights",
        "control_maps",
        "seeds",
    )
    own = {name: getattr(options, name) for name in (*names, "percentile", "patches")}
    return {**walks.pipeline.describe(), **walks.describe(), **own}


def sample_parts(
    work: WorkList, parts: dict[str, range], walks: PosteriorPipeline, measures: Measures, options: argparse.Namespace
) -> None:
    """Sample the parts of this process's share that have no file."""
    labels = labels_of(options, walks)
    pending = work.pending(parts)
    with tqdm(total=sum(len(parts[key]) for key in pending), desc=options.method, unit="image") as bar:
        for key in pending:
            images = list(parts[key])
            own = None if labels is None else [labels[image] for image in images]
            found = measure_batch(walks, options.method, own, images, measures)
            if images[0] >= options.shown:
                del found["step_maps"]
            with atomic_write(work.folder / f"{key}.npz", overwrite=True) as partial:
                np.savez(partial, **found)
            work.save(key, {"images": images})
            bar.update(len(images))


def joined(work: WorkList, parts: dict[str, range]) -> dict[str, np.ndarray]:
    """The arrays of all parts in their order; `step_maps` of the first images only."""
    arrays: dict[str, list[np.ndarray]] = {}
    for key in parts:
        with np.load(work.folder / f"{key}.npz") as content:
            for name in content:
                arrays.setdefault(name, []).append(content[name])
    return {name: np.concatenate(values) for name, values in arrays.items()}


def write_outputs(
    out: Path, found: dict[str, np.ndarray], walks: PosteriorPipeline, options: argparse.Namespace
) -> None:
    """The files that the script promises."""
    images, labels = found["images"], labels_of(options, walks)
    times = walks.pipeline.times[1:].numpy()
    named = {} if labels is None else {"arr_1": np.asarray(labels)}
    kept = {name: found[name] for name in ("map", "variance", "latents", "step_sums")}
    kept["step_maps"] = found["step_maps"][: options.shown]
    with atomic_write(out / "samples.npz", overwrite=True) as partial:
        np.savez_compressed(partial, arr_0=images, **named, **kept, times=times)
    scores = {name.removeprefix("score_"): value for name, value in found.items() if name.startswith("score_")}
    columns = {"image": range(len(images)), **({} if labels is None else {"class": labels}), **scores}
    rows = [
        {name: float(value[i]) if name in scores else int(value[i]) for name, value in columns.items()}
        for i in range(len(images))
    ]
    comment = f"scores of pixel variances by {options.method}, posterior {options.posterior}"
    write_csv(out / "scores.csv", rows, [comment], overwrite=True)
    shown = slice(0, options.shown)
    titles = None if labels is None else [f"class {label}" for label in labels[shown]]
    maps = found["map"][shown]
    look = {"titles": titles, "limits": without_outliers(maps), "overwrite": True}
    heat_maps(images[shown], maps, out / "maps.png", "variance of the pixel", **look)
    first = min(8, len(found["step_maps"]))
    step_maps_figure(images[:first], found["step_maps"][:first], times, out / "steps.png", overwrite=True)
    ranked_figure(images, scores[options.rank_by], out / "ranked.png", options.rank_by, overwrite=True)


def main(argv: list[str] | None = None) -> Path:
    options = get_parser().parse_args(argv)
    check(options)
    out = Path(options.out)
    if (out / "samples.npz").exists() and not (out / "parts" / "settings.json").exists():
        raise FileExistsError(f"{out} holds samples that this script did not make; choose another --out")
    walks = open_walks(options)
    walks.check(options.method)
    labels_of(options, walks)
    measures = measures_of(options, walks)
    work = WorkList(out / "parts", settings_of(options, walks), shard_from_environment())
    parts = split_range(options.n, options.batch_size)
    sample_parts(work, parts, walks, measures, options)
    if not work.complete(parts):
        print(f"{out}: this process is done; the one that finishes last writes the outputs (or running once more)")
        return out
    found = joined(work, parts)
    write_outputs(out, found, walks, options)
    write_record(out / "record.json", vars(options), overwrite=True, settings=settings_of(options, walks))
    sums = found["score_sum"]
    print(
        f"{out}: {options.n} images, summed variance {sums.mean():.4g} (s.d. {sums.std():.3g}, least {sums.min():.3g})"
    )
    return out


if __name__ == "__main__":
    run_script(main)
