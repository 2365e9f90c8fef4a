"""Hold propagated variances against sampled weights, and posteriors against bootstraps, the published beside ours."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from ldm.commands.line import run_file
from ldm.commands.shared import ModelSource, Placement, PosteriorSource
from ldm.laplace import LastLayerLaplace, Observation, Refits, bootstrap_refits, load_laplace
from ldm.options import option
from ldm.pipelines import PosteriorPipeline, chosen_positions, observations
from ldm.records import Row, write_record
from ldm.report.tables import markdown_table, write_csv
from ldm.settings import Sampling, Speed
from ldm.training.data_words import read_data_config
from ldm.uncertainty.agreement import agreement
from ldm.uncertainty.propagation import all_directions
from ldm.util import generator, instantiate_from_config

Propagation = Literal["persistent", "tangents", "bayesdiff", "bayesdiff_skip", "path", "published", "published_skip"]
ALL = ("persistent", "tangents", "bayesdiff", "bayesdiff_skip", "path", "published", "published_skip")


def user_seconds() -> float:
    """Return the CPU seconds that this process has spent in user code."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def describe_method(method: str, posterior: PosteriorPipeline) -> str:
    """Name a method with the numbers that decide its cost."""
    draws = {"persistent": f"{posterior.draws} weights", "tangents": f"{posterior.draws} directions"}
    skip = f", every {posterior.every}" if method.endswith("_skip") else ""
    default = "no further evaluations" if method == "path" else f"{posterior.particles} states{skip}"
    return f"{method}, {draws.get(method, default)}"


def find_fit_seed(posterior: str, default: int) -> int:
    """Return the seed that a posterior's fit drew its images and noises from."""
    kept = OmegaConf.load(Path(posterior) / "laplace.yaml").get("record") or {}
    return int(kept.get("seed", default))


@dataclass(frozen=True)
class PosteriorStudy:
    """Hold propagated variances against sampled weights, and posteriors against bootstraps, the published beside ours.

    propagation: --truth weights of the posterior, each held for a whole sample from the same noise, give the true
    variance; every method is compared with it on the same images (ranks of pixels and of images, total), at each of
    --grids steps. calibration: the last layer is refitted to --bootstraps draws of the training images, with as many
    noise draws an image as the posterior's fit had; predictive variances of held-out (x_t, t) are compared with the
    refits' for each curvature, seen at as many visits as there are draws (`benchmarks/width.py` asks for trainings).

    Posteriors are those of `decu laplace fit` (--also sandwich gathers for all curvatures); the one of --published was
    fitted with --published. Any run will do. Tables go to the screen and to --out.

    Examples:
      python benchmarks/bayesdiff.py propagation --run logs/2026-01-01T00-00-00_digits \\
          --posterior results/laplace/digits --published results/laplace/published --out results/propagation
      python benchmarks/bayesdiff.py calibration --run logs/2026-01-01T00-00-00_digits \\
          --posterior results/laplace/digits --published results/laplace/published --out results/calibration
    """

    default_steps: ClassVar[int] = 10

    study: tyro.conf.Positional[Literal["propagation", "calibration"]]
    """Methods against sampled weights, or posteriors against bootstraps."""
    posterior: PosteriorSource
    out: str
    """The folder of the tables."""
    source: ModelSource = ModelSource()
    published: Annotated[str | None, option(metavar="DIR", default="it is left out")] = None
    """A posterior of `decu laplace fit --published`, for the published method."""
    n: int = 20
    """The images of propagation."""
    grids: tuple[int, ...] = (10, 40)
    """The numbers of steps of propagation."""
    truth: tuple[int, ...] = (128,)
    """The sampled weights that the truth of propagation is made of: one number, or one for each of --grids."""
    methods: tuple[Propagation, ...] = ALL
    """What propagation compares."""
    exact: bool = False
    """Compare tangents in every direction of the weights, too."""
    batch_size: int = 20
    """The images of propagation that are sampled together."""
    bootstraps: int = 60
    """The refits of calibration."""
    tests: int = 64
    """The images of the validation split on which calibration compares, one draw of noise each."""
    data: Annotated[tuple[str, ...] | None, option(metavar="WORD ...", default="those of the run's config")] = None
    """The training images of calibration: target=.. params.x=.., or CONFIG.yaml:train."""
    curvatures: tuple[str, ...] = ("sandwich", "full", "kron", "lowrank", "diag", "ef", "isotropic")
    """The curvatures that calibration compares."""
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    @torch.no_grad()
    def run(self) -> list[Row]:
        """Measure, print the table, and write it; return its rows."""
        model = self.source.load(self.sampling, self.speed, self.place.device, self.default_steps)
        posterior = self.posterior.load(model)
        rows = self.propagation(posterior) if self.study == "propagation" else self.calibration(posterior)
        fitted = posterior.laplace
        note = (
            f"{fitted.curvature}, {int(fitted.fitted().images)} images with {fitted.repeats} draws each, sigma "
            f"{fitted.sigma_noise.tolist()}, precision {fitted.prior_precision:.4g}; guidance {model.scale}"
        )
        print(markdown_table(rows, 3), note, sep="\n")
        out = Path(self.out)
        write_csv(out / f"{self.study}.csv", rows, [note], overwrite=True)
        write_record(out / "record.json", self, overwrite=True)
        return rows

    def load_published(self, posterior: PosteriorPipeline) -> LastLayerLaplace:
        """Return the posterior of --published."""
        return load_laplace(str(self.published), posterior.pipeline.model.network)

    # Propagation

    def propagation(self, posterior: PosteriorPipeline) -> list[Row]:
        """Return a row a method and number of steps.

        `growth` is its total over that on the first number of steps, to be held against the truth's.
        """
        for method in [*self.methods, *(["published"] if self.published else [])]:
            posterior.check(method)
        rows: list[Row] = []
        totals: dict[str, float] = {}
        counts = self.truth * (len(self.grids) if len(self.truth) == 1 else 1)
        for steps, count in zip(self.grids, counts, strict=True):
            own = replace(posterior, pipeline=posterior.pipeline.with_(steps=steps), _members=[])
            truth = None
            for name, found, seconds in self.propagate(own, count):
                truth = found if truth is None else truth
                first = totals.setdefault(name, float(found.sum()))
                growth = float(found.sum()) / first
                agreed = agreement(found, truth).row()
                rows.append({"steps": steps, "method": name, **agreed, "growth": growth, "cpu_seconds": seconds})
        return rows

    def propagate(self, posterior: PosteriorPipeline, truth: int) -> Iterator[tuple[str, Tensor, float]]:
        """Yield each method's name, variances and CPU seconds, those of the truth first."""
        laplace, seed = posterior.laplace, self.sampling.seed
        labels = posterior.pipeline.cycle_classes(range(self.n))
        cases = [("truth", "persistent", replace(posterior, draws=truth))]
        if self.exact:
            every = replace(posterior, _members=[all_directions(laplace)])
            cases.append(("tangents, all directions", "tangents", every))
        # Other weights than the truth's, so that they do not share its sampling error.
        drawn = laplace.sample(posterior.draws, generator("other members", seed + 1))
        for method in self.methods:
            cases.append((describe_method(method, posterior), method, replace(posterior, _members=[drawn])))
        if self.published:
            published = replace(posterior, laplace=self.load_published(posterior), _members=[])
            cases.append(("published, its own posterior", "published", published))
        for name, method, own in tqdm(cases, desc=f"{len(posterior.pipeline.times) - 1} steps"):
            began = user_seconds()
            found = self.measure_variances(own, method, labels)
            yield name, found, user_seconds() - began

    def measure_variances(self, posterior: PosteriorPipeline, method: str, labels: list[int] | None) -> Tensor:
        """Return the variances [N, c, h, w] of the last states."""
        found = []
        for start in range(0, self.n, self.batch_size):
            images = list(range(start, min(start + self.batch_size, self.n)))
            own = None if labels is None else [labels[image] for image in images]
            *_, last = posterior.steps(method, own, images)
            found.append(last.var.cpu())
        return torch.cat(found)

    # Calibration

    def calibration(self, posterior: PosteriorPipeline) -> list[Row]:
        """Return a row a posterior: mean predictive variance over that of the refits, and the ranks of all values."""
        laplace = posterior.laplace
        laplace.visits = laplace.repeats  # what the refits have seen of an image
        batches = self.draw_held_out(posterior)
        refits = self.refit(posterior)
        features = [laplace.features(batch.x, batch.t, batch.cond) for batch in batches]
        truth = torch.cat([refits.variance(each) for each in features])
        rows: list[Row] = []
        for name, candidate in self.candidates(posterior):
            found = agreement(torch.cat([candidate.predict(each)[1] for each in features]), truth)
            rows.append({"posterior": name, "ratio": found.total, "rank": found.overall, "pixel": found.pixel})
        return rows

    def draw_held_out(self, posterior: PosteriorPipeline) -> list[Observation]:
        """Return one draw of each of some validation images.

        Raises:
            ValueError: if the run's config has no validation split.
        """
        config = OmegaConf.select(OmegaConf.create(posterior.pipeline.config), "data.params.validation")
        if config is None:
            raise ValueError("calibration needs data.params.validation in the run's config")
        data = instantiate_from_config(OmegaConf.to_container(config, resolve=True))
        seed = self.sampling.seed
        positions = chosen_positions(len(data), min(self.tests, len(data)), seed)
        return list(observations(posterior.pipeline.model, data, positions, draws=1, seed=seed + 1))

    def refit(self, posterior: PosteriorPipeline) -> Refits:
        """Refit the last layer to bootstraps over the training images, with the fit's own draws."""
        pipeline, laplace = posterior.pipeline, posterior.laplace
        if self.data is not None:
            config: Any = read_data_config(self.data)
        else:
            config = OmegaConf.to_container(OmegaConf.create(pipeline.config), resolve=True)["data"]["params"]["train"]
        data = instantiate_from_config(config)
        images, draws = int(laplace.fitted().images), laplace.repeats
        seed = find_fit_seed(self.posterior.posterior, self.sampling.seed)
        positions = chosen_positions(len(data), images, seed)
        rows = observations(pipeline.model, data, positions, draws=draws, seed=seed)
        rows = tqdm(rows, total=-(-images // 16), desc="refits")
        source = generator("bootstrap", self.sampling.seed)
        return bootstrap_refits(laplace, rows, images=images, draws=draws, count=self.bootstraps, source=source)

    def candidates(self, posterior: PosteriorPipeline) -> Iterator[tuple[str, LastLayerLaplace]]:
        """Yield the posteriors to compare, by name."""
        for name in self.curvatures:
            yield f"{name}, sigma from residuals", posterior.laplace.with_curvature(name)
        plain = posterior.laplace.with_curvature("full")
        plain.sigma_noise = 1.0
        plain.prior_precision = 1.0
        yield "full, sigma 1, precision 1", plain
        if self.published:
            yield "published (ef doubled, sigma 1, precision 1)", self.load_published(posterior)


if __name__ == "__main__":
    run_file(PosteriorStudy)
