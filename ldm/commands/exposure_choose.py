"""`decu exposure choose`: lambda of epsilon scaling for a model, a sampler and a number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ldm.commands.shared import ModelSource, Placement
from ldm.options import option
from ldm.settings import Sampling, Speed

if TYPE_CHECKING:
    from ldm.diffusion.epsilon_scaling import EpsilonScaling
    from ldm.experiments.scaling import ScalingStudy
    from ldm.report.plots import Curve


@dataclass(frozen=True)
class ChooseScaling:
    """Choose lambda of epsilon scaling for a model, a sampler and a number of steps; write it for the samplers.

    Examples:
      decu exposure choose --method norms --run logs/2026-01-01T00-00-00_digits --steps 20 --n 2000 \\
          --out results/lambda_norms
      decu exposure choose --method search --metric fid --run logs/2026-01-01T00-00-00_digits --steps 20 --n 2000 \\
          --ref results/digits-train --out results/lambda_search
      decu exposure choose --method search --metric norms --eps_slope 0.001 --steps 20 --n 500 \\
          --run logs/2026-01-01T00-00-00_digits --out results/lambda_norms_b
      decu sample model --run logs/2026-01-01T00-00-00_digits --steps 20 --n 100 \\
          --eps_schedule results/lambda_norms/schedule.yaml --out samples/scaled

    norms: lambda of each step is the mean norm of the network's eps in sampling over that in training, measured again
    under the schedule so far (--rounds), because early corrections change later norms.

    search: the b with the least metric, in values that narrow (--rounds) around the best; b = 1 is always among them.
    Where the best lies at the edge of the values it says so; a wider search with --overwrite measures only what is
    new. The metrics are fid, the Frechet distance of --n samples to --ref, with the same seeds for every b; norms, the
    mean over steps of the squared relative difference of corrected norms from training's; and states, the mean over
    steps of the squared distance of x_t in sampling from the true x_t, which needs no reference and no features.

    With --eps_slope k the search is of b in k t + b. Writes schedule.yaml, choice.csv, choice.png and record.json;
    what was measured is kept below parts/, and a choice that was stopped continues. One process chooses.
    """

    default_steps: ClassVar[int] = 20
    default_scale: ClassVar[float] = 1.0

    acts_with: ClassVar[Mapping[str, str]] = {
        "metric": "method=search",
        "low": "method=search",
        "high": "method=search",
        "points": "method=search",
        "ref": "metric=fid",
    }

    source: ModelSource
    out: str
    """The folder of the output."""
    method: Literal["norms", "search"] = "norms"
    """Choose lambda step by step from norms, or search for b."""
    metric: Literal["fid", "norms", "states"] = "fid"
    """What the search makes small."""
    n: int = 1000
    """Images of each measurement."""
    rounds: int = 3
    """Rounds of the estimate, or of the search."""
    low: float = 0.99
    """The least b of the search."""
    high: float = 1.04
    """The largest b of the search."""
    points: int = 6
    """Values of b in each round of the search."""
    ref: Annotated[str | None, option(metavar="DIR", default="none; --metric fid needs it")] = None
    """The reference of --metric fid: a folder that `decu evaluate reference` wrote."""
    split: str = "train"
    """The data set data.params.SPLIT of the config, for norms and states."""
    batch_size: int = 100
    """Images in one pass."""
    overwrite: bool = False
    """Replace a schedule that exists."""
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        scaling = self.sampling.scaling
        if scaling.b is not None or scaling.schedule is not None:
            raise ValueError("this command chooses lambda: leave out --eps_scaler and --eps_schedule")
        if self.method == "norms" and (scaling.slope is not None or scaling.window is not None):
            raise ValueError("--method norms finds lambda step by step: leave out --eps_slope and --eps_window")
        if (self.method, self.metric) == ("search", "fid") and self.ref is None:
            raise ValueError("--metric fid needs --ref: a folder that `decu evaluate reference` wrote")

    def run(self) -> EpsilonScaling:
        """Choose, write the schedule, and return it."""
        from ldm.diffusion.epsilon_scaling import save_scaling
        from ldm.experiments.scaling import ScalingStudy
        from ldm.records import refuse_existing, write_record

        out = Path(self.out)
        schedule = out / "schedule.yaml"
        refuse_existing([schedule], self.overwrite)
        pipeline = self.source.load(self.sampling, self.speed, self.place.device, self.default_steps)
        study = ScalingStudy(pipeline, out, self.n, self.batch_size, self.split)
        scaling = self._estimate(study) if self.method == "norms" else self._search(study)
        save_scaling(scaling, schedule, self.overwrite)
        settings = pipeline.describe()
        write_record(out / "record.json", self, overwrite=True, scaling=scaling.as_dict(), settings=settings)
        chosen = f"a table of {len(scaling.table)} levels" if scaling.table else f"b = {scaling.b:g}"
        print(f"{schedule}: {chosen}")
        return scaling

    def _estimate(self, study: ScalingStudy) -> EpsilonScaling:
        from ldm.experiments.scaling import estimate_scaling
        from ldm.report.plots import Curve

        found = estimate_scaling(study, self.rounds, self.sampling.scaling.direction or "full")
        levels = [row["minus_log_snr"] for row in found.rows]
        curves = {
            f"round {number}": Curve(levels, [row[f"lambda_{number}"] for row in found.rows])
            for number in range(self.rounds)
        }
        self._write_choice(found.rows, curves, "-log SNR = 2 ln(sigma / alpha)", "lambda")
        return found.scaling

    def _search(self, study: ScalingStudy) -> EpsilonScaling:
        from ldm.evaluation.scaling_choice import search_b
        from ldm.experiments.scaling import frechet_score, norm_score, state_score
        from ldm.report.plots import Curve

        base = study.pipeline.wrappers.scaling
        if self.metric == "fid":
            score = frechet_score(study, base, str(self.ref))
        else:
            score = norm_score(study, base) if self.metric == "norms" else state_score(study, base)
        found = search_b(score, self.low, self.high, self.points, self.rounds)
        rows = [{"b": b, self.metric: value} for b, value in found.tried.items()]
        name: str = self.metric
        curves = {name: Curve(list(found.tried), list(found.tried.values()))}
        self._write_choice(rows, curves, "b", name)
        if found.at_edge:
            print(f"the best b is the {found.at_edge} that was tried: widen --low or --high, and add --overwrite")
        return replace(base, b=found.best)

    def _write_choice(self, rows: list[dict[str, Any]], curves: Mapping[str, Curve], x: str, y: str) -> None:
        """Write the table of the choice and its figure; print the table."""
        from ldm.report.plots import curve_plot
        from ldm.report.tables import markdown_table, write_csv

        out = Path(self.out)
        write_csv(out / "choice.csv", rows, overwrite=True)
        curve_plot(curves, out / "choice.png", x, y, invert_x="SNR" in x, overwrite=True)
        print(markdown_table(rows, 5))
