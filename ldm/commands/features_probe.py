"""`decu features probe`: linear probes of a diffusion model's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from ldm.commands.shared import ModelSource, Placement
from ldm.options import option
from ldm.settings import FeatureReading, Precision, Speed

if TYPE_CHECKING:
    from ldm.evaluation.probe import ProbeResult
    from ldm.evaluation.taps import Backbone, Reading
    from ldm.experiments.probes import ProbePlan, ProbeStudy


@dataclass(frozen=True)
class FeaturesProbe:
    """Probe what a diffusion model knows of classes: linear probes of its features by layer and noise level.

    Examples:
      decu features probe --run logs/2026-01-01T00-00-00_mnist --grid --out results/probe
      decu features probe --run logs/2026-01-01T00-00-00_mnist --grid --epoch 49 --t 11 41 101 --untrained --pixels \\
          --out results/probe
      decu features probe --run logs/2026-01-01T00-00-00_mnist --t 11 --layers out_6 --out results/one
      decu features probe --base configs/ddae/EDM_ddpmpp.yaml --ckpt model.ckpt --index 3 4 5 --grid --out DIR
      decu features probe --run RUN --t 11 --layers out_6 --finetune --tuning_epochs 5 --out results/tuned

    With --grid all (noise level, layer) heads train together: the backbone passes once a noise level, and one
    optimiser holds every head. Heads are chosen on held-out training images (--validation), averaged over --seeds, and
    the chosen place is tested once a seed. Levels and layers come from the options, or from the config's section
    `probe`. A run that was stopped continues; its features are kept in --out. Processes of torchrun or SLURM share the
    passes through the backbone; the last of them trains and tests the heads.
    """

    acts_with: ClassVar[Mapping[str, str]] = {
        "tuning_epochs": "finetune",
        "tuning_rate": "finetune",
    }

    source: ModelSource
    out: str
    """The folder of the output."""
    epoch: Annotated[int | None, option(metavar="E", default="the last checkpoint")] = None
    """The checkpoint that --run kept of this epoch."""
    grid: bool = False
    """Search all layers, and the levels given or those of the config's grid."""
    seeds: int = 3
    """Splits, orders and test noises."""
    n_train: Annotated[int | None, option(metavar="N", default="all")] = None
    """Training images, drawn by --seed."""
    copies: int = 1
    """Noised and augmented copies of each training image; epochs take turns."""
    latent_cache: Annotated[str | None, option(metavar="DIR", default="latents are not kept")] = None
    """A folder for latents of a model with a first stage: images are encoded once a copy."""
    validation: float = 0.1
    """The share of the training images that heads are chosen on."""
    epochs: int = 15
    """Passes of the heads over the features."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 1e-2
    """Adam's rate at the start."""
    standardise: Annotated[bool, option(default="scaled")] = True
    """Scale features to mean 0 and deviation 1; --no_standardise leaves them as they are."""
    untrained: bool = False
    """Probe the same network with fresh weights too."""
    pixels: bool = False
    """Probe raw pixels too."""
    finetune: bool = False
    """Train the encoder up to the chosen place too, with its head, once a seed."""
    tuning_epochs: int = 5
    """Passes of --finetune over the images."""
    tuning_rate: float = 1e-4
    """The rate of --finetune; that of the head is ten times as high."""
    precision: Annotated[Precision, option(metavar="float32|bf16|fp16")] = "float32"
    """The precision of the backbone's products."""
    seed: int = 42
    """The seed of everything that is drawn."""
    overwrite: bool = False
    """Replace tables and figures that exist."""
    reading: FeatureReading = FeatureReading()
    place: Placement = Placement()

    def run(self) -> dict[str, ProbeResult]:
        """Probe, write tables and figures; return {trained, untrained, pixels: what was found}."""
        from ldm.experiments.probes import ProbeStudy
        from ldm.jobs import shard_from_environment, sole_writer
        from ldm.pipelines.features import make_backbone, make_reading
        from ldm.records import made_alike, refuse_existing

        out, shard = Path(self.out), shard_from_environment()
        shared = shard[1] > 1
        if not (shared and made_alike(out / "record.json", self)):
            refuse_existing([out / "results.csv"], self.overwrite)
        speed = Speed(chunk=1, precision=self.precision)
        pipeline = self.source.load(speed=speed, device=self.place.device, epoch=self.epoch)
        backbone = make_backbone(pipeline.model, self.reading.label)
        reading = make_reading(pipeline, backbone, self.reading, search=self.grid, seed=self.seed)
        study = ProbeStudy(pipeline, self._plan(), out / "features")
        if shared and not self._read_shares(study, backbone, reading, shard):
            print(f"{out}: this process is done; the one that finishes last (or one more call) writes the outputs")
            return {}
        with sole_writer(study.folder) as mine:
            if not mine or (shared and not self.overwrite and (out / "results.csv").exists()):
                print(f"{out}: this process is done; another one writes the outputs, or has written them")
                return {}
            return self._probe(study, backbone, reading)

    def _read_shares(self, study: ProbeStudy, backbone: Backbone, reading: Reading, shard: tuple[int, int]) -> bool:
        """Read this process's share of all features that heads learn from; whether all are read."""
        from ldm.pipelines.features import reinitialise

        complete = study.read_share(backbone, reading, "trained", shard)
        if self.untrained:
            network = study.pipeline.model.model
            kept = {name: value.clone() for name, value in network.state_dict().items()}
            reinitialise(study.pipeline, self.seed)
            complete = study.read_share(backbone, reading, "untrained", shard, self._untrained) and complete
            network.load_state_dict(kept)
        return complete

    @property
    def _untrained(self) -> str:
        """The name of the fresh weights."""
        return f"untrained {self.seed}"

    def _probe(self, study: ProbeStudy, backbone: Backbone, reading: Reading) -> dict[str, ProbeResult]:
        """Train and test heads on the features, and write."""
        from ldm.pipelines.features import reinitialise
        from ldm.records import write_record
        from ldm.report.probes import write_places, write_probes
        from ldm.report.tables import markdown_table

        out, pipeline = Path(self.out), study.pipeline
        results = {"trained": study.probe_backbone(backbone, reading, "trained")}
        tuned = study.fine_tune(backbone, reading, results["trained"].place) if self.finetune else None
        if self.untrained:
            reinitialise(pipeline, self.seed)
            results["untrained"] = study.probe_backbone(backbone, reading, "untrained", self._untrained)
        if self.pixels:
            results["pixels"] = study.probe_pixels()
        facts = {"checkpoint": str(pipeline.checkpoint), "reading": reading.describe()}
        write_record(out / "record.json", self, overwrite=True, **facts, n_train=len(study.positions))
        for name in (name for name in results if name != "pixels"):
            write_places(out, name, results[name], reading, pipeline.model, self.overwrite)
        names = getattr(study.data["train"], "human_names", ())
        rows = write_probes(out, results, tuned, self.overwrite, names)
        print(markdown_table(rows))
        return results

    def _plan(self) -> ProbePlan:
        from ldm.evaluation.finetuning import Tuning
        from ldm.evaluation.probe import ProbeTraining
        from ldm.experiments.probes import ProbePlan

        return ProbePlan(
            training=ProbeTraining(self.epochs, self.batch_size, self.learning_rate, standardise=self.standardise),
            tuning=Tuning(self.tuning_epochs, self.batch_size, self.tuning_rate),
            seed=self.seed,
            seeds=self.seeds,
            n_train=self.n_train,
            copies=self.copies,
            validation=self.validation,
            images_per_pass=self.reading.images_per_pass,
            latent_cache=self.latent_cache,
        )
