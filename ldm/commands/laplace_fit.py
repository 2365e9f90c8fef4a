"""`decu laplace fit`: the Laplace posterior of a diffusion model's last layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ldm.commands.shared import ModelSource, Placement
from ldm.options import option
from ldm.settings import Speed

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from ldm.laplace import LastLayerLaplace
    from ldm.pipelines import ModelPipeline
    from ldm.pipelines.fitting import LaplacePlan

Curvature = Literal["diag", "ef", "full", "isotropic", "kron", "lowrank", "sandwich"]
# What BayesDiff hard-codes (Kou et al. 2024): doubled empirical Fisher, one draw an image, nothing tuned.
PUBLISHED_FIT: dict[str, Any] = {
    "curvature": "ef",
    "sigma_noise": 1.0,
    "prior_precision": 1.0,
    "draws": 1,
    "visits": 1.0,
}

# What a fit takes and a merge does not.
FITTED_ONLY = ("data", "split", "n", "data_size", "draws", "also", "bins", "batch_size", "patches")


def refuse_beside_merge(given: FitLaplace) -> None:
    """Refuse with --merge what only a fit takes.

    Raises:
        ValueError: naming the options.
    """
    fresh = FitLaplace.__dataclass_fields__
    unused = [name for name in FITTED_ONLY if getattr(given, name) != fresh[name].default]
    if unused:
        raise ValueError(f"--merge joins posteriors that are fitted: leave out --{' --'.join(unused)}")


@dataclass(frozen=True)
class FitLaplace:
    """Fit the Laplace posterior of a diffusion model's last layer: what its weights could as well have been.

    Any run will do: latent, pixel, flow, conditional or not. The images are those of the run's config
    (data.params.train), or of --data. Each gives --draws rows (x_t, t, condition), drawn as in training; those seen
    stand for the whole data set, and each image counts as often as the training saw it (--visits): --draws decides how
    well the sums are known, and not how wide the posterior is. sigma_noise is the maximum likelihood of the residuals
    and prior_precision that of the greatest evidence, unless given.

    A stopped fit continues; processes of torchrun or of a SLURM array share it, and the last to finish writes the
    posterior. Parts lie in a folder named by what they were fitted to: a fit with other settings starts over, one with
    another sigma_noise, prior_precision, temperature or visits takes them as they are.

    Examples:
      decu laplace fit --run logs/2026-01-01T00-00-00_digits --also sandwich --out results/laplace/digits
      decu laplace fit --run logs/2026-01-01T00-00-00_digits --draws 8 --bins 4 --out results/laplace/levels
      decu laplace fit --run logs/2026-01-01T00-00-00_digits --temperature sandwich --out results/laplace/tempered
      decu laplace fit --base configs/latent-diffusion/cin256-v2.yaml \\
          --ckpt pretrained_models/cin256-v2/model.ckpt --n 2000 --draws 1 --out results/laplace/imagenet \\
          --data target=ldm.data.imagenet.ImageNetTrain params.data_root=DIR
      decu laplace fit --run logs/2026-01-01T00-00-00_digits --published --out results/laplace/as_published
      decu laplace fit --run RUN --merge results/laplace/a results/laplace/b --out results/laplace/both
      torchrun --nproc_per_node 4 -m ldm laplace fit --run RUN --out results/laplace/digits     (the images in shares)

    Writes {out}/laplace.safetensors, laplace.yaml and record.json.
    """

    acts_with: ClassVar[Mapping[str, str]] = {"validation": "prior_precision=gridsearch"}

    source: ModelSource
    out: str
    """The folder of the posterior."""
    data: Annotated[tuple[str, ...] | None, option(metavar="WORD ...", default="the data of the run")] = None
    """The images, as target=.. params.x=.., or as CONFIG.yaml:train."""
    split: str = "train"
    """The split of the run's data to fit to."""
    n: Annotated[int | None, option(metavar="N", default="all")] = None
    """The number of images to fit to, drawn at random."""
    data_size: Annotated[int | None, option(metavar="N", default="the data set's; published: those seen")] = None
    """The number of images that those seen stand for."""
    draws: int = 4
    """Noise draws of each image; the sandwich takes two at least."""
    visits: Annotated[float | None, option(metavar="R", default="as the checkpoint says, or 1; published: 1")] = None
    """How often the training saw each image, at least 1: what an image counts as."""
    curvature: Curvature = "full"
    """How the curvature is approximated; see docs/bayesdiff.md."""
    also: Annotated[tuple[Curvature, ...], option(metavar="NAME ...", default="none")] = ()
    """Gather what these curvatures need as well."""
    rank: int = 128
    """Eigenvectors of the curvature lowrank."""
    layer: Annotated[str | None, option(metavar="NAME", default="found")] = None
    """The last layer by its name."""
    sigma_noise: Annotated[float | Literal["ml"], option(metavar="S|ml")] = "ml"
    """The standard deviation of the observations, or ml: of the residuals, by noise level."""
    prior_precision: Annotated[float | Literal["marglik", "gridsearch"], option(metavar="P|marglik|gridsearch")] = (
        "marglik"
    )
    """The precision of the prior, or how it is found: by the evidence, or by held-out likelihood."""
    validation: str = "validation"
    """The split that gridsearch holds out."""
    temperature: Annotated[float | Literal["sandwich"], option(metavar="T|sandwich")] = 1.0
    """What divides the precision of the likelihood, or sandwich: so that the variance is that one's on average."""
    bins: int = 1
    """Noise levels with a sigma of their own, equally likely in training."""
    published: bool = False
    """Fit as BayesDiff does: the doubled ef, sigma and precision 1, one draw, no scaling to the data set."""
    merge: Annotated[tuple[str, ...] | None, option(metavar="FOLDER ...", default="a fit")] = None
    """Join posteriors of the same model in place of fitting one."""
    batch_size: int = 16
    """Images in one pass, --draws rows each."""
    patches: int = 4
    """Rows whose patches are held at once."""
    seed: int = 42
    """The seed of the images and of their draws."""
    overwrite: bool = False
    """Replace a posterior, and remove the parts of fits with other settings."""
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        self.speed.check_exact()
        if self.published:
            defaults = {one.name: one.default for one in fields(self)}
            for name, value in PUBLISHED_FIT.items():
                given = getattr(self, name)
                if given not in (value, defaults[name]):
                    raise ValueError(f"--published sets --{name} to {value}: leave out --{name} {given}")
                object.__setattr__(self, name, value)
        if self.rank != 128 and "lowrank" not in (self.curvature, *self.also):
            raise ValueError(f"--rank {self.rank} is of the curvature lowrank: add it to --curvature or --also")
        if self.curvature in self.also or len(set(self.also)) < len(self.also):
            raise ValueError(
                f"--also names curvatures beside --curvature {self.curvature}, each once; got {' '.join(self.also)}"
            )
        if self.merge:
            refuse_beside_merge(self)
        if self.curvature == "isotropic" and self.prior_precision == "marglik":
            raise ValueError("isotropic curvature holds no data, so no evidence: give --prior_precision, or gridsearch")
        if self.temperature == "sandwich" and (self.curvature == "sandwich" or self.bins > 1):
            raise ValueError(
                "--temperature sandwich widens another curvature to the sandwich, which is of one noise level: it goes "
                f"neither with --curvature sandwich nor with --bins; got {self.curvature}, {self.bins}"
            )

    def run(self) -> Path:
        """Fit or join, tune, and write the posterior; return its folder."""
        from ldm.laplace import save_laplace
        from ldm.pipelines.fitting import describe_fit
        from ldm.records import write_record

        out = Path(self.out)
        if (out / "laplace.yaml").exists() and not self.overwrite:
            raise FileExistsError(f"{out} holds a posterior; choose another folder, or --overwrite")
        pipeline = self.source.load(speed=self.speed, device=self.place.device)
        plan = self._plan(pipeline)
        self._check(pipeline, plan)
        config: Any
        if self.merge:
            laplace, config = self._merged(pipeline), {"merged": list(self.merge)}
        else:
            data, config = self._data(pipeline, self.split)
            fitted = self._fit(pipeline, plan, data, config)
            if fitted is None:
                print(
                    f"{out}: this process is done; the one that finishes last (or one more call) writes the posterior"
                )
                return out
            laplace = fitted
        self._tune(pipeline, laplace)
        found = describe_fit(laplace)
        source = {
            "checkpoint": str(pipeline.checkpoint),
            **pipeline.describe(),
            "data": config,
            "seed": self.seed,
        }
        # The posterior's own record is written last: it is the sign that all is there.
        write_record(out / "record.json", self, overwrite=True, found=found)
        save_laplace(laplace, out, source, self.overwrite)
        for name, value in found.items():
            print(f"{name:>24}  {value}")
        return out

    def _plan(self, pipeline: ModelPipeline) -> LaplacePlan:
        from ldm.pipelines.fitting import LaplacePlan
        from ldm.pipelines.laplace import find_visits

        visits = self.visits
        if visits is None and not self.merge:
            visits = find_visits(pipeline.checkpoint)
        if visits is None and not self.merge:
            print(f"{pipeline.checkpoint} does not say how often its training saw an image: 1 is taken; see --visits")
        tuned = self.temperature == "sandwich"
        return LaplacePlan(
            curvature=self.curvature,
            also=(*self.also, "sandwich") if tuned and "sandwich" not in self.also else self.also,
            visits=visits or 1.0,
            layer=self.layer,
            rank=self.rank,
            published_ef=self.published,
            temperature=1.0 if isinstance(self.temperature, str) else self.temperature,
            bins=self.bins,
            draws=self.draws,
            seed=self.seed,
            batch_size=self.batch_size,
            patches=self.patches,
        )

    def _check(self, pipeline: ModelPipeline, plan: LaplacePlan) -> None:
        """Raise before the fit what its tuning would raise for the values given."""
        unfitted = plan.make_posterior(pipeline)
        for name in ("sigma_noise", "prior_precision"):
            if not isinstance(getattr(self, name), str):
                setattr(unfitted, name, getattr(self, name))
        if self.prior_precision == "gridsearch":
            self._data(pipeline, self.validation)

    def _data(self, pipeline: ModelPipeline, split: str) -> tuple[Dataset, Any]:
        """Return the images of a split, and what they were built from.

        Raises:
            ValueError: if neither --data nor the run's config has them.
        """
        from ldm.data.own import build_dataset, splits_of
        from ldm.training.agreement import check_data
        from ldm.training.data_words import read_data_config
        from ldm.training.labels import check_shown_names

        if self.data is not None and split == self.split:
            given: Any = read_data_config(self.data)
            data = build_dataset(given)
            check_data(pipeline.model, data, "--data")
            check_shown_names(pipeline, data, "--data")
            return data, given
        config = splits_of(pipeline.config, split, remedy="name the images with --data")[split]
        return build_dataset(config), config

    def _fit(self, pipeline: ModelPipeline, plan: LaplacePlan, data: Dataset, config: Any) -> LastLayerLaplace | None:
        """Fit in parts; None while other processes work."""
        from tqdm import tqdm

        from ldm.pipelines import chosen_positions
        from ldm.pipelines.fitting import PartsOfFit

        size = len(data)  # type: ignore[arg-type]
        positions = chosen_positions(size, self.n, self.seed)
        parts = PartsOfFit.in_folder(Path(self.out) / "parts", pipeline, plan, data, config, positions)
        with tqdm(total=len(positions), desc="fit", unit="image", initial=parts.done) as bar:
            laplace = parts.fit(bar.update)
        if laplace is None:
            return None
        for folder in parts.discard_others() if self.overwrite else ():
            print(f"{folder}: parts of a fit with other settings, discarded")
        laplace.data_size = self.data_size or (len(positions) if self.published else size)
        return laplace

    def _merged(self, pipeline: ModelPipeline) -> LastLayerLaplace:
        """Return the posteriors of --merge, joined."""
        from ldm.laplace import load_laplace

        first, *others = [load_laplace(folder, pipeline.model.network) for folder in self.merge or ()]
        for other in others:
            first = first.merge(other)
        first.visits = first.visits if self.visits is None else self.visits
        return first

    def _tune(self, pipeline: ModelPipeline, laplace: LastLayerLaplace) -> None:
        """Set sigma_noise, then prior_precision, then the temperature."""
        self._tune_precision(pipeline, laplace)
        if self.temperature == "sandwich":
            laplace.optimize_temperature()

    def _tune_precision(self, pipeline: ModelPipeline, laplace: LastLayerLaplace) -> None:
        from ldm.pipelines import observations

        if self.sigma_noise == "ml":
            laplace.optimize_sigma_noise()
        else:
            laplace.sigma_noise = self.sigma_noise
        if not isinstance(self.prior_precision, str):
            laplace.prior_precision = self.prior_precision
            return
        held_out = {}
        if self.prior_precision == "gridsearch":
            data, _ = self._data(pipeline, self.validation)
            held_out["batches"] = observations(pipeline.model, data, seed=self.seed, batch_size=self.batch_size)
        laplace.optimize_prior_precision(self.prior_precision, **held_out)
