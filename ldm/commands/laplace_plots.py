"""`decu laplace plots`: every figure of BayesFlow for a flow and its diffusion twin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ldm.commands.shared import ModelSource, Placement, PosteriorSource, VarianceMethod
from ldm.options import option
from ldm.settings import Sampling, Speed

if TYPE_CHECKING:
    from ldm.pipelines import PosteriorPipeline

# Steps where neither the options nor the config say.
DEFAULT_STEPS = {"flow": 10, "diffusion": 50}
StepCount = Annotated[int | None, option(metavar="N", default="the config's")]


@dataclass(frozen=True)
class PlotLaplace:
    """Draw every figure of BayesFlow for a flow and its diffusion twin: curves, grids, maps, both uncertainties.

    Examples:
      bash scripts/bayesflow_plots.sh --data digits                  (trains and fits what is missing, then calls this)
      decu laplace plots --flow logs/2026-01-01T00-00-00_digits-flow \\
          --diffusion logs/2026-01-01T00-10-00_digits-diffusion --flow_posterior posteriors/digits-flow \\
          --diffusion_posterior posteriors/digits-diffusion --out results/bayesflow/digits

    Writes {out}/: by_class.png and by_pixel.png (variance over the trajectory), grid_flow.png and grid_diffusion.png
    (images between their maps), methods.png, two_kinds.png (epistemic and aleatoric of the same images),
    totals_by_steps.png, quality_by_steps.png with quality.csv, record.json. --diffusion may be left out. A latent model
    is shown in its latents.
    """

    acts_with: ClassVar[Mapping[str, str]] = {"diffusion_steps": "diffusion"}

    flow: str
    """The run of the flow."""
    flow_posterior: str
    """Its posterior, from `decu laplace fit`."""
    out: str
    """The folder of the figures."""
    diffusion: Annotated[str | None, option(metavar="DIR", default="the flow alone")] = None
    """The run of the diffusion twin."""
    diffusion_posterior: Annotated[str | None, option(metavar="DIR", default="the flow alone")] = None
    """Its posterior."""
    n: int = 60
    """Images of the curves, the classes in turn."""
    shown: int = 10
    """Images of the maps."""
    method: VarianceMethod = "tangents"
    """The method of curves and grids, see `decu laplace sample --help`."""
    draws: int = 16
    """Tangents, or sampled weights."""
    flow_steps: StepCount = None
    """Steps of the flow."""
    diffusion_steps: StepCount = None
    """Steps of the diffusion."""
    by_steps: Annotated[tuple[int, ...], option(metavar="N ...")] = (2, 5, 10, 20, 40)
    """The numbers of steps of the last two figures."""
    quality_n: int = 20
    """Samples of a class whose recognition is counted."""
    real: int = 10000
    """Real images for the classifier, at most."""
    noise_share: float = 0.5
    """Where on the trajectory the aleatoric map is read."""
    probes: int = 64
    """Hutchinson's probes of the aleatoric map; 0 is exact."""
    seed: int = 42
    """The seed of noises, weights and probes."""
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        if (self.diffusion is None) != (self.diffusion_posterior is None):
            raise ValueError("--diffusion and --diffusion_posterior go together: give both, or neither")

    def run(self) -> Path:
        """Draw all figures, and return their folder."""
        from ldm.records import write_record

        posteriors = {"flow": self._load("flow", self.flow, self.flow_posterior, self.flow_steps)}
        if self.diffusion is not None and self.diffusion_posterior is not None:
            twin = (self.diffusion, self.diffusion_posterior, self.diffusion_steps)
            posteriors["diffusion"] = self._load("diffusion", *twin)
        self._draw_trajectories(posteriors)
        self._draw_maps(posteriors["flow"])
        rows = self._draw_quality(posteriors)
        out = Path(self.out)
        write_record(out / "record.json", self, overwrite=True)
        for row in rows:
            print(f"{row['model']:>10}, {row['steps']:>3} steps: {row['recognised']:.1%} recognised")
        print(*sorted(str(path) for path in out.glob("*.png")), sep="\n")
        return out

    def _load(self, kind: str, run: str, posterior: str, steps: int | None) -> PosteriorPipeline:
        """Load a run with its posterior."""
        sampling = Sampling(steps=steps, seed=self.seed)
        model = ModelSource(run).load(sampling, self.speed, self.place.device, DEFAULT_STEPS[kind])
        return PosteriorSource(posterior, draws=self.draws).load(model)

    def _draw_trajectories(self, posteriors: dict[str, PosteriorPipeline]) -> None:
        """Draw the variance over the trajectory, by class and by pixel, and images between their maps."""
        from tqdm import tqdm

        from ldm.experiments.flow_study import sample_trajectory
        from ldm.report import flow_plots

        out = Path(self.out)
        trajectories = []
        for kind, posterior in tqdm(posteriors.items(), desc="trajectories", unit="model"):
            labels = posterior.pipeline.cycle_classes(range(self.n))
            trajectories.append(sample_trajectory(posterior, kind, self.method, labels, range(self.n)))
            flow_plots.interleaved(trajectories[-1], out / f"grid_{kind}.png", overwrite=True)
        flow_plots.curves_by_class(trajectories, out / "by_class.png", overwrite=True)
        flow_plots.curves_by_pixel(trajectories, out / "by_pixel.png", overwrite=True)

    def _draw_maps(self, flow: PosteriorPipeline) -> None:
        """Draw the flow's maps by method, both kinds of uncertainty, and totals against the number of steps."""
        from ldm.experiments.flow_study import TRUE_MAP, map_aleatoric, map_by_methods, measure_totals
        from ldm.report import flow_plots

        out = Path(self.out)
        images = list(range(self.shown))
        found = map_by_methods(flow, images)
        names = [f"class {label}" for label in flow.pipeline.cycle_classes(images) or ()]
        flow_plots.maps_by_method(found.pictures, found.maps, out / "methods.png", names, overwrite=True)
        both = {
            "epistemic (sampled weights)": found.maps[TRUE_MAP],
            f"aleatoric, noise share {self.noise_share:g}": map_aleatoric(
                flow, images, self.noise_share, self.probes or None
            ),
        }
        flow_plots.maps_by_method(found.pictures, both, out / "two_kinds.png", names, overwrite=True)
        totals = measure_totals(flow, self.by_steps, images)
        flow_plots.against_steps(totals, out / "totals_by_steps.png", "variance of an element", overwrite=True)

    def _draw_quality(self, posteriors: dict[str, PosteriorPipeline]) -> list[dict[str, Any]]:
        """Draw and write how many samples are recognised by the number of steps; return the rows of quality.csv."""
        from tqdm import tqdm

        from ldm.experiments.flow_study import measure_quality
        from ldm.report import flow_plots
        from ldm.report.tables import write_csv

        out = Path(self.out)
        rates = {}
        for kind, posterior in tqdm(posteriors.items(), desc="recognition", unit="model"):
            if posterior.pipeline.n_classes:
                rates[kind] = measure_quality(posterior, self.by_steps, self.quality_n, self.real)
        rows = []
        for kind, rate in rates.items():
            rows += [{"model": kind, "steps": count, "recognised": share} for count, share in rate.items()]
        if rows:
            path = out / "quality_by_steps.png"
            flow_plots.against_steps(rates, path, "samples recognised", log=False, overwrite=True)
            write_csv(out / "quality.csv", rows, overwrite=True)
        return rows
