"""`decu uncertainty toy`: epistemic uncertainty where it is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.experiments.toy_settings import ToySettings

if TYPE_CHECKING:
    from ldm.experiments.toy_study import Growth, Toy
    from ldm.records import Row


@dataclass(frozen=True)
class UncertaintyToy:
    """Measure epistemic uncertainty where it is known: Gaussian classes in the plane, exact posteriors, no training.

    Every class is seen at 0 to 1,000 observations. At states that the sampler visits, the true mutual information of
    the branched step is compared with what ensembles say: PaiDE with KL, Bhattacharyya and squared W2 distances.

    Examples:
      decu uncertainty toy --out results/toy
      decu uncertainty toy --out results/toy_m10 --members 10 --branch_t 500 --seed 1

    Writes {out}/toy.png, toy.csv (a row a state) and record.json, and prints rank correlations.
    """

    out: str
    """The folder of the picture, the table and the record."""
    overwrite: bool = False
    """Replace outputs that exist."""
    settings: ToySettings = field(default_factory=ToySettings)

    def run(self) -> Path:
        """Measure, and write the table and the picture; return their folder."""
        import numpy as np
        from tqdm import tqdm

        from ldm.experiments.toy_study import Toy, measure_growth, measure_states, share_bracketed, summarise_estimates
        from ldm.records import write_record
        from ldm.report.tables import write_csv
        from ldm.report.toy import describe_estimates, describe_toy

        toy = Toy(self.settings)
        out = Path(self.out)
        taken = [name for name in ("toy.png", "toy.csv", "record.json") if (out / name).exists()]
        if taken and not self.overwrite:
            raise FileExistsError(f"{out} holds {', '.join(taken)}: choose another --out, or pass --overwrite")
        counts = sorted(set(self.settings.observations))
        pairs = [(label, count) for count in counts for label in range(self.settings.classes)]
        rows = []
        for label, count in tqdm(pairs, desc="classes x observations"):
            rows += measure_states(toy, label, count)
        growths = {f"{count} observations": measure_growth(toy, count) for count in self.settings.size_observations}
        figures = summarise_estimates(rows)
        share = share_bracketed(rows)
        found = describe_estimates(figures, share, len(rows))
        write_csv(out / "toy.csv", rows, [*describe_toy(toy), *found], self.overwrite)
        best = figures[self._estimate]["spearman"]
        self._draw(toy, rows, growths, f"every state: Spearman {best:.2f}")
        sizes = {
            name: {"truth": one.truth, "information": np.asarray(one.information).tolist()}
            for name, one in growths.items()
        }
        record = {"estimates": figures, "bracketed": share, "sizes": sizes}
        write_record(out / "record.json", self, self.overwrite, **record)
        print("\n".join(found))
        return out

    @property
    def _estimate(self) -> str:
        """The words of the estimate that the maps show."""
        from ldm.experiments.toy_study import ESTIMATES

        return ESTIMATES[self.settings.map_distance]

    def _draw(self, toy: Toy, rows: list[Row], growths: dict[str, Growth], title: str) -> None:
        """Draw the maps, the curves and the scatter."""
        from ldm.experiments.toy_study import map_plane
        from ldm.report.toy import Scatter, estimate_curves, toy_figure

        settings = self.settings
        truth = [row["truth"] for row in rows]
        guess = [row[settings.map_distance] for row in rows]
        observations = [row["observations"] for row in rows]
        toy_figure(
            [map_plane(toy, count) for count in settings.map_observations],
            estimate_curves(rows, sorted(set(settings.observations))),
            growths,
            Scatter(truth, guess, observations, title),
            Path(self.out) / "toy.png",
            settings.members,
            f"{self._estimate}\nbootstrap, {settings.members} members",
            self.overwrite,
        )
