"""`decu gather` (save_ensemble.py): trained members, or DECU's published file, as an ensemble on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from ldm.options import option

BASE_NAME = "trunk"


@dataclass(frozen=True)
class Gather:
    """Gather the members of an ensemble: their trained heads, the base checkpoint they share, and how they were made.

    Examples:
      python save_ensemble.py --path logs --ensemble_name bootstrapped --ensemble_comps 5
      python save_ensemble.py --published model.pth --out decu_5 \\
          --base configs/latent-diffusion/cin256-v2-published.yaml

      decu gather --runs logs/*_digits_seed0 logs/*_digits_seed1 logs/*_digits_seed2 --out logs/whole_digits_3

    Writes {path}/{ensemble_name}_{dataset}_{comps}/ensemble.yaml and one small file a member. Of several runs of one
    component the newest counts. The second form converts an ensemble of DECU's published code: --out then also holds
    the base checkpoint, once. The third makes an ensemble of whole trainings, deep ensembles of small networks.
    """

    acts_with: ClassVar[Mapping[str, str]] = {
        "base": "published",
    }

    path: Annotated[str | None, option(metavar="DIR", default="none; or give --published")] = None
    """The --logdir that the members were trained with."""
    runs: Annotated[tuple[str, ...], option(metavar="DIR ...", default="none")] = ()
    """Whole trainings as members, which share no base model: their run directories, or checkpoints in them; with
    --out."""
    published: Annotated[str | None, option(metavar="FILE", default="none; or give --path")] = None
    """model.pth of DECU's published code; it needs --base and --out."""
    base: Annotated[str | None, option(metavar="YAML", default="none")] = None
    """The config of --published."""
    out: Annotated[str | None, option(metavar="DIR", default="none")] = None
    """The folder for --published, or for --runs."""
    ensemble_name: str = "bootstrapped"
    """The --ensemble_name that the members were trained with."""
    ensemble_comps: int = 5
    """The number of members, which DECU calls components."""
    data_name: Annotated[str | None, option(metavar="NAME", default="the data set's")] = None
    """The name of the data in the folder's name; runs of a config of this name go before those of others."""
    checkpoint: str = "last.ckpt"
    """The file below each run's checkpoints/."""
    ema: Annotated[float | None, option(metavar="WIDTH", default="the heads of the checkpoint")] = None
    """Take the average of this width of each member's heads, of the snapshots that the callback posthoc_ema wrote."""
    overwrite: bool = False
    """Replace an ensemble that exists."""

    def __post_init__(self) -> None:
        if sum((self.path is not None, self.published is not None, bool(self.runs))) != 1:
            raise ValueError(
                "give one of --path, where the components were trained, --runs, whole trainings, or --published, "
                "DECU's model.pth"
            )
        if self.runs and self.out is None:
            raise ValueError("--runs needs --out, the folder of the ensemble")
        if self.out is not None and self.path is not None:
            raise ValueError("--out acts only with --published or --runs: leave it out, the ensemble goes to --path")
        if self.ema is not None and self.published:
            raise ValueError("--ema takes averages of trainings: leave it out with --published")
        if self.published and not (self.base and self.out):
            raise ValueError("--published needs --base CONFIG, the model it was made with, and --out FOLDER")

    def run(self) -> Path:
        """Write the ensemble, and return its folder."""
        from ldm.ensembles.storage import read_ensemble

        if self.runs:
            folder = self._gather_runs()
        else:
            folder = self._convert() if self.published else self._gather()
        spec = read_ensemble(folder).spec
        steps = {member["component"]: member["step"] for member in spec["members"]}
        if len(set(steps.values())) > 1:
            print(f"the components were trained for different numbers of steps: {steps}")
        files = [folder / member["file"] for member in spec["members"]]
        size = sum(file.stat().st_size for file in files) / len(files)
        print(f"{folder}: {len(files)} members of {size / 1024:.1f} KiB each on {spec['trunk']['path']}")
        return folder

    def _record(self, folder: Path) -> None:
        from ldm.records import write_record

        write_record(folder / "record.json", self, overwrite=True)

    def _gather(self) -> Path:
        from ldm.training.gathering import gather_members

        assert self.path is not None
        return gather_members(
            self.path,
            self.ensemble_name,
            self.ensemble_comps,
            data_name=self.data_name,
            checkpoint=self.checkpoint,
            ema=self.ema,
            overwrite=self.overwrite,
            prepare=self._record,
        )

    def _gather_runs(self) -> Path:
        from ldm.training.whole_members import gather_runs

        name = "whole" if self.ensemble_name == "bootstrapped" else self.ensemble_name
        return gather_runs(
            self.runs, str(self.out), name=name, ema=self.ema, overwrite=self.overwrite, prepare=self._record
        )

    def _convert(self) -> Path:
        """Write a published ensemble as one of ours: base checkpoint, members, record.

        Raises:
            ValueError: if the file does not fit the config.
        """
        from omegaconf import OmegaConf

        from ldm.checkpoint import free_name, load_into, save_tensors, sha256
        from ldm.ensembles.storage import read_published, write_ensemble
        from ldm.pipelines import build_model
        from ldm.training.config import load_config
        from ldm.trust import escape

        config = load_config([str(self.base)])
        folder = Path(str(self.out))
        base, members = read_published(str(self.published))
        model = build_model(config)
        load_into(model, base, file=str(self.published))
        if (folder / "ensemble.yaml").exists() and not self.overwrite:
            raise FileExistsError(f"{folder} holds an ensemble; use --overwrite to replace it")
        earlier = set(folder.glob(f"{BASE_NAME}*.safetensors"))
        file = free_name(folder, BASE_NAME, ".safetensors")
        save_tensors(base, folder / file)
        heads = "class_embedding"
        spec = {
            "name": self.ensemble_name,
            "trunk": {"path": file, "sha256": sha256(folder / file)},
            "heads": [heads],
            "patterns": list(model.head_patterns[heads]),
            "null_class": "random",
            "initialisation": {"how": "random", "noise": None},
            **self._data(config),
            "config": escape(OmegaConf.to_container(config, resolve=True)),
            "members": [
                {"component": index, "seed": None, "run": Path(str(self.published)).name, "step": None}
                for index in range(len(members))
            ],
        }
        each = [{name: value[index] for name, value in members.overrides.items()} for index in range(len(members))]
        write_ensemble(folder, spec, each, self.overwrite, self._record)
        for replaced in earlier:
            replaced.unlink()
        return folder

    def _data(self, config: Any) -> dict[str, Any]:
        """Return what the training data say of the classes, or nothing where they cannot be read."""
        from ldm.training.gathering import describe_training_data

        try:
            return describe_training_data(config) if "data" in config else {}
        except (ValueError, FileNotFoundError) as error:
            print(f"the record names no classes or bins, since the training data cannot be read: {error}")
            return {}
