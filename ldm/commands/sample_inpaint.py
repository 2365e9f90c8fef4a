"""`decu sample inpaint` (scripts/inpaint.py): the holes of pictures, filled in by a model of inpainting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ldm.commands.shared import ModelSource, Placement
from ldm.settings import Sampling, Speed

# Where latent-diffusion's script has its model.
RELEASED = Path("models/ldm/inpainting_big")
OWN_CONFIG = "configs/latent-diffusion/inpainting_big.yaml"


@dataclass(frozen=True)
class SampleInpaint:
    """Fill in the holes of pictures: of each NAME.png whose mask, white in the hole, is NAME_mask.png.

    Outside its hole a picture stays as it is. Without a model named, that of latent-diffusion's script is taken:
    models/ldm/inpainting_big/last.ckpt, with the config.yaml beside it or ours. Pictures may differ in size; height
    and width are multiples of what the network and the first stage halve them by (32 of the released model).

    Examples:
      python scripts/inpaint.py --indir data/inpainting_examples --outdir results/inpainted --steps 50
      decu sample inpaint --run logs/2026-01-01T00-00-00_digits --indir pictures --outdir results/digits

    Writes {outdir}/NAME.png.
    """

    default_steps: ClassVar[int] = 50
    default_scale: ClassVar[float] = 1.0

    indir: str
    """The folder of the pictures and their masks."""
    outdir: str
    """The folder of the output."""
    source: ModelSource = ModelSource()
    overwrite: bool = False
    """Replace outputs that exist."""
    sampling: Sampling = Sampling()
    place: Placement = Placement()
    speed: Speed = Speed()

    @property
    def model(self) -> ModelSource:
        """The model that is named, else the released one."""
        if self.source.run is not None or self.source.base is not None:
            return self.source
        config = RELEASED / "config.yaml"
        return ModelSource(base=str(config) if config.is_file() else OWN_CONFIG, ckpt=str(RELEASED / "last.ckpt"))

    def run(self) -> Path:
        """Fill in every picture; return the folder."""
        from tqdm import tqdm

        from ldm.data.picture_list import read_pictures_apart
        from ldm.images import save_image, to_uint8
        from ldm.pipelines.pictures import picture_channels, with_pictures
        from ldm.records import refuse_existing, write_record

        pipeline = self.model.load(self.sampling, self.speed, self.place.device, self.default_steps)
        pictures = read_pictures_apart(self.indir, picture_channels(pipeline.model))
        out = Path(self.outdir)
        paths = [out / f"{one.names[0]}.png" for one in pictures]
        refuse_existing(paths, self.overwrite)
        shown = tqdm(pictures, desc="pictures", unit="picture")
        for number, (one, path) in enumerate(zip(shown, paths, strict=True)):
            chosen = with_pictures(pipeline, one)
            filled = one.fill_in(chosen.decode(chosen.sample_latents([0], [number])))
            save_image(to_uint8(filled)[0], path, self.overwrite)
        write_record(out / "record.json", self, overwrite=True, settings=pipeline.describe())
        return out
