"""`decu laplace sample`: samples with a variance for every pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ldm.commands.conditions import PictureConditions
from ldm.commands.shared import (
    ACTS_UNDER_METHOD,
    ClassNames,
    ModelSource,
    Placement,
    PosteriorSource,
    VarianceMethod,
    read_params,
)
from ldm.options import option
from ldm.settings import Sampling, Speed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.experiments.variance_samples import Measures
    from ldm.pipelines import PosteriorPipeline

MaskName = Literal["saliency", "threshold"]
ControlMap = Literal["energy", "edges", "differences", "seeds"]


@dataclass(frozen=True)
class SampleLaplace:
    """Sample a diffusion model with a variance for every pixel, from the Laplace posterior of its last layer.

    Methods (any schedule, any sampler but for the published ones; the images are the plain sampler's):
      persistent      sampled weights, each held for the whole trajectory: the truth within its sampling error
      tangents        its first-order limit: derivatives in the directions of the draws
      redrawn         weights drawn again at every evaluation, as many states as draws: the process behind bayesdiff
      bayesdiff       its variances, pixel by pixel, from few states; the scale falls like 1 / steps
      bayesdiff_skip  the same with states drawn at every few steps, slopes held between
      published       BayesDiff as published, with its defects; samplers of one evaluation a step
      published_skip  BayesDiff-Skip as published
      path            integral of the predictive variance along the plain trajectory, no further evaluations

    Of a latent model the maps are those of the decoded pixels. --mask names a segmentation model: a function of images
    [B, C, H, W] in [-1, 1], giving [B, H, W] in [0, 1] or logits [B, K, H, W] whose class 0 is background (or either
    as entry `out`, as torchvision's); or a class or builder of one, with --mask_params. A stopped run continues;
    processes of torchrun or of a SLURM array share it.

    Examples:
      decu laplace sample --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --n 64 \\
          --out results/samples
      decu laplace sample --run logs/2026-01-01T00-00-00_digits --posterior results/laplace/digits --n 1000 \\
          --method bayesdiff_skip --sampler Heun --steps 20 --out results/skip
      decu laplace sample --run logs/2026-01-01T00-00-00_mnist --posterior results/laplace/mnist --n 64 \\
          --features classifier --weights models/mnist.safetensors --masks threshold saliency \\
          --control_maps energy edges differences seeds --out results/mnist
      torchrun --nproc_per_node 4 -m ldm laplace sample --run RUN --posterior POSTERIOR --n 5000 --out results/many

    Writes {out}/:
      samples.npz   arr_0 images uint8 [N, H, W, C], arr_1 classes, map [N, H, W], variance and latents [N, c, h, w],
                    step_sums [N, S], times [S], step_maps [SHOWN, S, h, w] of the first images
      scores.csv    a row an image
      maps.png, steps.png, ranked.png, record.json
    """

    default_steps: ClassVar[int] = 50
    default_scale: ClassVar[float] = 1.0

    acts_with: ClassVar[Mapping[str, str]] = {
        "mask_params": "mask",
        "weights": "features",
        "features_params": "features",
        "seeds": "control_maps=seeds",
        **ACTS_UNDER_METHOD,
    }

    source: ModelSource
    posterior: PosteriorSource
    out: str
    """The folder of the output."""
    method: VarianceMethod = "persistent"
    """How the variance is propagated, see above."""
    n: int = 16
    """The number of images, the classes in turn."""
    classes: ClassNames = ()
    """The classes, by number or by name."""
    batch_size: int = 16
    """Images sampled together, and the unit that a file holds."""
    masks: Annotated[tuple[MaskName, ...], option(metavar="threshold|saliency ...")] = ("threshold",)
    """Masks of the segmentation scores that need no weights."""
    mask: Annotated[str | None, option(metavar="TARGET", default="no model")] = None
    """A segmentation model as package.module.name: a function, or what builds one."""
    mask_params: Annotated[tuple[str, ...] | None, option(metavar="A=B ...", default="none")] = None
    """Keywords that build the segmentation model; a class is built without as well."""
    features: Annotated[str | None, option(metavar="NAME", default="not measured")] = None
    """Measure the entropy of features over members: of inception, clip, classifier, or a dotted target."""
    weights: Annotated[str | None, option(metavar="FILE", default="the extractor's own")] = None
    """The weights of the extractor."""
    features_params: Annotated[tuple[str, ...], option(metavar="A=B ...", default="none")] = ()
    """Keywords of the extractor."""
    control_maps: Annotated[tuple[ControlMap, ...], option(metavar="NAME ...", default="none")] = ()
    """Score maps that know no posterior as well: energy, edges, differences, seeds."""
    seeds: int = 8
    """Noises of the control map seeds."""
    percentile: float = 95.0
    """The percentile of the score of this name."""
    patches: int = 4
    """Patches along a side for the score patch_max."""
    rank_by: str = "sum"
    """The score that ranked.png is in the order of."""
    shown: int = 16
    """Images in maps.png; steps.png has up to eight."""
    conditions: PictureConditions = PictureConditions()
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1:
            raise ValueError(f"--n and --batch_size must be at least 1, got {self.n} and {self.batch_size}")
        if self.features is not None and self.method != "persistent":
            raise ValueError(f"--features needs sampled weights: --method persistent, got {self.method}")
        if "seeds" in self.control_maps and self.seeds < 2:
            raise ValueError(f"a variance over --seeds needs at least 2, got {self.seeds}")

    def run(self) -> Path:
        """Sample what is missing, and write the outputs where all is there; return their folder."""
        from tqdm import tqdm

        from ldm.experiments.variance_samples import join_samples, sample_in_parts
        from ldm.jobs import WorkList, shard_from_environment, split_range
        from ldm.records import write_record
        from ldm.report.variance import write_variance_report

        self._check_scores()
        out = Path(self.out)
        if (out / "samples.npz").exists() and not (out / "parts" / "settings.json").exists():
            raise FileExistsError(f"{out} holds samples that this command did not make; choose another --out")
        posterior = self.posterior.load(
            self.conditions.give(self.source.load(self.sampling, self.speed, self.place.device, self.default_steps))
        )
        posterior.check(self.method)
        labels = self._labels(posterior)
        measures = self._measures(posterior)
        settings = self._settings(posterior)
        work = WorkList(out / "parts", settings, shard_from_environment())
        parts = split_range(self.n, self.batch_size)
        missing = sum(len(parts[key]) for key in work.pending(parts))
        with tqdm(total=missing, desc=self.method, unit="image") as bar:
            shared = {"shown": self.shown, "progress": bar.update}
            sample_in_parts(work, parts, posterior, self.method, labels, measures, **shared)
        if not work.complete(parts):
            print(f"{out}: this process is done; the one that finishes last (or one more call) writes the outputs")
            return out
        found = join_samples(work, parts)
        write_variance_report(
            out,
            found,
            labels,
            posterior.pipeline.times[1:].numpy(),
            comment=f"scores of pixel variances by {self.method}, posterior {self.posterior.posterior}",
            rank_by=self.rank_by,
            shown=self.shown,
            class_names=posterior.pipeline.class_names,
        )
        write_record(out / "record.json", self, overwrite=True, settings=settings)
        sums = found["score_sum"]
        spread = f"s.d. {sums.std():.3g}, least {sums.min():.3g}"
        print(f"{out}: {self.n} images, summed variance {sums.mean():.4g} ({spread})")
        return out

    def _check_scores(self) -> None:
        """Refuse a --rank_by that no score of this run has."""
        from ldm.experiments.variance_samples import score_names

        masks = [*self.masks, *(["model"] if self.mask is not None else [])]
        names = score_names(masks, self.control_maps, self.features is not None)
        if self.rank_by not in names:
            raise ValueError(f"--rank_by must be a score of this run, one of {', '.join(names)}; got '{self.rank_by}'")

    def _labels(self, posterior: PosteriorPipeline) -> list[int] | None:
        """Return the class of each image; None for an unconditional model.

        Raises:
            ValueError: for classes that the model does not have.
        """
        if not posterior.pipeline.n_classes:
            if self.classes:
                raise ValueError("this model is unconditional: leave out --classes")
            return None
        classes = posterior.pipeline.choose_classes(self.classes)
        return [classes[image % len(classes)] for image in range(self.n)]

    def _measures(self, posterior: PosteriorPipeline) -> Measures:
        """Return what is measured of every image."""
        from ldm.evaluation.extractors import EXTRACTORS, make_extractor
        from ldm.experiments.variance_samples import Measures
        from ldm.uncertainty.scores import MASKS, Mask, model_mask

        pipeline = posterior.pipeline
        masks: dict[str, Mask] = {name: MASKS[name] for name in self.masks}
        if self.mask is not None:
            model = load_segmentation_model(self.mask, read_params(self.mask_params or ()), pipeline.device)
            masks["model"] = model_mask(model)
        extractor = None
        if self.features is not None:
            params = read_params(self.features_params)
            channels = 3 if self.features in EXTRACTORS else pipeline.model.channels
            extractor = make_extractor(self.features, self.weights, params, channels)
            extractor = extractor.to(pipeline.device)
        return Measures(
            masks,
            extractor,
            self.control_maps,
            self.percentile,
            self.patches,
            self.seeds,
            step_maps=True,
        )

    def _settings(self, posterior: PosteriorPipeline) -> dict[str, Any]:
        """Return what the results depend on; the number of images may change when a run continues."""
        chosen = posterior.pipeline.choose_classes(self.classes) if self.classes else None
        return {
            **posterior.pipeline.describe(),
            **posterior.describe(),
            "method": self.method,
            "classes": chosen,
            "batch_size": self.batch_size,
            "masks": list(self.masks),
            "mask": self.mask,
            "mask_params": None if self.mask_params is None else list(self.mask_params),
            "features": self.features,
            "weights": self.weights,
            "control_maps": list(self.control_maps),
            "seeds": self.seeds,
            "percentile": self.percentile,
            "patches": self.patches,
        }


def load_segmentation_model(target: str, params: dict[str, Any], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function that a dotted target names, or the module that its class or builder gives for `params`."""
    from torch import nn

    from ldm.util import get_obj_from_str

    found = get_obj_from_str(target)
    if params or isinstance(found, type):
        found = found(**params)
    return found.to(device).eval() if isinstance(found, nn.Module) else found
