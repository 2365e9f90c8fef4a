"""`decu new`: from a folder of pictures to a config that trains; `decu data check`: what lies in the folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ldm.options import check_options, option

if TYPE_CHECKING:
    from ldm.data.survey import Survey
    from ldm.training.recipe import Recipe


@dataclass(frozen=True)
class Pictures:
    """Where one's own pictures lie, and what names their classes."""

    data: Annotated[str, option(metavar="DIR|ZIP")]
    """The pictures: a folder or a .zip."""
    classes_from: Annotated[str | None, option(metavar="CSV|TSV|JSONL", default="a list at the root, else folders")] = (
        None
    )
    """A list with a path and a class in each row."""
    depth: int = 1
    """Levels of folders that name a class; 2 for Greek/alpha/1.png."""
    held_out: Annotated[float, option(metavar="SHARE")] = 0.1
    """Share of each class for validation, where the data have no splits of their own."""

    def __post_init__(self) -> None:
        check_options(self)

    def survey(self) -> Survey:
        """Open every picture, and return what was found."""
        from tqdm import tqdm

        from ldm.data.layout import find_picture_layout
        from ldm.data.survey import survey_pictures

        layout = find_picture_layout(self.data, self.classes_from, self.depth, self.held_out)
        return survey_pictures(self.data, layout, lambda paths: tqdm(paths, desc="pictures", unit=""))


@dataclass(frozen=True)
class CheckData:
    """Look at a folder of pictures before anything is trained: classes, counts, sizes, what is skipped and why.

    Every picture is opened. Known layouts: class folders; train and val (or valid, validation, dev, test) with class
    folders; a CSV, TSV or JSONL list of path and class; captions in a list or in a text file beside each picture; a
    flat folder, which is one class.

    Examples:
      decu data check --data pictures
      decu data check --data pictures.zip --size 64
      decu data check --data pictures --classes_from labels.csv

    Writes nothing.
    """

    pictures: Pictures
    size: Annotated[int | None, option(metavar="PIXELS", default="nothing is said of it")] = None
    """Say also which pictures are smaller than this."""

    def run(self) -> Survey:
        """Look, print what was found, and return it."""
        found = self.pictures.survey()
        print("\n".join([*found.describe(), *(f"note: {line}" for line in found.warnings(self.size or 0))]))
        return found


@dataclass(frozen=True)
class New:
    """Write a config that trains a model of one's own pictures, and say what was found of them and what it will take.

    Known layouts: see `decu data check`. Models of 64 pixels and more generate latents: a second config, of the first
    stage, is written beside the first. A few steps are trained on noise to say how long it takes here.

    Examples:
      decu new --data pictures --size 32 --out my.yaml
      decu new --data pictures.zip --size 64 --out my.yaml --classes_from labels.csv
      decu uncertainty study --config my.yaml       (trains and measures everything)

    Writes {out}, and {out} with -first-stage in its name where there is one.
    """

    pictures: Pictures
    size: Annotated[int, option(metavar="PIXELS")]
    """Side of the pictures that the model generates."""
    out: Annotated[str, option(metavar="YAML")]
    """The config to write."""
    folder: Annotated[str | None, option(metavar="DIR", default="logs/NAME, NAME that of the config")] = None
    """Where bins, checkpoints and results go."""
    width: Annotated[int | None, option(metavar="CHANNELS", default="32 on a CPU, 96 on a GPU")] = None
    """Channels of the network's finest resolution, a multiple of 32."""
    space: Literal["auto", "pixels", "latents"] = "auto"
    """What the model generates; auto: latents from 64 pixels on."""
    measure: Annotated[bool, option(default="trained")] = True
    """Train a few steps on noise, to say how long a training takes here; --no_measure leaves that out."""
    overwrite: bool = False
    """Replace configs that exist."""

    def __post_init__(self) -> None:
        if not self.out.endswith((".yaml", ".yml")):
            raise ValueError(f"--out must end in .yaml, got {self.out}")
        if self.width is not None and self.width % 32:
            raise ValueError(f"--width must be a multiple of 32, the groups of the network's norms; got {self.width}")

    def run(self) -> Path:
        """Look at the pictures and write the config; return its path."""
        from ldm.files import atomic_write

        out = Path(self.out)
        recipe = self._recipe(out)
        texts = self._texts(recipe, out)
        taken = [str(path) for path in texts if path.exists()]
        if taken and not self.overwrite:
            raise FileExistsError(f"{', '.join(taken)} exists: choose another --out, or pass --overwrite")
        for path, text in texts.items():
            with atomic_write(path, overwrite=True) as partial:
                partial.write_text(text, encoding="utf-8")
        found = recipe.survey
        print("\n".join([*found.describe(), *(f"note: {line}" for line in found.warnings(self.size))]))
        print("wrote " + " and ".join(map(str, texts)))
        if self.measure:
            self._measure(out, recipe)
        print(f"next: decu uncertainty study --config {out}")
        return out

    def _recipe(self, out: Path) -> Recipe:
        import torch

        from ldm.training.recipe import Recipe

        gpu = torch.cuda.is_available()
        return Recipe(
            self.pictures.survey(),
            self.size,
            str(self.folder or Path("logs") / out.stem),
            self.width or (96 if gpu else 32),
            workers=4 if gpu else 0,
            latent_choice={"auto": None, "pixels": False, "latents": True}[self.space],
        )

    def _texts(self, recipe: Recipe, out: Path) -> dict[Path, str]:
        """Return {path: text} of the configs to write."""
        from ldm.training.recipe import write_recipe

        command = shlex.join(self._words())
        first = out.with_name(f"{out.stem}-first-stage{out.suffix}")
        texts = {out: write_recipe(recipe, "model", out.stem, command, str(out), str(first))}
        if recipe.latent:
            texts[first] = write_recipe(recipe, "first_stage", out.stem, command, str(first))
        return texts

    def _words(self) -> list[str]:
        """Return the command that writes the same again."""
        own = self.pictures
        words = ["decu", "new", "--data", own.data, "--size", str(self.size), "--out", self.out]
        given = {
            "--classes_from": own.classes_from,
            "--depth": own.depth if own.depth != Pictures.depth else None,
            "--held_out": own.held_out if own.held_out != Pictures.held_out else None,
            "--folder": self.folder,
            "--width": self.width,
            "--space": self.space if self.space != New.space else None,
        }
        return words + [str(word) for name, value in given.items() if value is not None for word in (name, value)]

    def _measure(self, out: Path, recipe: Recipe) -> None:
        from ldm.training.config import load_config
        from ldm.training.trial import try_steps

        print(try_steps(load_config([str(out)])).describe(recipe.steps))
