"""`decu uncertainty classes` (get_unc_synsets.py): mutual information per class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ldm.commands.conditions import PictureConditions
from ldm.commands.shared import ClassNames, EnsembleSource, Placement, read_scale
from ldm.options import option
from ldm.settings import Branching, Sampling, Speed

if TYPE_CHECKING:
    from ldm.pipelines import EnsemblePipeline, InformationPlan
    from ldm.uncertainty.results import ClassInformation

Kept = Literal["grid", "tensors"]
# The published scripts draw ten noises and score the first five: their estimator slices the wrong axis.
PUBLISHED_N = 5


@dataclass(frozen=True)
class UncertaintyClasses:
    """Measure epistemic uncertainty per class: mutual information between a sample and the ensemble's members.

    One-step (the default, cheap) is the information of the first step after the branch, given the state z_b that all
    members share. Multi-step (--curve) is that of every later step too, between members that have branched.

    Examples:
      python get_unc_synsets.py --path logs/bootstrapped_digits_5
      python get_unc_synsets.py --path logs/bootstrapped_digits_5 --unc_branch 0 --n 16 --ddim_steps 50
      python get_unc_synsets.py --path logs/bootstrapped_digits_5 --branch_at 0 0.5 0.98 --diversity --curve
      python get_unc_synsets.py --path logs/bootstrapped_digits_5 --noise 0.1
      python get_unc_synsets.py --path logs/bootstrapped_digits_5 --base_comp all --ci_width 0.01 --max_n 200
      torchrun --nproc_per_node 4 -- get_unc_synsets.py --path ENSEMBLE    (classes are shared out, results merged)

    Writes {path}/samps_uncs_branch{u}/: uncertainty.csv (a row a class), summary.json and .md, uncertainty.png and
    distributions.png (per bin), with --curve curve.csv and curve.png, and one file a class under classes_*/, so that a
    run that was stopped continues where it was. With several branch points also {path}/by_branch.csv and its plots.
    """

    default_steps: ClassVar[int] = 200
    default_scale: ClassVar[float] = 5.0

    acts_with: ClassVar[Mapping[str, str]] = {
        "max_n": "ci_width",
        "lpips": "diversity",
    }

    ensemble: EnsembleSource
    classes: ClassNames = ()
    """The classes, by number or by name."""
    quickrun: bool = False
    """Measure eight classes only, spread over the images per class."""
    n: Annotated[int | None, option(metavar="N", default="the config's uncertainty.n, or 10; published: 5")] = None
    """Noises of a class; with --ci_width, noises of one round."""
    ci_width: Annotated[float | None, option(metavar="NATS", default="n noises, whatever the width")] = None
    """Add noises to a class until its 95 % interval is this narrow, end to end."""
    max_n: int = 100
    """Noises of a class at most, with --ci_width."""
    distance: Annotated[
        Literal["wasserstein", "kl", "bhattacharyya"] | None,
        option(metavar="wasserstein|kl|bhattacharyya", default="wasserstein, the published one; kl with --noise"),
    ] = None
    """The distance between members: squared wasserstein; kl for an upper bound of mutual information, bhattacharyya for
    a lower one, which need --ddim_eta > 0 or --noise."""
    distance_scale: Annotated[str | float, option(metavar="sum|mean|FACTOR")] = "sum"
    """Sum squared distances over dimensions (as published), take the mean, or multiply the sum by a factor; the bounds
    are sums."""
    distance_of: Annotated[
        Literal["state", "x0", "image"] | None,
        option(metavar="state|x0|image", default="the config's uncertainty.distance_of, or state; image with --noise"),
    ] = None
    """Compare the states after the step, as published, or the predicted x0, or their images, whatever its length."""
    noise: Annotated[float | None, option(metavar="R", default="what the distance and its scale imply")] = None
    """See predictions through Gaussian noise of R standard deviations of the data, root mean square over an image: nats
    that compare between models, of pixels and of latents; docs/decu.md."""
    data_sd: Annotated[float | None, option(metavar="S", default="that of 64 samples of the base model")] = None
    """With --noise, the standard deviation of the data, of images in [-1, 1] or of latents."""
    curve: Annotated[bool, option("--steps_curve")] = False
    """Measure the mutual information of every step: samples to the end."""
    diversity: bool = False
    """Measure the structural similarity of the members' pictures: samples to the end."""
    lpips: Annotated[str | None, option(metavar="FILE", default="not measured")] = None
    """With --diversity, measure the learned perceptual distance too, with these weights."""
    keep_images: Annotated[tuple[Kept, ...] | None, option(metavar="[grid] [tensors]", default="nothing is kept")] = (
        None
    )
    """Keep a picture of members by noises (grid), latents and distances (tensors) of each class under kept/."""
    classes_at_once: Annotated[int | Literal["auto"], option(metavar="N|auto")] = "auto"
    """Classes in one batch."""
    out: Annotated[str | None, option(metavar="DIR", default="PATH/samps_uncs_branch{{u}}")] = None
    """The folder of the output."""
    overwrite: bool = False
    """Replace outputs that exist."""
    conditions: PictureConditions = PictureConditions()
    branching: Branching = Branching()
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        if self.quickrun and self.classes:
            raise ValueError("--quickrun chooses eight classes itself: leave out --classes, or --quickrun")
        if self.ci_width is not None and self.n is not None and self.n > self.max_n:
            raise ValueError(f"--n {self.n} noises of one round are more than --max_n {self.max_n} allows")
        plain = self.distance in (None, "wasserstein")
        scaled = read_scale(self.distance_scale) not in ("sum", 1)
        if not plain and scaled:
            raise ValueError(
                f"--distance {self.distance} bounds mutual information when it is summed over the dimensions; under "
                f"--distance_scale {self.distance_scale} it bounds nothing: leave the scale at sum"
            )
        if self.noise is None:
            if self.data_sd is not None:
                raise ValueError("--data_sd is the unit of --noise: give both, or neither")
            return
        if not (self.noise > 0 and (self.data_sd is None or self.data_sd > 0)):
            raise ValueError(f"--noise and --data_sd are above 0; got {self.noise:g} and {self.data_sd}")
        if self.distance == "wasserstein" or scaled:
            raise ValueError("--noise takes --distance kl (the default) or bhattacharyya, summed: it is the scale")
        if self.distance_of == "state":
            raise ValueError(
                "--noise sees predicted x0 or their images (--distance_of x0|image): states lie apart with the step's "
                "length"
            )

    def run(self) -> Path:
        """Measure at every branch point, and write the reports; return their folder."""
        from ldm.report.class_report import write_branch_report

        pipeline = self.ensemble.load(self.sampling, self.branching, self.speed, self.place.device)
        pipeline = self.conditions.give(pipeline)
        plan = self._plan(pipeline)
        labels = pipeline.classes.spread(8) if self.quickrun else pipeline.choose_classes(self.classes, None)
        several = len(pipeline.branches) > 1
        tables = {one.branch: self._report(one, labels, plan, several) for one in pipeline.at_branches()}
        folder = Path(self.out or self.ensemble.path)
        rows = {step: table for step, table in tables.items() if table is not None}
        if several and len(rows) == len(tables):
            times = {step: float(pipeline.times[step]) for step in rows}
            described = {**pipeline.describe_sampling(), **plan.describe()}
            comments = [f"{key}: {value}" for key, value in described.items()] + [plan.meaning(pipeline)]
            name = pipeline.ensemble.spec["name"]
            title = f"{name}: {pipeline.members} members; {plan.estimator.distance}, {self.distance_scale}"
            print("\n".join(map(str, write_branch_report(folder, rows, times, comments, title))))
        return folder if self.out or several else folder / f"samps_uncs_branch{pipeline.branch}"

    def _plan(self, pipeline: EnsemblePipeline) -> InformationPlan:
        from ldm.evaluation.diversity import load_lpips
        from ldm.uncertainty.quantities import Estimator

        n = PUBLISHED_N if self.n is None and self.ensemble.published else self.n
        return pipeline.make_plan(
            n,
            self.distance_of,
            self.noise,
            self.data_sd,
            estimator=Estimator(self.distance or "wasserstein", read_scale(self.distance_scale)),
            width=self.ci_width,
            most=self.max_n,
            curve=self.curve,
            diversity=self.diversity,
            lpips=None if self.lpips is None else load_lpips(self.lpips).to(pipeline.device),
            keep=self.keep_images is not None,
        )

    def _report(
        self, pipeline: EnsemblePipeline, labels: list[int], plan: InformationPlan, several: bool
    ) -> list[dict[str, Any]] | None:
        """Measure at one branch point, continue what is there, write the report; None while other processes work."""
        from tqdm import tqdm

        from ldm.jobs import WorkList, shard_from_environment
        from ldm.pipelines.information import measure_classes
        from ldm.records import write_record
        from ldm.report.class_report import write_class_report
        from ldm.uncertainty.results import ClassInformation

        name = f"samps_uncs_branch{pipeline.branch}"
        out = Path(self.out or Path(self.ensemble.path) / name)
        out = out / name if self.out and several else out
        settings = {**pipeline.describe(), **plan.describe()}
        if plan.keep:
            settings["kept"] = sorted(set(self.keep_images or ["grid"]))
        work = WorkList.apart(out / "classes", settings, shard_from_environment())
        keys = [str(label) for label in labels]
        pending = [int(key) for key in work.pending(keys)]
        at_once = None if self.classes_at_once == "auto" else self.classes_at_once
        measured = measure_classes(pipeline, pending, plan, at_once)
        done = len(labels) - len(pending)
        for result in tqdm(measured, desc="classes", unit="class", total=len(labels), initial=done):
            if plan.keep:
                self._keep(result, out / "kept", pipeline)
            work.save(str(result.label), result.to_json())
        if not work.complete(keys):
            print(f"{out}: this process is done; the one that finishes last (or one more call) writes the table")
            return None
        results = [
            work.load_as(str(label), partial(ClassInformation.from_json, label, members=pipeline.members))
            for label in labels
        ]
        rows, words = write_class_report(out, results, pipeline, settings, plan)
        write_record(out / "record.json", self, overwrite=True, settings=settings)
        print(
            "\n".join([f"step {pipeline.branch} of {len(pipeline.times) - 1}:", *words, str(out / "uncertainty.csv")])
        )
        return rows

    def _keep(self, result: ClassInformation, folder: Path, pipeline: EnsemblePipeline) -> None:
        """Write what --keep_images asks for."""
        from ldm.checkpoint import save_tensors
        from ldm.images import labelled_grid

        kinds = self.keep_images or ("grid",)
        assert result.latents is not None and result.distances is not None
        if "tensors" in kinds:
            tensors = {"latents": result.latents, "distances": result.distances}
            save_tensors(tensors, folder / f"class{result.label}.safetensors", overwrite=True)
        if "grid" in kinds:
            columns = [f"{mi:.4f}" for mi in result.mi.tolist()]
            title = f"{pipeline.classes.describe(result.label)}: MI (nats) of each noise".replace("\n", ", ")
            names = pipeline.classes.member_names(result.label)
            picture = folder / f"class{result.label}.png"
            labelled_grid(pipeline.decode(result.latents), picture, names, columns, title, overwrite=True)
