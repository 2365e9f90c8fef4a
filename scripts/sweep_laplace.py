"""Do maps of uncertainty react to sigma_noise and prior_precision? The same images under a grid of both.

Examples:
  python scripts/sweep_laplace.py --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --n 16 \\
      --out results/sweep
  python scripts/sweep_laplace.py --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --n 16 \\
      --method persistent --draws 8 --out results/sweep_persistent

With A the data's sum of a a^T, the posterior covariance is S = (A / sigma^2 + precision I)^-1, so a^T S a
  grows like sigma^2 and forgets the prior where the data decide (small precision, small sigma),
  falls like 1 / precision and forgets sigma where the prior does, and exactly
  (10 sigma, precision / 100) gives 100 times the variance of (sigma, precision), whatever the data.
Writes sweep.csv (a row a setting: total, its ratio to the first setting's, how the map's ranks agree with it, slopes of
ln total in ln sigma and ln precision), sweep.png (image --image on one logarithmic scale), sweep.npz and record.json.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.arguments import add_model_arguments, add_posterior_arguments, open_walks
from ldm.cli import HelpFormatter, run_script
from ldm.jobs import split_range
from ldm.pipelines import METHODS, PosteriorPipeline
from ldm.records import write_record
from ldm.report.tables import markdown_table, write_csv
from ldm.report.variance import sweep_figure
from ldm.uncertainty.agreement import agreement
from ldm.util import atomic_write

SIGMAS, PRECISIONS = (0.01, 0.03, 0.1, 0.3, 1.0), (0.1, 1.0, 10.0, 100.0, 1000.0)
Setting = tuple[float, float]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_arguments(parser, steps=10)
    add_posterior_arguments(parser)
    parser.add_argument("--out", required=True, help="folder of the output")
    parser.add_argument("--method", default="path", choices=list(METHODS), help="see scripts/sample_laplace.py")
    parser.add_argument("--n", type=int, default=16, help="images, at least 2")
    parser.add_argument("--batch_size", type=int, default=16, help="images walked together")
    parser.add_argument("--image", type=int, default=0, help="the image of sweep.png")
    parser.add_argument("--sigmas", type=float, nargs="+", default=list(SIGMAS), help="values of sigma_noise")
    parser.add_argument("--precisions", type=float, nargs="+", default=list(PRECISIONS), help="of prior_precision")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def maps_at(walks: PosteriorPipeline, setting: Setting, options: argparse.Namespace) -> Tensor:
    """Pixel variances [N, C, H, W] under one setting; draws of the weights share their noise."""
    laplace = walks.laplace.with_curvature(walks.laplace.curvature)
    laplace.sigma_noise, laplace.prior_precision = setting
    own, maps = replace(walks, laplace=laplace, _members=[]), []
    for part in split_range(options.n, options.batch_size).values():
        *_, last = own.steps(options.method, walks.pipeline.cycle_classes(part), list(part))
        maps.append(own.pixel_variance(last, list(part)).cpu())
    return torch.cat(maps)


def slopes(totals: dict[Setting, float], options: argparse.Namespace, setting: Setting) -> dict[str, float | None]:
    """d ln total / d ln sigma and / d ln precision towards the next larger value; None at the last."""
    found = {}
    for axis, values in enumerate((options.sigmas, options.precisions)):
        place = values.index(setting[axis])
        name = ("slope_sigma", "slope_precision")[axis]
        if place + 1 == len(values):
            found[name] = None
            continue
        other = list(setting)
        other[axis] = values[place + 1]
        found[name] = float(np.log(totals[tuple(other)] / totals[setting]) / np.log(other[axis] / setting[axis]))
    return found


def scaling_error(totals: dict[Setting, float]) -> tuple[float, int]:
    """Largest relative departure from V(10 sigma, precision / 100) = 100 V(sigma, precision), and how many pairs."""
    errors = []
    for (a, b), (c, d) in itertools.product(totals, repeat=2):
        if np.isclose(c, 10 * a) and np.isclose(d, b / 100):
            errors.append(abs(totals[c, d] / (100 * totals[a, b]) - 1))
    return max(errors, default=float("nan")), len(errors)


@torch.no_grad()
def main(argv: list[str] | None = None) -> list[dict]:
    options = get_parser().parse_args(argv)
    out = Path(options.out)
    if (out / "sweep.csv").exists() and not options.overwrite:
        raise FileExistsError(f"{out} holds a sweep; choose another folder, or --overwrite")
    if options.n < 2 or not 0 <= options.image < options.n:
        raise ValueError(f"--n is at least 2 and --image below it, got {options.n} and {options.image}")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {options.batch_size}")
    options.sigmas, options.precisions = sorted(options.sigmas), sorted(options.precisions)
    walks = open_walks(options)
    walks.check(options.method)
    settings = list(itertools.product(options.sigmas, options.precisions))
    maps = {setting: maps_at(walks, setting, options) for setting in tqdm(settings, unit="setting")}
    totals = {setting: float(each.double().sum()) for setting, each in maps.items()}
    rows = []
    for setting in settings:
        agrees = agreement(maps[setting], maps[settings[0]])
        rows.append(
            {
                "sigma_noise": setting[0],
                "prior_precision": setting[1],
                "total": totals[setting] / options.n,
                "ratio": totals[setting] / totals[settings[0]],
                "pixel_rank": agrees.pixel,
                "image_rank": agrees.image,
                **slopes(totals, options, setting),
            }
        )
    error, pairs = scaling_error(totals)
    note = f"{options.method}, {options.n} images"
    if pairs:
        note += f"; scaling (10 sigma, precision / 100): {pairs} pairs within {error:.2g}"
    print(markdown_table(rows, 3), note, sep="\n")
    write_csv(out / "sweep.csv", rows, [note], overwrite=True)
    shape = (len(options.sigmas), len(options.precisions))
    stacked = torch.stack([maps[setting].mean(1) for setting in settings]).unflatten(0, shape).float().numpy()
    names = [[f"{value:g}" for value in values] for values in (options.sigmas, options.precisions)]
    sweep_figure(stacked[:, :, options.image], *names, out / "sweep.png", "sigma_noise", "prior_precision", True)
    with atomic_write(out / "sweep.npz", overwrite=True) as partial:
        np.savez_compressed(partial, maps=stacked, sigmas=options.sigmas, precisions=options.precisions)
    write_record(out / "record.json", vars(options), overwrite=True)
    return rows


if __name__ == "__main__":
    run_script(main)
