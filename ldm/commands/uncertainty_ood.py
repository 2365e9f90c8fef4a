"""`decu uncertainty ood`: are these pictures from a law that the model knows?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ldm.commands.shared import ModelSource, Placement
from ldm.options import option
from ldm.settings import Sampling, Speed

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.evaluation.ood import KnownPictures, PictureScore
    from ldm.pipelines import ModelPipeline
    from ldm.pipelines.ood import PictureReader
    from ldm.records import Row

# What the columns of ood.csv are.
_COLUMNS = (
    "evaluations: of the network, a picture; auroc: of the pictures against the held-out ones, 0.5 where they are not "
    "told apart, low and high its 95 %; flagged: share of the pictures with a p of at most --flag"
)


@dataclass(frozen=True)
class UncertaintyOod:
    """Score pictures by how little the model knows of their law, beside simple baselines.

    Pictures of every folder get the same noises, and one backbone looks at them under one condition:
      denoising loss   of the noise, on one level or as mean logarithm over all of them
      members          mutual information of the members' predicted x_0 and the member, with --ensemble
      gamma^2          variance of the output by the last layer's posterior, with --posterior
      snapshot         distance of activations inside of the network from those of training pictures
      path             energy and curvature of the deterministic way to noise, by distance from training pictures'
      baselines        pixel statistics (mean, deviation, edges) and the nearest training picture: no network
    Held-out pictures of the training's law say what is usual. AUROC is that of a folder's pictures against them (0.5:
    not told apart), p the share of them with a score as large: at most --flag of further pictures of the law are
    flagged. Latent models score latents.

    Examples:
      decu uncertainty ood --run logs/2026-01-01T00-00-00_digits --pictures strange --out results/ood
      decu uncertainty ood --ensemble logs/bootstrapped_digits_5 --posterior results/laplace/digits \\
          --pictures strange more.zip --layers mid out_3 --out results/ood

    Writes ood.csv (each score and folder: AUROC with its interval, share flagged, evaluations of the network a
    picture), scores.csv (each picture: all scores and their p), ood.png, record.json.
    """

    default_steps: ClassVar[int] = 50
    default_scale: ClassVar[float] = 1.0

    source: ModelSource
    out: str
    """The folder of the output."""
    pictures: Annotated[tuple[str, ...], option(metavar="PATH ...")]
    """Folders, .zip, .npz, .pt or .safetensors of pictures; picture files are scaled to the model's size."""
    ensemble: Annotated[str | None, option(metavar="DIR", default="none")] = None
    """In place of a run an ensemble, whose base model is the backbone: its members are asked as well."""
    posterior: Annotated[str | None, option(metavar="DIR", default="none")] = None
    """A posterior of the backbone's last layer."""
    layers: Annotated[tuple[str, ...], option(metavar="NAME ...", default="the network's middle")] = ()
    """Places of the snapshots: mid, in_1 .., out_1 .., or dotted names."""
    condition: Annotated[str | None, option(metavar="nearest|null|CLASS", default="nearest")] = None
    """What a conditional model is told: the class of the nearest training picture, the null class, or a class."""
    data: Annotated[
        tuple[str, ...] | None,
        option(metavar="WORD ...", default="the training data of the run, or what an ensemble's members saw"),
    ] = None
    """The pictures that scores compare with, as target=.. params.x=.., or CONFIG.yaml:train."""
    known: Annotated[tuple[str, ...] | None, option(metavar="WORD ...", default="the validation data of the run")] = (
        None
    )
    """Held-out pictures of the same law, which say what is usual."""
    n: Annotated[int | None, option(metavar="N", default="all")] = None
    """The first n pictures of each folder, and n held-out ones drawn at random."""
    compare: int = 1000
    """Training pictures that scores compare with, at most, drawn at random."""
    noise: float = 0.5
    """The noise level sigma / alpha of scores on one level."""
    noise_levels: int = 10
    """Noise levels of scores on several."""
    between: tuple[float, float] = (0.1, 5.0)
    """The lowest and the highest level, sigma / alpha."""
    flag: float = 0.05
    """The share of known pictures that may be flagged."""
    batch_size: int = 50
    """Pictures in one pass."""
    seed: int = 0
    """The seed of the noises and of the choice of pictures."""
    overwrite: bool = False
    """Replace outputs that exist."""
    place: Placement = Placement()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        self.speed.check_exact()
        own = (self.source.run, self.source.base, self.source.ckpt) != (None, None, None)
        if own == (self.ensemble is not None):
            raise ValueError("the backbone comes from --run (or --base and --ckpt), or from --ensemble: give one")
        if self.ensemble is not None and self.source != ModelSource():
            raise ValueError(
                "--pretrained, --no-ema and prompts are of a model of --run: beside --ensemble leave them out"
            )
        if not self.pictures:
            raise ValueError("name pictures with --pictures")
        if not 0 < self.flag < 1:
            raise ValueError(f"--flag is a share between 0 and 1, got {self.flag:g}")
        low, high = self.between
        if not 0 < low < high:
            raise ValueError(f"--between takes the lowest and the highest level, above 0, got {low:g} {high:g}")
        if not low <= self.noise <= high:
            raise ValueError(f"--noise is one of the levels {low:g} to {high:g} of --between, got {self.noise:g}")

    def run(self) -> list[Row]:
        """Read all pictures, score them, write and print; return the rows of ood.csv."""
        from ldm.evaluation.ood import Corruption
        from ldm.records import refuse_existing, write_record
        from ldm.report.ood import draw_aurocs
        from ldm.report.tables import markdown_table, write_csv

        out = Path(self.out)
        refuse_existing([out / "ood.csv"], self.overwrite)
        reader = self._load()
        corruption = Corruption.make(*self.between, self.noise_levels, self.seed)
        one = corruption.nearest(self.noise)
        reference, known, sets = self._score(reader, corruption, one)
        table = compare_sets(known, sets, self.flag)
        usual = corruption.ratios[one]
        note = (
            f"{len(reference.images)} training pictures to compare with, {len(next(iter(known.values())).values)} "
            f"held-out ones say what is usual; one level is sigma / alpha {usual:.3g}, {self.noise_levels} levels "
            f"{self.between[0]:g} to {self.between[1]:g}; flagged: p <= {self.flag:g}"
        )
        least = 1 / (len(next(iter(known.values())).values) + 1)
        if least > self.flag:
            note += f"; so few held-out pictures flag nothing: no p is below {least:.2g}"
        if any(math.isnan(row["low"]) for row in table):
            note += "; one picture has no interval"
        print(markdown_table(table, 3), note, sep="\n")
        write_csv(out / "ood.csv", table, [note, _COLUMNS], overwrite=True)
        write_csv(out / "scores.csv", list_pictures(known, sets), overwrite=True)
        draw_aurocs(table, note, out / "ood.png")
        write_record(out / "record.json", self, overwrite=True, note=note)
        return table

    def _load(self) -> PictureReader:
        """Load the backbone, and what there is beside it."""
        from ldm.pipelines import load_ensemble, load_posterior
        from ldm.pipelines.ood import PictureReader

        pipeline: ModelPipeline
        if self.ensemble is not None:
            plain = Sampling(scale=1.0)
            pipeline = load_ensemble(self.ensemble, plain, speed=self.speed, device=self.place.device)
        else:
            pipeline = self.source.load(None, self.speed, self.place.device, self.default_steps)
        laplace = None if self.posterior is None else load_posterior(self.posterior, pipeline).laplace
        return PictureReader.make(pipeline, laplace, self.layers, self.condition)

    def _score(
        self, reader: PictureReader, corruption: Any, one: int
    ) -> tuple[KnownPictures, dict[str, PictureScore], dict[str, dict[str, PictureScore]]]:
        """Return the reference, the scores of the known pictures, and those of each folder."""
        from tqdm import tqdm

        from ldm.evaluation.ood import KnownPictures
        from ldm.pipelines.images import load_images
        from ldm.pipelines.ood import read_picture_set

        trained, labels = self._read_data(reader, "train", self.data, self.compare)
        known, _ = self._read_data(reader, "validation", self.known, self.n)
        shape = tuple(trained.shape[1:])
        sets: dict[str, Tensor] = {}
        for path in self.pictures:
            stem = Path(path).stem
            name = stem if stem not in {"known", *sets} else f"{path} ({len(sets)})"
            sets[name] = read_picture_set(load_images(path, shape[0], (shape[1], shape[2])), self.n, shape)
        nearest = None if labels is None else (trained, labels)
        with tqdm(total=sum(map(len, (trained, known, *sets.values()))), desc="read", unit="picture") as bar:

            def read(images: Tensor) -> Any:
                return reader.read(images, corruption, nearest, self.batch_size, bar.update)

            reference = KnownPictures(trained, read(trained), one, reader.members)
            usual = reference.score(known, read(known))
            return reference, usual, {name: reference.score(own, read(own)) for name, own in sets.items()}

    def _read_data(
        self, reader: PictureReader, split: str, given: tuple[str, ...] | None, most: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return up to `most` pictures [N, C, H, W] in [-1, 1] of a data set, and their classes where it has them."""
        import torch

        from ldm.data.own import build_dataset
        from ldm.pipelines import chosen_positions
        from ldm.training.data_words import choose_data_config

        word = "--data" if split == "train" else "--known"
        data: Any = build_dataset(
            choose_data_config(given, reader.pipeline.config, split, f"name pictures with {word}", word)
        )
        count = None if most is None else min(most, len(data))
        positions = chosen_positions(len(data), count, self.seed, f"ood {split}")
        images = torch.stack([torch.as_tensor(data[position]["image"]).float() for position in positions])
        labels = getattr(data, "labels", None)
        return images.movedim(-1, 1).contiguous(), None if labels is None else torch.as_tensor(labels)[positions]


def compare_sets(
    known: Mapping[str, PictureScore], sets: Mapping[str, Mapping[str, PictureScore]], level: float
) -> list[Row]:
    """Return a row for each set and score: AUROC against the known pictures, and the share that is flagged."""
    import numpy as np

    from ldm.evaluation.ood import conformal_p
    from ldm.stats import auroc_interval

    rows: list[Row] = []
    for name, scores in sets.items():
        for score, found in scores.items():
            usual = known[score].values
            both = np.concatenate([found.values, usual])
            told = auroc_interval(both, np.arange(len(both)) < len(found.values))
            rows.append(
                {
                    "pictures": name,
                    "score": score,
                    "evaluations": found.evaluations,
                    "auroc": told.estimate,
                    "low": told.low,
                    "high": told.high,
                    "flagged": float((conformal_p(usual, found.values) <= level).mean()),
                }
            )
    return rows


def list_pictures(known: Mapping[str, PictureScore], sets: Mapping[str, Mapping[str, PictureScore]]) -> list[Row]:
    """Return a row for each picture: all scores, and their p; the known ones stand first, without p."""
    from ldm.evaluation.ood import conformal_p

    rows: list[Row] = []
    for name, scores in {"known": known, **sets}.items():
        ps = {score: conformal_p(known[score].values, found.values) for score, found in scores.items()}
        for picture in range(len(next(iter(scores.values())).values)):
            row: dict[str, Any] = {"pictures": name, "picture": picture}
            for score, found in scores.items():
                row[score] = float(found.values[picture])
                row[f"p: {score}"] = None if name == "known" else float(ps[score][picture])
            rows.append(row)
    return rows
