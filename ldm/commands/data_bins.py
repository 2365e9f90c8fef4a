"""`decu data bins`: which images each member of an ensemble sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ldm.commands.words import refuse_options
from ldm.options import option

if TYPE_CHECKING:
    from ldm.data.bins import ClassSize, Subsets

_BIN_WORD = re.compile(r"(all|\d+):\d+")
_NAMED_WORD = re.compile(r"(.+)=(all|[1-9]\d*)")
_PATHS_WORD = re.compile(r"paths(\.\w+)+=")
_MASKED = "masked_classes"


@dataclass(frozen=True)
class MakeBins:
    """Draw which images each member of an ensemble sees, or take what DECU published; write the lists, and show them.

    Binned classes: every class has a number of images, and each member a bootstrap of them; --natural leaves the
    numbers as they are. Masked classes: every
    class is hidden from some of the members; the others see a bootstrap of all its images. --convert reads DECU's
    subsets_binned_classes.pkl or subsets_masked_classes.pkl (nothing that a pickle names is run). File lists that lie
    beside it are kept, others are drawn. Words paths.NAME=VALUE change the config's section `paths`.

    Examples:
      decu data bins --target ldm.data.digits.Digits --out data/digits_bins
      decu data bins --base configs/latent-diffusion/digits.yaml --classes_per_bin 1:3 10:2 50:2 all:3
      decu data bins --base my.yaml --natural
      decu data bins --base my.yaml --images_of "red disc=5" ship=20
      decu data bins --base configs/latent-diffusion/digits.yaml --rotation 1 --out data/digits_bins_r1
      decu data bins --base configs/latent-diffusion/omniglot.yaml --classes_per_bin 1:60 3:60 8:60 all:62
      decu data bins --target ldm.data.digits.Digits --dataset masked_classes --hidden_from 2
      decu data bins --base configs/latent-diffusion/cin256-v2.yaml paths.data_root=imagenet_data
      decu data bins --base configs/latent-diffusion/cin256-v2.yaml paths.data_root=imagenet_data \\
          --convert imagenet_data/data_train/subsets_binned_classes.pkl
      decu data bins --show data/digits_bins
    """

    base: Annotated[str | None, option(metavar="CONFIG", default="none; or give --target or --show")] = None
    """A YAML whose data.params.train names the data set."""
    target: Annotated[str | None, option(metavar="CLASS", default="none")] = None
    """The class of the data set, in place of --base."""
    params: Annotated[tuple[str, ...], option(metavar="NAME=VALUE ...", default="none")] = ()
    """Parameters of the data set."""
    out: Annotated[
        str | None,
        option(
            metavar="DIR",
            default="where the data set looks for lists, the pickle's folder, or data/CONFIG-or-CLASS_bins",
        ),
    ] = None
    """The folder to write."""
    dataset: Annotated[
        Literal["binned_classes", "masked_classes"] | None,
        option(metavar="KIND", default="binned_classes, or what the name of --convert's file says"),
    ] = None
    """The kind of subsets: binned_classes or masked_classes."""
    classes_per_bin: Annotated[
        tuple[str, ...],
        option(
            metavar="IMAGES:CLASSES ...",
            default="1:3 10:2 50:2 all:3 for ten classes, 10/10/10/70 percent at 1/10/100/all for 100 or more "
            "(ImageNet: 100/100/100/700), as they are for other numbers of classes",
        ),
    ] = ()
    """The number of classes at each number of images per class."""
    images_of: Annotated[tuple[str, ...], option(metavar="CLASS=IMAGES ...", default="no class is named")] = ()
    """The number of images of these classes, by name. The others keep all of theirs, or are drawn by
    --classes_per_bin, whose numbers of classes are then without these."""
    natural: bool = False
    """Leave every class with the images that it has; each member sees a bootstrap of all of them."""
    hidden_from: Annotated[int | None, option(metavar="N", default="2, with masked_classes")] = None
    """Of masked classes, the members that a class is hidden from."""
    hidden: Annotated[tuple[str, ...], option(metavar="NAME ...", default="every class, with masked_classes")] = ()
    """Of masked classes, those that are hidden, by name; all members see the others."""
    components: Annotated[int | None, option(metavar="N", default="5, or those of --convert")] = None
    """The number of members."""
    seed: int = 0
    """The seed of all draws."""
    rotation: int = 0
    """Move the classes on through the bins, this many times."""
    no_bootstrap: bool = False
    """Give every member all images of its classes."""
    overwrite: bool = False
    """Replace other subsets in the folder."""
    convert: Annotated[str | None, option(metavar="PICKLE", default="subsets are drawn")] = None
    """Take the subsets that DECU published in this file."""
    show: Annotated[str | None, option(metavar="DIR", default="subsets are written")] = None
    """Print the subsets of an existing folder, and write nothing."""
    paths: Annotated[tuple[str, ...], option(metavar="paths.NAME=VALUE ...", default="the config's")] = ()
    """Changes of the section `paths` of --base; the words do without the option's name."""

    def __post_init__(self) -> None:
        masked = self.dataset == _MASKED
        sources = [name for name in (self.base, self.target) if name is not None]
        if self.show is None and len(sources) != 1:
            raise ValueError("give one of --base CONFIG, --target CLASS, --show DIR")
        drawn = [one.name for one in fields(self) if one.name != "show" and getattr(self, one.name) != one.default]
        if self.show is not None and drawn:
            raise ValueError(f"--show {self.show} shows subsets that were drawn: leave out --{drawn[0]}")
        if self.components is not None and self.components < 1:
            raise ValueError(f"--components must be 1 or more, got {self.components}")
        if masked and (self.classes_per_bin or self.rotation or self.images_of):
            raise ValueError("--classes_per_bin, --images_of and --rotation act on binned_classes only")
        if not masked and (self.hidden_from is not None or self.hidden):
            raise ValueError("--hidden_from and --hidden act on masked_classes only")
        chosen = self.classes_per_bin or self.images_of or self.rotation
        if self.natural and (masked or self.convert or chosen):
            raise ValueError(
                "--natural leaves classes as they are; it goes without --classes_per_bin, --images_of and --rotation"
            )
        if self.convert and (chosen or self.hidden_from is not None):
            raise ValueError(
                "--classes_per_bin, --images_of, --rotation and --hidden_from draw subsets; --convert takes published "
                "ones"
            )
        if self.rotation and self.images_of and not self.classes_per_bin:
            raise ValueError("--rotation moves classes through the bins of --classes_per_bin: give these, too")
        if self.paths and self.base is None:
            raise ValueError(f"{self.paths[0]} changes a config; give one with --base")
        wrong = [word for word in self.classes_per_bin if not _BIN_WORD.fullmatch(word)]
        if wrong:
            raise ValueError(f"--classes_per_bin takes IMAGES:CLASSES such as 10:2 or all:3, got '{wrong[0]}'")
        wrong = [word for word in self.images_of if not _NAMED_WORD.fullmatch(word)]
        if wrong:
            raise ValueError(f"--images_of takes CLASS=IMAGES such as ship=5 or ship=all, got '{wrong[0]}'")

    def add_words(self, words: Sequence[str]) -> MakeBins:
        """Return the command with words that are no options: paths.NAME=VALUE, and further NAME=VALUE of --params.

        Raises:
            ValueError: for any other word.
        """
        refuse_options(words, "paths.NAME=VALUE")
        paths = [word for word in words if _PATHS_WORD.match(word)]
        others = [word for word in words if not _PATHS_WORD.match(word)]
        return replace(self, paths=(*self.paths, *paths), params=(*self.params, *others))

    def run(self) -> Path:
        """Draw, write and show the subsets, or show those of a folder; return the folder."""
        from ldm.data.own import build_dataset
        from ldm.data.subsets import list_file, sample_keys, write_subsets
        from ldm.report.bins import describe_folder, describe_plan

        if self.show is not None:
            print("\n".join(describe_folder(self.show)))
            return Path(self.show)
        config, configured = self._read_dataset()
        dataset: Any = build_dataset(config)
        folder = Path(self.out or configured or self._default_folder(dataset))
        plan = self._plan(dataset)
        keep = [list_file(folder, plan.dataset_name, one) for one in plan.record.get("published_lists", ())]
        if self.convert is not None and folder.resolve() != Path(self.convert).parent.resolve():
            keep = []
        files = write_subsets(folder, plan, sample_keys(dataset), config, self.overwrite, keep)
        print("\n".join(describe_plan(folder, plan, plan.positions, dataset.labels)))
        kept = f"; kept {len(keep)} published lists" if keep else ""
        print(f"wrote {len(files)} files to {folder}{kept}")
        return folder

    def _counts(self) -> dict[ClassSize, int] | None:
        """Return {images per class: classes}, None where the default holds."""
        from ldm.data.class_bins import parse_bin_words

        return parse_bin_words(self.classes_per_bin) or None

    def _named(self) -> dict[str, ClassSize]:
        """Return {name of a class: its number of images} of --images_of."""
        found = [word.rpartition("=") for word in self.images_of]
        return {name: size if size == "all" else int(size) for name, _, size in found}

    def _read_dataset(self) -> tuple[dict[str, Any], str | None]:
        """Return target and params of the full data set, and the folder of subsets that the config names, if any."""
        from omegaconf import OmegaConf

        from ldm.data.class_bins import COMPONENT_SUBSET, find_full_data
        from ldm.training.config_keys import load_checked_config

        config: dict[str, Any] = {"target": self.target}
        if self.base is not None:
            read = load_checked_config([self.base], list(self.paths), needs=(), build=())
            node = OmegaConf.select(read, "data.params.train")
            if node is None:
                raise ValueError(f"{self.base} has no data.params.train; name the data set with --target and --params")
            config = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
        given = config.get("params") or {}
        folder = given.get("folder" if config["target"] == COMPONENT_SUBSET else "subset")
        whole = find_full_data(config)
        params = whole["params"]
        params |= OmegaConf.to_container(OmegaConf.from_dotlist(list(self.params)))  # type: ignore[arg-type]
        return {"target": whole["target"], "params": params}, folder

    def _default_folder(self, dataset: Any) -> str:
        """Return where subsets go that neither an option nor the config places."""
        if self.convert:
            return str(Path(self.convert).parent)
        own = getattr(dataset, "lists_folder", None)
        stem = Path(self.base).stem if self.base else str(self.target).rpartition(".")[2].lower()
        return str(own or f"data/{stem}_bins")

    def _plan(self, dataset: Any) -> Subsets:
        """Draw the plan that the options ask for, or take the published one."""
        from ldm.data.bins import has_default_bins, plan_binned, plan_masked, plan_natural
        from ldm.data.prepare.published import plan_published

        common: dict[str, Any] = {"seed": self.seed, "resample": not self.no_bootstrap}
        if self.convert:
            return plan_published(self.convert, dataset, self.dataset, self.components, **common)
        common["members"] = self.components or 5
        if self.dataset == _MASKED:
            hidden_from = 2 if self.hidden_from is None else self.hidden_from
            names = [str(name) for name in dataset.class_names]
            unknown = [name for name in self.hidden if name not in names]
            if unknown:
                raise ValueError(f"--hidden names classes; there is no {unknown[0]} among {', '.join(names[:12])}")
            hidden = [names.index(name) for name in self.hidden] or None
            return plan_masked(dataset.labels, dataset.class_names, hidden_from, hidden=hidden, **common)
        if self.images_of:
            counts = self._counts()
            named = self._named()
            return plan_binned(
                dataset.labels, dataset.class_names, counts, rotation=self.rotation, named=named, **common
            )
        if self.natural or not (self.classes_per_bin or has_default_bins(len(dataset.class_names))):
            return plan_natural(dataset.labels, dataset.class_names, **common)
        return plan_binned(dataset.labels, dataset.class_names, self._counts(), rotation=self.rotation, **common)
