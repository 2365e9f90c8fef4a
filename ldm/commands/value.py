"""`decu value`: what more pictures of a class would bring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ldm.commands.shared import DRAWS_NOTHING, ModelSource, Placement, PosteriorSource
from ldm.options import option
from ldm.settings import Speed

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from ldm.laplace.value import MoreImages
    from ldm.records import Row

# What the columns of value.csv are.
_COLUMNS = (
    "pictures: of the class in the fit; loss: of the class, held-out; fall of loss: over all held-out ones, low and "
    "high its 95 % over them; information: what an output of the class holds of the weights, in nats; own: of the "
    "held-out pictures of the class alone"
)


@dataclass(frozen=True)
class ValueData:
    """Predict what more pictures of each class would bring: fall of the held-out loss, and of what is not known.

    The last layer is refitted in closed form with k more pictures of a class, like the held-out ones of that class;
    the fall is measured on held-out pictures that were not added (five folds). It says for each class:
      fall of the loss          mean over all held-out pictures, with its interval over them
      fall of the information   that an output holds of the weights, in nats: what the posterior leaves open
    and, beside them, what is known without a posterior: the pictures that a class has, and its held-out loss. The
    layers below would learn from more pictures, too: docs/acting.md says how far this foretells trainings.

    Examples:
      decu value --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --k 10 \\
          --out results/value
      decu value --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --k 1 10 100 \\
          --held my.yaml:validation --out results/value

    Writes value.csv (a row for each class and k, the most valuable first), value.npz (loss and falls of every held-out
    picture), value.png, record.json.
    """

    without_effect: ClassVar[Mapping[str, str]] = DRAWS_NOTHING

    source: ModelSource
    posterior: PosteriorSource
    out: str
    """The folder of the output."""
    k: Annotated[tuple[int, ...], option(metavar="K ...")] = (10,)
    """Numbers of further pictures of a class."""
    held: Annotated[tuple[str, ...] | None, option(metavar="WORD ...", default="the validation data of the run")] = None
    """Held-out pictures with classes, as target=.. params.x=.., or CONFIG.yaml:validation."""
    n: Annotated[int | None, option(metavar="N", default="all")] = None
    """The number of held-out pictures, drawn at random."""
    data: Annotated[tuple[str, ...] | None, option(metavar="WORD ...", default="as the posterior's record says")] = None
    """The pictures that the posterior was fitted to, whose classes are counted."""
    batch_size: int = 16
    """Pictures in one pass."""
    seed: int = 0
    """The seed of the held-out pictures' choice, times and noises."""
    overwrite: bool = False
    """Replace outputs that exist."""
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        self.speed.check_exact()
        if not self.k or min(self.k) < 1 or len(set(self.k)) < len(self.k):
            raise ValueError(
                f"--k takes numbers of further pictures from 1, each once, got {' '.join(map(str, self.k)) or 'none'}"
            )

    def run(self) -> list[Row]:
        """Predict, print and write; return the rows of value.csv."""
        import numpy as np

        from ldm.files import write_arrays
        from ldm.laplace.attribution import Refit
        from ldm.laplace.value import value_images
        from ldm.pipelines.attribution import FittedImages
        from ldm.records import refuse_existing, write_record
        from ldm.report.tables import markdown_table, write_csv
        from ldm.report.value import draw_values
        from ldm.training.data_words import read_data_config

        out = Path(self.out)
        refuse_existing([out / "value.csv"], self.overwrite)
        model = self.source.load(None, self.speed, self.place.device)
        posterior = self.posterior.load(model)
        refit = Refit.of(posterior.laplace)
        data = None if self.data is None else read_data_config(self.data)
        fitted = FittedImages.read(self.posterior.posterior, posterior.laplace, data)
        seen = fitted.labels()
        counts = None if seen is None else {label: seen.count(label) for label in set(seen)}
        held, positions, labels = self._read_held(model)
        shared = fitted.count_shared(held, positions)
        if shared == len(positions):
            raise ValueError("all held-out pictures are pictures of the fit: name others with --held")
        observe = self._observer(model, held, positions, posterior.laplace.repeats)
        found = value_images(refit, observe, labels.to(model.device), self.k)
        table = [row for each in found for row in make_rows(each, counts)]
        note = (
            f"{len(positions)} held-out pictures, {posterior.laplace.repeats} noises each; falls are of the mean over "
            "all of them, for k pictures like the held-out ones of the class; last layer alone"
        )
        if shared:
            note += f"; {shared} of the held-out pictures are pictures of the fit, whose loss is too low"
        print(markdown_table(table, 4), note, sep="\n")
        write_csv(out / "value.csv", table, [note, _COLUMNS], overwrite=True)
        arrays = {"positions": np.array(positions), "labels": labels.numpy(), "loss": found[0].loss.cpu().numpy()}
        for each in found:
            arrays |= {f"fall_{each.k}": each.fall.cpu().numpy(), f"learned_{each.k}": each.learned.cpu().numpy()}
        write_arrays(out / "value.npz", arrays, overwrite=True)
        draw_values(table, out / "value.png", note)
        write_record(out / "record.json", self, overwrite=True, note=note)
        return table

    def _read_held(self, model: Any) -> tuple[Dataset, list[int], Any]:
        """Return the held-out data set, positions in it, and the classes at these positions."""
        import torch

        from ldm.data.own import build_dataset
        from ldm.pipelines import chosen_positions
        from ldm.training.data_words import choose_data_config

        remedy = "name held-out pictures with --held"
        held = build_dataset(choose_data_config(self.held, model.config, "validation", remedy, "--held"))
        positions = chosen_positions(len(held), self.n, self.seed, "value")  # type: ignore[arg-type]
        known = getattr(held, "labels", None)
        if known is None:
            raise ValueError("the value of more pictures of a class needs held-out pictures with classes: name others")
        return held, positions, torch.as_tensor(known)[positions]

    def _observer(self, model: Any, held: Dataset, positions: list[int], draws: int) -> Any:
        """Return what gives the rows of the held-out pictures, the same ones at each call."""
        from ldm.pipelines.laplace import observations

        def observe() -> Any:
            given = {"draws": draws, "seed": self.seed, "batch_size": self.batch_size}
            return observations(model.model, held, positions, **given)

        return observe


def make_rows(found: MoreImages, counts: dict[int, int] | None) -> list[Row]:
    """Return a row for each class, the class whose pictures lower the held-out loss most first.

    Args:
        counts: pictures of each class in the fit; None where they have no classes.
    """
    from ldm.stats import mean_interval

    rows: list[Row] = []
    for place, label in enumerate(found.classes):
        own = found.labels == label
        fall = mean_interval(found.fall[place].cpu().numpy())
        rows.append(
            {
                "class": label,
                "k": found.k,
                "pictures": None if counts is None else counts.get(label, 0),
                "loss": float(found.loss[own].mean()),
                "fall of loss": fall.estimate,
                "low": fall.low,
                "high": fall.high,
                "fall of own loss": float(found.fall[place][own].mean()),
                "information": float(found.information[own].mean()),
                "fall of information": float(found.learned[place].mean()),
                "fall of own information": float(found.learned[place][own].mean()),
            }
        )
    return sorted(rows, key=lambda row: -float(row["fall of loss"]))  # type: ignore[arg-type]
