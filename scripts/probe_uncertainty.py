"""Are the classes that an ensemble is uncertain of those that the trunk's features separate worst? One table, one plot.

Examples:
  python scripts/linear_probe.py --base configs/latent-diffusion/digits.yaml --ckpt logs/pretrained/digits/trunk.ckpt \\
      --grid --t 11 101 301 --layers all --out results/probe_backbone
  python get_unc_synsets.py --path logs/bootstrapped_digits_5 --out results/uncertainty
  python scripts/probe_uncertainty.py --probe results/probe_backbone --uncertainty results/uncertainty --out
  results/joined

Joins errors.csv of linear_probe.py with uncertainty.csv of get_unc_synsets.py by class, and says how the two go
together (Spearman's rank correlation, with the interval of resampled classes). Writes joined.csv and joined.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from ldm.cli import HelpFormatter, run_script
from ldm.records import write_record
from ldm.report.probes import scatter
from ldm.report.tables import markdown_table, read_csv, write_csv
from ldm.stats import spearman
from ldm.util import generator

RESAMPLES = 2000


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--probe", required=True, help="folder that linear_probe.py wrote")
    parser.add_argument("--uncertainty", required=True, help="folder that get_unc_synsets.py wrote")
    parser.add_argument("--features", default="trained", help="which features' errors: trained, untrained or pixels")
    parser.add_argument("--measure", default="mi_mean", help="column of uncertainty.csv")
    parser.add_argument("--out", required=True, help="folder of the output")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def interval(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """95 % of Spearman's correlation over resampled classes; draws whose ranks are all tied are left out."""
    source, found = generator("probe uncertainty"), []
    for _ in range(RESAMPLES):
        chosen = torch.randint(len(x), (len(x),), generator=source).numpy()
        if len(set(x[chosen])) > 1 and len(set(y[chosen])) > 1:
            found.append(spearman(x[chosen], y[chosen]))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def main(argv: list[str] | None = None) -> list[dict]:
    options = get_parser().parse_args(argv)
    out = Path(options.out)
    errors = {
        row["class"]: row["error"]
        for row in read_csv(Path(options.probe) / "errors.csv")
        if row["features"] == options.features
    }
    uncertain = {row["class"]: row for row in read_csv(Path(options.uncertainty) / "uncertainty.csv")}
    shared = sorted(errors.keys() & uncertain.keys())
    if len(shared) < 3:
        raise ValueError(f"only {len(shared)} classes are in both tables ({options.features}): nothing to compare")
    if options.measure not in uncertain[shared[0]]:
        raise ValueError(f"--measure is a column of uncertainty.csv: {', '.join(uncertain[shared[0]])}")
    rows = [
        {
            "class": label, "name": str(uncertain[label]["name"]), "training images": str(uncertain[label]["bin"]),
            "uncertainty": uncertain[label][options.measure], "probe error": errors[label],
        }
        for label in shared
    ]  # fmt: skip
    x, y = (np.asarray([row[key] for row in rows], dtype=float) for key in ("uncertainty", "probe error"))
    low, high = interval(x, y)
    words = f"Spearman {spearman(x, y):.2f} [{low:.2f}, {high:.2f}] over {len(rows)} classes"
    write_csv(out / "joined.csv", rows, [words, f"uncertainty: {options.measure}; probe error: %"], options.overwrite)
    names, bins = [row["name"] for row in rows], [f"{row['training images']} images" for row in rows]
    labels = (f"uncertainty ({options.measure})", "probe error (% of the class's test images)", words)
    scatter(x.tolist(), y.tolist(), names, out / "joined.png", *labels, groups=bins, overwrite=options.overwrite)
    write_record(out / "record.json", vars(options), overwrite=True, result=words)
    print(markdown_table(rows))
    print(words)
    return rows


if __name__ == "__main__":
    run_script(main)
