"""`decu evaluate reference`: the features of a reference set, extracted once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from ldm.commands.images import FeatureChoice, ImageSource
from ldm.commands.shared import Placement
from ldm.options import option


@dataclass(frozen=True)
class EvaluateReference:
    """Extract the features of a reference set, with which `decu evaluate metrics` compares images.

    Examples:
      decu evaluate reference --data target=ldm.data.idx.MNIST params.root=data/mnist --features classifier \\
          --weights models/mnist.safetensors --out results/mnist-train
      decu evaluate reference --images pictures.zip --features inception --out results/pictures

    Writes the features, their statistics and record.json into --out. An extraction that was stopped continues; the
    processes of torchrun or of a SLURM array share it.
    """

    default_steps: ClassVar[int] = 200
    default_scale: ClassVar[float] = 1.0

    images: ImageSource
    out: str
    """The folder of the output."""
    distort: Annotated[str | None, option(metavar="NAME:STRENGTH", default="images as they are")] = None
    """Distort the images first: blur, noise or swaps, by a strength of 0 to 1."""
    features: FeatureChoice = FeatureChoice()
    place: Placement = Placement()

    def run(self) -> None:
        """Extract, and write the record once all images are done."""
        from ldm.evaluation.distortions import read_distortion
        from ldm.experiments.image_metrics import Extraction
        from ldm.jobs import pick_device
        from ldm.records import write_record

        out = Path(self.out)
        extractor = self.features.load()
        images = self.images.load(extractor.channels, self.place.device)
        device = pick_device(self.place.device)
        extraction = Extraction(extractor, device, self.images.batch_size, self.images.sampling.seed)
        found = extraction.read(images, out, read_distortion(self.distort) if self.distort else None)
        if found is None:
            print(f"{out}: this process is done; the one that finishes last goes on (or running once more)")
            return
        facts = {"features": extractor.describe(), "images": images.describe()}
        write_record(out / "record.json", self, overwrite=True, **facts)
        print(f"{out}: features of {len(found)} images")
