"""`decu features uncertainty`: classes that an ensemble is uncertain of, beside those that features separate worst."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class FeaturesUncertainty:
    """Compare the classes that an ensemble is uncertain of with those that the backbone's features separate worst.

    Examples:
      decu features probe --base configs/latent-diffusion/digits.yaml --ckpt logs/pretrained/digits/trunk.ckpt \\
          --grid --t 11 101 301 --layers all --out results/probe_backbone
      decu uncertainty classes --path logs/bootstrapped_digits_5 --out results/uncertainty
      decu features uncertainty --probe results/probe_backbone --uncertainty results/uncertainty --out results/joined

    Joins errors.csv of the first with uncertainty.csv of the second by class, and says how the two go together
    (Spearman's rank correlation, with the interval of resampled classes). Writes joined.csv and joined.png.
    """

    probe: str
    """The folder that `decu features probe` wrote."""
    uncertainty: str
    """The folder that `decu uncertainty classes` wrote."""
    out: str
    """The folder of the output."""
    features: Literal["trained", "untrained", "pixels"] = "trained"
    """Which features' errors."""
    measure: str = "mi_mean"
    """The column of uncertainty.csv."""
    overwrite: bool = False
    """Replace outputs that exist."""

    def run(self) -> list[dict[str, Any]]:
        """Join, write and print; return a row a class."""
        from ldm.experiments.class_agreement import join_by_class
        from ldm.records import write_record
        from ldm.report.probes import scatter
        from ldm.report.tables import check_numbers, markdown_table, read_csv, write_csv

        out = Path(self.out)
        errors = read_csv(Path(self.probe) / "errors.csv", ("class", "features", "error"))
        uncertain = read_csv(Path(self.uncertainty) / "uncertainty.csv", ("class", "name", "bin"))
        check_numbers(Path(self.probe) / "errors.csv", errors, ("error",), nan=True)
        check_numbers(Path(self.uncertainty) / "uncertainty.csv", uncertain, {self.measure} & set(uncertain[0]))
        found = join_by_class(errors, uncertain, self.features, self.measure)
        rows = found.rows
        words = found.describe()
        comments = [words, f"uncertainty: {self.measure}; probe error: %"]
        write_csv(out / "joined.csv", rows, comments, self.overwrite)
        x, y = ([float(row[key]) for row in rows] for key in ("uncertainty", "probe error"))
        names = [row["name"] for row in rows]
        bins = [f"{row['training images']} images" for row in rows]
        labels = (f"uncertainty ({self.measure})", "probe error (% of the class's test images)", words)
        scatter(x, y, names, out / "joined.png", *labels, groups=bins, overwrite=self.overwrite)
        write_record(out / "record.json", self, overwrite=True, result=words)
        print(markdown_table(rows))
        print(words)
        return rows
