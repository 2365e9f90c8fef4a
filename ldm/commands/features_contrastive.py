"""`decu features contrastive`: alignment and uniformity of a diffusion model's features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ldm.commands.shared import ModelSource, Placement
from ldm.options import option
from ldm.settings import FeatureReading, Precision, Speed

if TYPE_CHECKING:
    from ldm.evaluation.taps import Reading
    from ldm.pipelines.features import DataStates


@dataclass(frozen=True)
class FeaturesContrastive:
    """Measure alignment and uniformity of a diffusion model's features, over checkpoints of a training and layers.

    Examples:
      decu features contrastive --run logs/2026-01-01T00-00-00_mnist --t 11 --layers all --out results/contrastive
      decu features contrastive --run RUN --epochs 9 19 29 --n 5000 --positives noise class --out results/contrastive
      decu features contrastive --base CONFIG --ckpt model.ckpt --index 4 --layers all --out results/contrastive

    Alignment is the mean squared distance of positive pairs at unit length (two noises of one image; with `class` also
    two images of one class), uniformity the logarithm of the mean of exp(-2 d^2) over all pairs of images; both over
    all images at once, whatever the batch. Lower is better. Writes contrastive.csv and contrastive.png; a run that was
    stopped continues with the checkpoints that are not in --out yet, and processes of torchrun or SLURM share them.
    """

    source: ModelSource
    out: str
    """The folder of the output."""
    epochs: Annotated[tuple[int, ...], option(metavar="E ...", default="all that --run kept by name")] = ()
    """Kept epochs (main.py --every_n_epochs)."""
    n: Annotated[int | None, option(metavar="N", default="all")] = None
    """Training images, drawn by --seed."""
    positives: Annotated[tuple[Literal["noise", "class"], ...], option(metavar="[noise] [class]")] = ("noise",)
    """Positive pairs: two noises of one image (noise), two images of one class (class)."""
    precision: Annotated[Precision, option(metavar="float32|bf16|fp16")] = "float32"
    """The precision of the backbone's products."""
    seed: int = 42
    """The seed of everything that is drawn."""
    overwrite: bool = False
    """Replace outputs that exist."""
    reading: FeatureReading = FeatureReading()
    place: Placement = Placement()

    def run(self) -> list[dict[str, Any]]:
        """Measure checkpoint by checkpoint; return a row a checkpoint and place."""
        from tqdm import tqdm

        from ldm.checkpoint import sha256
        from ldm.data.own import build_dataset, splits_of
        from ldm.experiments.contrastive import find_checkpoints, measure_contrast
        from ldm.experiments.probes import draw_probe_positions
        from ldm.jobs import WorkList, shard_from_environment, sole_writer
        from ldm.pipelines import load_weights
        from ldm.pipelines.features import DataStates, make_backbone, make_reading
        from ldm.records import made_alike, refuse_existing

        out, shard = Path(self.out), shard_from_environment()
        shared = shard[1] > 1
        if not (shared and made_alike(out / "record.json", self)):
            refuse_existing([out / "contrastive.csv"], self.overwrite)
        pipeline = self.source.load(speed=Speed(chunk=1, precision=self.precision), device=self.place.device)
        data = build_dataset(splits_of(pipeline.config, "train")["train"])
        positions = draw_probe_positions(len(data), self.n, self.seed)
        backbone = make_backbone(pipeline.model, self.reading.label)
        search = self.reading.layers is None
        reading = make_reading(pipeline, backbone, self.reading, search=search, seed=self.seed)
        states = DataStates(pipeline.model, data, positions)
        checkpoints = find_checkpoints(self.source.run, self.source.ckpt, self.epochs)
        work = WorkList(out / "parts", self._settings(reading, states), shard)
        names = {f"{name}_{sha256(checkpoint)[:12]}": name for name, checkpoint in checkpoints.items()}
        for key in tqdm(work.pending(names), desc="checkpoints", unit="checkpoint"):
            checkpoint = checkpoints[names[key]]
            load_weights(pipeline.model, checkpoint, self.source.ema, self.source.pretrained, pipeline.config)
            passes = self.reading.images_per_pass
            found = measure_contrast(backbone, states, reading, self.positives, self.seed, passes)
            work.save(key, {"rows": found})
        if not work.complete(names):
            print(f"{out}: this process is done; the one that finishes last (or one more call) writes the outputs")
            return []
        rows = [{"checkpoint": name, **row} for key, name in names.items() for row in work.load(key)["rows"]]
        with sole_writer(work.folder) as mine:
            if not mine or (shared and not self.overwrite and (out / "contrastive.csv").exists()):
                print(f"{out}: this process is done; another one writes the outputs, or has written them")
            else:
                self._write(rows, len(positions))
        return rows

    def _write(self, rows: list[dict[str, Any]], images: int) -> None:
        from ldm.records import write_record
        from ldm.report.probes import contrast_plot
        from ldm.report.tables import markdown_table, write_csv

        out = Path(self.out)
        note = "features at unit length: mean squared distance of positive pairs; ln mean exp(-2 d^2) of all pairs"
        write_record(out / "record.json", self, overwrite=True, images=images)
        write_csv(out / "contrastive.csv", rows, [note], self.overwrite)
        contrast_plot(rows, out / "contrastive.png", self.overwrite)
        print(markdown_table(rows))

    def _settings(self, reading: Reading, states: DataStates) -> dict[str, Any]:
        """Return what a checkpoint's rows depend on but its weights."""
        return {
            "ema": self.source.ema,
            "pretrained": self.source.pretrained,
            "label": self.reading.label,
            "positives": list(self.positives),
            "precision": self.precision,
            "seed": self.seed,
            "reading": reading.describe(),
            "states": states.describe(),
        }
