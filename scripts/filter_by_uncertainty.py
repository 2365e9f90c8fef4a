"""Does leaving out the uncertain images make a set better? Every metric of what is kept, beside equal random removal.

Examples:
  python scripts/filter_by_uncertainty.py --samples results/samples --ref results/digits-train --keep 0.8 \\
      --out results/filtered
  python scripts/filter_by_uncertainty.py --samples results/samples --ref results/digits-train --rule sigma \\
      --scores sum patch_max segmentation_threshold --out results/as_published

--samples is a folder of sample_laplace.py (samples.npz and scores.csv), --ref one that `evaluate.py ref` wrote, whose
features are used. Of every score the most certain share --keep stays (or with --rule sigma, as published, what does
not exceed mean + standard deviation). `random` removes as many at random, of each class as many under --per_class,
--random times; scores that leave other numbers have random removals of their own. Writes table.csv: for each score and
metric the value and z, its distance from its random removals in their standard deviations, empty where these do not
differ; and kept/SCORE.txt, positions for `evaluate.py calc --keep`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ldm.cli import HelpFormatter, run_script
from ldm.evaluation.extraction import extract, open_features
from ldm.evaluation.extractors import make_extractor
from ldm.evaluation.filtering import RULES, at_random, certain, comparison, count_kept
from ldm.evaluation.metrics import METRICS, Options, Reference, measure, obstacle
from ldm.jobs import pick_device
from ldm.pipelines.images import load_images
from ldm.records import write_record
from ldm.report.tables import markdown_table, read_csv, write_csv
from ldm.util import atomic_write

# Columns of scores.csv that are no scores.
NAMES = ("image", "class")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--samples", required=True, help="folder that sample_laplace.py wrote")
    add("--ref", required=True, help="folder that evaluate.py ref wrote")
    add("--out", required=True, help="folder of the output")
    add("--keep", type=float, default=0.8, help="share of the images to keep")
    add("--rule", default="share", choices=RULES, help="share, or sigma: up to mean + s.d. (published)")
    add("--per_class", action="store_true", help="within each class, so that no class goes for being uncertain")
    add("--scores", nargs="+", help="columns of scores.csv (default: all)")
    add("--random", type=int, default=5, help="random removals")
    add(
        "--metrics",
        nargs="+",
        default=["fid", "kid", "precision_recall"],
        choices=tuple(METRICS),
        help="what to measure",
    )
    add("--batch_size", type=int, default=100, help="images in one pass of the extractor")
    add("--device", default="auto", help="auto, cpu or cuda[:N]")
    add("--seed", type=int, default=0, help="seed of the random removals")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def features_of(options: argparse.Namespace, reference):
    """Features of the samples, by the reference's own extractor."""
    made = reference.settings["features"]
    extractor = make_extractor(made["extractor"], made.get("weights"), made.get("params"), made.get("channels", 3))
    source = load_images(Path(options.samples) / "samples.npz")
    device = pick_device(options.device)
    return extract(
        source, extractor.to(device), Path(options.out) / "features", batch_size=options.batch_size, device=device
    )


def groups_of(rows: list[dict], per_class: bool) -> list[NDArray[np.int64]]:
    """Positions of the images among which the uncertain ones are sought: all, or those of each class.

    Raises:
        ValueError: for --per_class of samples without classes.
    """
    if not per_class:
        return [np.arange(len(rows))]
    if "class" not in rows[0]:
        raise ValueError("--per_class needs classes, and these samples have none (an unconditional model)")
    classes = np.array([row["class"] for row in rows])
    return [np.flatnonzero(classes == label) for label in np.unique(classes)]


def main(argv: list[str] | None = None) -> list[dict]:
    options = get_parser().parse_args(argv)
    if not 0 < options.keep < 1 or options.random < 2:
        raise ValueError(
            f"--keep lies between 0 and 1 and --random is at least 2, got {options.keep}, {options.random}"
        )
    if (Path(options.out) / "table.csv").exists() and not options.overwrite:
        raise FileExistsError(f"{options.out} holds a table; choose another folder, or --overwrite")
    out, rows = Path(options.out), read_csv(Path(options.samples) / "scores.csv")
    known = [name for name in rows[0] if name not in NAMES]
    wanted = options.scores or known
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise ValueError(f"scores.csv has no {', '.join(unknown)}; it has {', '.join(known)}")
    scores = {name: np.array([float(row[name]) for row in rows]) for name in wanted}
    found = open_features(options.ref)
    samples = features_of(options, found)
    for name in options.metrics:
        if (reason := obstacle(name, found, samples)) is not None:
            raise ValueError(f"{name} cannot be computed: {reason}")
    groups, reference = groups_of(rows, options.per_class), Reference(found)
    kept = {"none": np.arange(len(rows))}
    kept |= {name: certain(values, groups, options.rule, options.keep) for name, values in scores.items()}
    counts = {name: count_kept(positions, groups) for name, positions in kept.items()}
    # Scores that leave equally many are held against the same random removals.
    sizes = [size for size in dict.fromkeys(counts.values()) if sum(size) < len(rows)]
    names = {size: "random" if len(sizes) == 1 else f"random_{place}" for place, size in enumerate(sizes)}
    drawn = {
        (size, number): at_random(size, groups, options.seed, number)
        for size in sizes
        for number in range(options.random)
    }
    files = {**kept, **{f"{names[size]}_{number}": positions for (size, number), positions in drawn.items()}}
    plain, values = Options(resamples=0, fid_resamples=0, kid_subsets=0, splits=0), {}
    for name, positions in tqdm(files.items(), unit="set"):
        measured = measure(options.metrics, reference, samples.rows(positions), plain)
        values[name] = {row.metric: float(row.value) for row in measured}
        with atomic_write(out / "kept" / f"{name}.txt", overwrite=True) as partial:
            partial.write_text("\n".join(map(str, positions.tolist())) + "\n")
    chance = {size: [values[f"{names[size]}_{number}"] for number in range(options.random)] for size in sizes}
    table = comparison(kept, counts, values, chance)
    rule = f"{options.keep:g}" if options.rule == "share" else "what is at most mean + s.d."
    rule += " of each class" * options.per_class
    note = f"kept {rule} of {len(rows)}; z > 0: better than random"
    print(markdown_table(table, 4), note, sep="\n")
    write_csv(out / "table.csv", table, [note], overwrite=True)
    write_record(out / "record.json", vars(options), overwrite=True)
    return table


if __name__ == "__main__":
    run_script(main)
