"""`decu features classifier`, `network` and `guide`: how much of an image is recognised under noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ldm.commands.shared import ModelSource, Placement
from ldm.options import option
from ldm.settings import FeatureReading, Precision, Speed

if TYPE_CHECKING:
    from ldm.evaluation.noise_conditional import NoisyTraining
    from ldm.experiments.noisy_classifiers import NoisyStudy

Changes = Annotated[tyro.conf.Positional[tuple[str, ...]], option(metavar="A.B=C ...", default="none")]
Images = Annotated[int | None, option(metavar="N", default="all")]


@dataclass(frozen=True)
class RecognitionOutput:
    """What is measured, and where it goes."""

    out: str
    """The folder of the output."""
    n_test: Images = None
    """Test images, drawn by --seed."""
    beside: Annotated[tuple[str, ...], option(metavar="CSV ...", default="none")] = ()
    """recognition.csv of other runs, for the figure."""
    seed: int = 42
    """The seed of everything that is drawn."""
    overwrite: bool = False
    """Replace outputs that exist."""

    def check(self, command: Any) -> None:
        """Make sure before anything is computed that the outputs may be written, and that other tables are there.

        Raises:
            FileExistsError: if an output is there, unless --overwrite is given, or another process of the same command
                wrote it.
            FileNotFoundError: if a table of --beside is not.
        """
        from ldm.jobs import shard_from_environment
        from ldm.records import made_alike, refuse_existing

        if shard_from_environment()[1] == 1 or not made_alike(Path(self.out) / "record.json", command):
            refuse_existing([Path(self.out) / "recognition.csv"], self.overwrite)
        missing = [file for file in self.beside if not Path(file).is_file()]
        if missing:
            raise FileNotFoundError(f"--beside takes recognition.csv of other runs; there is no {missing[0]}")

    def share(
        self,
        command: Any,
        study: NoisyStudy,
        settings: Mapping[str, Any],
        n_train: int | None = None,
        training: NoisyTraining | None = None,
    ) -> list[dict[str, Any]]:
        """Compute this process's share; the process that finishes last measures, writes, and returns the rows.

        Args:
            settings: what the classifier depends on beside its images.
            n_train, training: of a head that trains.
        """
        from ldm.experiments.noisy_shares import NoisyShares
        from ldm.jobs import shard_from_environment, sole_writer

        folder = Path(self.out) / "parts"
        shares = NoisyShares(
            study, folder, settings, shard_from_environment(), self.seed, self.n_test, n_train, training
        )
        if not shares.compute():
            print(f"{self.out}: this process is done; the one that finishes last (or one more call) writes the outputs")
            return []
        with sole_writer(folder) as mine:
            if not mine or (not self.overwrite and (Path(self.out) / "recognition.csv").exists()):
                print(f"{self.out}: this process is done; another one writes the outputs, or has written them")
                return []
            return self.write(command, study, shares.finish())

    def write(self, command: Any, study: NoisyStudy, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write and print what was measured; return it."""
        from ldm.checkpoint import save_tensors
        from ldm.records import write_record
        from ldm.report.probes import write_recognition
        from ldm.report.tables import markdown_table, read_csv

        out = Path(self.out)
        beside = {Path(file).parent.name: read_csv(file, ("log_snr", "recognised")) for file in self.beside}
        if study.trained is not None:
            save_tensors(study.trained.state_dict(), out / "classifier.safetensors", overwrite=self.overwrite)
        write_recognition(out, rows, beside, self.overwrite)
        write_record(out / "record.json", command, overwrite=True, parameters=study.parameters)
        print(markdown_table(rows))
        return rows


@dataclass(frozen=True)
class FeaturesClassifier:
    """Train a small head on a diffusion model's frozen features to recognise noisy images, and test it by noise level.

    Examples:
      decu features classifier --run logs/2026-01-01T00-00-00_mnist --layers mid --out results/noisy_ddae

    The images have the model's own noise, and come from its config. Writes the weights of the head, recognition.csv
    (rate by log signal-to-noise ratio) and recognition.png. See `decu features network` and `decu features guide`.
    Processes of torchrun or SLURM share the passes through the backbone; the last of them trains and tests the head.
    """

    source: ModelSource
    output: RecognitionOutput
    epoch: Annotated[int | None, option(metavar="E", default="the last checkpoint")] = None
    """The checkpoint that --run kept of this epoch."""
    layers: Annotated[str | None, option(metavar="NAME", default="the config's probe.layer")] = None
    """The layer."""
    pool: Annotated[str, option(metavar="K|none")] = "1"
    """Means of a K x K grid of the map, or none for every position."""
    label: Annotated[int | None, option(metavar="CLASS", default="the null class")] = None
    """The class that a conditional backbone is given."""
    precision: Annotated[Precision, option(metavar="float32|bf16|fp16")] = "float32"
    """The precision of the backbone's products."""
    epochs: int = 15
    """Passes of the training."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 1e-3
    """The rate at its highest."""
    warm_up: int = 0
    """Epochs over which the rate rises."""
    n_train: Images = None
    """Training images, drawn by --seed."""
    place: Placement = Placement()

    def run(self) -> list[dict[str, Any]]:
        """Train and test the head; return a row a noise level."""
        from ldm.evaluation.noise_conditional import NoisyTraining
        from ldm.experiments.noisy_classifiers import make_noisy_head, seeded_initialisation
        from ldm.jobs import shard_from_environment

        self.output.check(self)
        reading = FeatureReading(layers=(self.layers,) if self.layers else None, pool=self.pool, label=self.label)
        speed = Speed(chunk=1, precision=self.precision)
        with seeded_initialisation(self.output.seed):
            pipeline = self.source.load(speed=speed, device=self.place.device, epoch=self.epoch)
            study = make_noisy_head(pipeline, reading)
        training = NoisyTraining(self.epochs, self.batch_size, self.learning_rate, self.warm_up)
        if shard_from_environment()[1] > 1:
            layer = self.layers or (pipeline.config.get("probe") or {}).get("layer")
            settings = {
                "weights": pipeline.weights_sha256,
                "layer": layer,
                "pool": self.pool,
                "label": self.label,
                "precision": self.precision,
            }
            return self.output.share(self, study, settings, self.n_train, training)
        study.train(training, self.n_train, self.output.seed)
        return self.output.write(self, study, study.recognise(self.output.n_test, self.output.seed))


@dataclass(frozen=True)
class FeaturesNetwork:
    """Train a wide residual network of noisy images from scratch, and test it by noise level.

    Examples:
      decu features network --base configs/ddae/DDPM_ddpm.yaml --mode VP --out results/noisy_vp
      decu features network --base configs/ddae/mnist.yaml --mode VE --depth 10 --width 1 --epochs 2 \\
          --beside results/noisy_ddae/recognition.csv --out results/noisy_ve

    Writes what `decu features classifier` writes. It is trained by one process.
    """

    base: str
    """The config whose images it is trained on."""
    output: RecognitionOutput
    changes: Changes = ()
    """Values of the config to change."""
    mode: Literal["VP", "VE"] = "VP"
    """The noise of DDPM in 1,000 steps (VP), or of EDM (VE)."""
    depth: int = 28
    """Layers, 6 n + 4."""
    width: int = 10
    """A factor on 16, 32 and 64 channels."""
    epochs: int = 200
    """Passes of the training."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 0.1
    """The rate at its highest."""
    warm_up: int = 5
    """Epochs over which the rate rises."""
    n_train: Images = None
    """Training images, drawn by --seed."""
    place: Placement = Placement()

    def run(self) -> list[dict[str, Any]]:
        """Train and test the network; return a row a noise level."""
        from dataclasses import replace

        from ldm.evaluation.noise_conditional import WRN_TRAINING
        from ldm.experiments.noisy_classifiers import make_wide_resnet, seeded_initialisation
        from ldm.jobs import pick_device, refuse_several_processes
        from ldm.training.config_keys import load_checked_config

        refuse_several_processes("training a network from scratch, step after step,")
        self.output.check(self)
        config = load_checked_config([self.base], self.changes, needs=("model", "data"), build=())
        with seeded_initialisation(self.output.seed):
            study = make_wide_resnet(config, self.mode, self.depth, self.width, pick_device(self.place.device))
        names = ("epochs", "batch_size", "learning_rate", "warm_up")
        training = replace(WRN_TRAINING, **{name: getattr(self, name) for name in names})
        study.train(training, self.n_train, self.output.seed)
        return self.output.write(self, study, study.recognise(self.output.n_test, self.output.seed))


@dataclass(frozen=True)
class FeaturesGuide:
    """Test a classifier that main.py trained to guide a diffusion model, by noise level; nothing is trained.

    Examples:
      decu features guide --base configs/guided-diffusion/mnist-classifier.yaml \\
          --ckpt logs/2026-01-01T00-00-00_classifier/checkpoints/last.ckpt --out results/noisy_adm

    The images have the noise of the model that it guides. Writes recognition.csv and recognition.png. Processes of
    torchrun or SLURM share the images.
    """

    base: str
    """The config of the classifier, a NoisyClassifier with its data."""
    ckpt: str
    """Its weights."""
    output: RecognitionOutput
    changes: Changes = ()
    """Values of the config to change."""
    place: Placement = Placement()

    def run(self) -> list[dict[str, Any]]:
        """Test the classifier; return a row a noise level."""
        from ldm.checkpoint import sha256
        from ldm.experiments.noisy_classifiers import load_noisy_classifier, seeded_initialisation
        from ldm.jobs import pick_device, shard_from_environment
        from ldm.training.config_keys import load_checked_config

        self.output.check(self)
        config = load_checked_config([self.base], self.changes, needs=("model", "data"), build=())
        with seeded_initialisation(self.output.seed):
            study = load_noisy_classifier(config, self.ckpt, pick_device(self.place.device))
        if shard_from_environment()[1] > 1:
            return self.output.share(self, study, {"weights": sha256(self.ckpt)})
        return self.output.write(self, study, study.recognise(self.output.n_test, self.output.seed))
