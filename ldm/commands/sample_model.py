"""`decu sample model` (scripts/sample_diffusion.py): samples of a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ldm.commands.conditions import PictureConditions
from ldm.commands.shared import ModelSource, Placement
from ldm.options import option
from ldm.settings import Sampling, Speed

if TYPE_CHECKING:
    from ldm.pipelines import ModelPipeline
    from ldm.pipelines.sampling import SamplePlan


@dataclass(frozen=True)
class SampleModel:
    """Sample a diffusion model: any run directory, or a config and a checkpoint, released ones included.

    Examples:
      decu sample model --run logs/2026-01-01T00-00-00_digits --n_per_class 10 --out samples/digits
      decu sample model --base configs/latent-diffusion/cin256-v2.yaml --ckpt pretrained_models/cin256-v2/model.ckpt \\
          --classes 25 187 --n_per_class 8 --steps 250 --scale 1.5 --out samples/imagenet
      decu sample model --run logs/2026-01-01T00-00-00_digits --classes 3 --interpolate 0 1 --frames 9 \\
          --out samples/between
      decu sample model --base configs/guided-diffusion/imagenet-64.yaml --ckpt pretrained_models/adm/imagenet-64.pt \\
          --sampler DDPM --steps 100 --spacing respace --eps_scaler published --labels random --n 50000 \\
          --batch_size 256 --out samples/imagenet-64
      torchrun --nproc_per_node 8 -m -- ldm sample model --run RUN --n 50000 --out samples/many
      python scripts/sample_diffusion.py -r models/ldm/celeba256/model.ckpt -l samples -n 100 -c 200 -e 0
          (latent-diffusion's own options and defaults: -r -l -n -c -e -v --batch_size)

    Image i draws from (seed, i, step) whatever the batch size. A run that was stopped continues when it is started
    again; processes of torchrun or of a SLURM array share the work, and the last to finish writes grid.png,
    samples.npz (arr_0: images uint8 [N, H, W, C]; arr_1: classes [N]) and record.json.
    """

    default_steps: ClassVar[int] = 200
    default_scale: ClassVar[float] = 1.0

    acts_with: ClassVar[Mapping[str, str]] = {"frames": "interpolate"}

    source: ModelSource
    out: str
    """The folder of the output."""
    classes: Annotated[
        tuple[int | str, ...], option(metavar="CLASS ...", default="all classes; the first with --interpolate")
    ] = ()
    """The classes, by number or by name, the null class by its number; or all."""
    n: Annotated[int | None, option(metavar="N", default="16; see --n_per_class and --interpolate")] = None
    """The number of images in all, with the classes in turn."""
    n_per_class: Annotated[int | None, option(metavar="N", default="the classes in turn")] = None
    """In place of --n, the images of each class, class by class."""
    interpolate: Annotated[tuple[int, int] | None, option(metavar="SEED_A SEED_B", default="no interpolation")] = None
    """In place of --n, go from image 0 of one seed to image 0 of another, on the arc between their first noises."""
    frames: int = 9
    """Images of each class with --interpolate."""
    labels: Annotated[str | None, option(metavar="random|FILE", default="the classes in turn")] = None
    """Draw the class of every image (random), or read it from a file (text, .npy, .npz: arr_1)."""
    batch_size: Annotated[int | Literal["auto"], option(metavar="N|auto")] = "auto"
    """Images that are sampled together; auto takes what fits into memory."""
    pngs: bool = False
    """Also write pngs/{image}.png."""
    latents: bool = False
    """Also write latents.safetensors."""
    size: Annotated[tuple[int, int] | None, option(metavar="H W", default="the model's")] = None
    """Height and width in pixels, other than the model's where its network takes them (docs/text.md)."""
    epoch: Annotated[int | None, option(metavar="E", default="the last checkpoint")] = None
    """The checkpoint that --run kept of this epoch."""
    conditions: PictureConditions = PictureConditions()
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        amounts = {"n": self.n, "n_per_class": self.n_per_class, "interpolate": self.interpolate}
        given = [f"--{name}" for name, value in amounts.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"give one of --n, --n_per_class and --interpolate; got {' and '.join(given)}")
        counts = {
            "n": self.n,
            "n_per_class": self.n_per_class,
            "frames": self.frames,
            "batch_size": self.batch_size,
        }
        wrong = {name: value for name, value in counts.items() if isinstance(value, int) and value < 1}
        if wrong:
            raise ValueError(f"expected counts of at least 1, got {wrong}")
        if self.epoch is not None and self.source.run is None:
            raise ValueError("--epoch chooses a checkpoint of a run directory: give --run DIR")
        if self.labels is not None and (self.interpolate or self.n_per_class):
            raise ValueError("--labels goes with --n, without --n_per_class and --interpolate")
        if self.labels not in (None, "random") and self.classes:
            raise ValueError("--labels FILE names the class of every image: leave out --classes")

    def run(self) -> Path:
        """Sample this process's share; the process that finishes last writes the outputs. Return the folder."""
        from tqdm import tqdm

        from ldm.jobs import WorkList, shard_from_environment, split_range
        from ldm.pipelines.sampling import SAMPLES_PER_FILE, read_samples, sample_to_files
        from ldm.records import write_record
        from ldm.report.samples import write_samples

        out = Path(self.out)
        if (out / "samples.npz").exists() and not (out / "parts" / "settings.json").exists():
            raise FileExistsError(f"{out} holds samples that this command did not make; choose another --out")
        pipeline = self.source.load(self.sampling, self.speed, self.place.device, self.default_steps, self.epoch)
        pipeline = self.conditions.give(pipeline)
        pipeline = pipeline if self.size is None else pipeline.with_size(*self.size)
        classes = self._choose_classes(pipeline)
        plan = self._plan(pipeline, classes)
        settings = self._settings(pipeline, classes)
        work = WorkList(out / "parts", settings, shard_from_environment())
        files = split_range(plan.count, SAMPLES_PER_FILE)
        fitting = max(SAMPLES_PER_FILE, pipeline.images_at_once())
        batch_size = fitting if isinstance(self.batch_size, str) else self.batch_size
        total = sum(len(files[key]) for key in work.pending(files))
        with tqdm(total=total, desc="images", unit="image") as bar:
            sample_to_files(work, files, plan, pipeline, batch_size, bar.update)
        if not work.complete(files):
            print(f"{out}: this process is done; the one that finishes last (or one more call) writes the outputs")
            return out
        names = pipeline.class_names if classes is not None else ()
        write_samples(out, plan, lambda name: read_samples(work, files, name), self.pngs, self.latents, names)
        write_record(out / "record.json", self, overwrite=True, settings=settings)
        print(f"{out}: {plan.count} images in samples.npz, the first in grid.png")
        return out

    def _choose_classes(self, pipeline: ModelPipeline) -> list[int] | None:
        """Return the classes to sample; the null class, which is no class of `all`, may be given.

        Raises:
            ValueError: if the model is unconditional and classes are given, or there is no such class.
        """
        if not pipeline.n_classes:
            if self.classes or self.n_per_class:
                raise ValueError("this model is unconditional: give --n, without --classes and --n_per_class")
            return None
        if not self.classes and self.interpolate:
            return [0]
        if self.classes in ((), ("all",)):
            return list(range(pipeline.n_classes))
        numbered = [str(one).lstrip("-").isdigit() for one in self.classes]
        return [
            int(one) if is_number else pipeline.choose_classes([one])[0]
            for one, is_number in zip(self.classes, numbered, strict=True)
        ]

    def _plan(self, pipeline: ModelPipeline, classes: list[int] | None) -> SamplePlan:
        """Number the images.

        Raises:
            ValueError: if a class is not the model's, or labels are given to an unconditional model.
        """
        from ldm.pipelines.sampling import draw_labels, plan_interpolation, plan_samples, read_image_labels

        if self.interpolate:
            return plan_interpolation(pipeline, classes, self.interpolate, self.frames)
        n = 16 if self.n is None else self.n
        labels = None
        if self.labels is not None and classes is None:
            raise ValueError("--labels goes with --n and a model of classes; this model is unconditional")
        if self.labels == "random" and classes is not None:
            labels = draw_labels(classes, n, self.sampling.seed)
        elif self.labels is not None:
            labels = read_image_labels(self.labels, n)
        return plan_samples(pipeline, classes, n, self.n_per_class, labels)

    def _settings(self, pipeline: ModelPipeline, classes: list[int] | None) -> dict[str, Any]:
        """Return what the images depend on; their number and the batch size may change when a run continues."""
        from ldm.checkpoint import sha256

        labels = self.labels
        if labels not in (None, "random"):
            labels = sha256(str(labels))
        return {
            **pipeline.describe(),
            "classes": classes,
            "n_per_class": self.n_per_class,
            "labels": labels,
            "interpolate": None if self.interpolate is None else list(self.interpolate),
            "frames": self.frames if self.interpolate else None,
            **({} if self.size is None else {"size": list(self.size)}),
        }
