"""`decu evaluate classifier`: the small network whose features stand for the images of small data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ldm.commands.shared import Placement
from ldm.options import option


@dataclass(frozen=True)
class EvaluateClassifier:
    """Train the small classifier whose features FID, KID, CMMD, precision and recall use on small data, offline.

    Examples:
      decu evaluate classifier --base configs/evaluation/digits.yaml --out models/digits.safetensors
      decu evaluate classifier --base configs/evaluation/mnist.yaml --out models/mnist.safetensors
      decu evaluate classifier --base configs/evaluation/mnist.yaml --out models/m.safetensors paths.data_root=DIR
      decu evaluate classifier --base configs/latent-diffusion/mnist.yaml --epochs 2 --out models/m32.safetensors

    The config's data.params.train is learned from and data.params.validation tested on: the config of any training
    will do. Beside the weights lies NAME.yaml with the architecture, the data, the seed and the accuracy on the test
    images.
    """

    base: Annotated[tuple[str, ...], option(metavar="YAML ...")]
    """Configs with a section data, merged from left to right."""
    out: str
    """The weights to write, NAME.safetensors."""
    changes: Annotated[tyro.conf.Positional[tuple[str, ...]], option(metavar="A.B=C ...", default="none")] = ()
    """Values of the config to change."""
    epochs: Annotated[int | None, option(metavar="N", default="the config's section classifier, or 3")] = None
    """Passes over the training images."""
    batch_size: Annotated[int | None, option(metavar="N", default="the config's, or 128")] = None
    """Images in a step."""
    learning_rate: Annotated[float | None, option(metavar="R", default="the config's, or 0.004")] = None
    """The rate at its highest."""
    shift: Annotated[int | None, option(metavar="PIXELS", default="the config's, or 0")] = None
    """Pixels by which training images are moved at random."""
    seed: int = 0
    """The seed of the initial weights and of the order."""
    overwrite: bool = False
    """Replace outputs that exist."""
    place: Placement = Placement()

    def run(self) -> float:
        """Train, write the weights and their record; return the accuracy on the test images."""
        import json
        from pathlib import Path

        from ldm.evaluation.classifier import record_path, save_classifier
        from ldm.experiments.classifiers import train_on_config
        from ldm.jobs import pick_device
        from ldm.records import record, refuse_existing
        from ldm.training.config_keys import load_checked_config

        out = Path(self.out)
        refuse_existing([out, record_path(out)], self.overwrite)
        config = load_checked_config(self.base, self.changes, needs=("data",), build=())
        names = ("epochs", "batch_size", "learning_rate", "shift")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        found = train_on_config(config, given, self.seed, pick_device(self.place.device))
        facts = {**found.describe(), "record": json.loads(json.dumps(record(self), default=str))}
        save_classifier(found.model, out, facts, self.overwrite)
        print(f"{out}: {found.accuracy:.2%} of {found.tests} test images recognised, {found.seconds:.0f} s of CPU time")
        return found.accuracy
