"""`decu export`: the weights of a model as a base checkpoint, as a folder to share, or as one that diffusers reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ldm.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.training.runs import RunDirectory


@dataclass(frozen=True)
class Export:
    """Write the weights of a model as a base checkpoint for members: averaged where the run kept averages.

    With --to diffusers a folder is written that diffusers' classes read: the network, the first stage, the scheduler,
    and how classes are given; its README.md holds the lines that sample it. A folder of diffusers as --run is written
    as a base checkpoint, and its config beside it: members train on these.

    Examples:
      decu export --run logs/2026-01-01T00-00-00_digits --out logs/pretrained/digits/base.ckpt
      decu export --run logs/2026-01-01T00-00-00_digits --ema 0.05 --out logs/pretrained/digits/base.ckpt
      decu export --run logs/2026-01-01T00-00-00_digits --to diffusers --out results/digits-diffusers
      decu export --run models/ldm/cin256-v2/model.ckpt --base configs/latent-diffusion/cin256-v2.yaml \\
          --to diffusers --out results/cin256-diffusers
      decu export --run results/cin256-diffusers --out logs/pretrained/cin256/base.ckpt

    With --to folder a model or an ensemble becomes a folder that others open without running code: safetensors, its
    config, a record, and a README.md with what is known of its data and its uncertainty. --push_to_hub sends it.

      decu export --run logs/2026-01-01T00-00-00_digits --to folder --out results/digits-model
      decu export --run logs/bootstrapped_digits_5 --to folder --out results/digits-5 --push_to_hub me/digits-5

    The file holds nothing but weights; a record of their origin goes beside it.
    """

    source: Annotated[str, option(name="run", metavar="DIR")]
    """The run directory of a training, or a checkpoint in one; a folder of diffusers; with --to folder an ensemble."""
    out: str
    """The file to write, .ckpt (.pt, .pth) or .safetensors; with --to folder or diffusers the folder."""
    epoch: Annotated[int | None, option(metavar="N", default="the last checkpoint")] = None
    """The checkpoint that --run kept of this epoch."""
    overwrite: bool = False
    """Replace the file if it exists."""
    to: Literal["checkpoint", "folder", "diffusers"] = "checkpoint"
    """What is written."""
    push_to_hub: Annotated[str | None, option(metavar="OWNER/NAME", default="it stays here")] = None
    """With --to folder, send the folder to the hub under this name (the extra `hub`)."""
    private: bool = False
    """With --push_to_hub, make the repository a private one."""
    ema: Annotated[float | None, option(metavar="WIDTH", default="the averages that the run kept")] = None
    """Take the average of this width, 0.05 for example, combined of the snapshots that the callback posthoc_ema
    wrote."""
    base: Annotated[str | None, option(metavar="YAML", default="that of the run directory")] = None
    """With --to diffusers, the config of a checkpoint that --run names and that lies in no run directory."""

    def run(self) -> Path:
        """Write the file or the folder, and return its path."""
        from ldm.interop.folder import is_model_folder

        if self.push_to_hub is not None and self.to != "folder":
            raise ValueError("--push_to_hub sends what --to folder writes: add --to folder")
        if self.private and self.push_to_hub is None:
            raise ValueError("--private is the repository's that --push_to_hub makes: give its OWNER/NAME")
        if self.ema is not None and (self.to == "diffusers" or is_model_folder(self.source)):
            raise ValueError(
                "--ema combines the snapshots of a run into a checkpoint: write that first, and export it with --base"
            )
        if self.to == "folder":
            return self._share()
        if self.to == "diffusers":
            return self._write_folder()
        if self.base is not None:
            raise ValueError("--base belongs to --to diffusers: the weights alone need no config")
        return self._import_folder() if is_model_folder(self.source) else self._write_checkpoint()

    def _write_checkpoint(self) -> Path:
        from ldm.checkpoint import check_suffix, save_state_dict
        from ldm.records import write_record

        out = check_suffix(self.out)
        run, checkpoint, state = self._read_weights()
        save_state_dict(state, out, self.overwrite)
        write_record(out.with_suffix(".json"), self, overwrite=True, run=run.path.name, checkpoint=checkpoint.name)
        print(out)
        return out

    def _read_weights(self) -> tuple[RunDirectory, Path, dict[str, Tensor]]:
        """Return the run, its checkpoint and the weights: averaged where the run kept averages, or those of --ema."""
        from ldm.checkpoint import averaged, load_checkpoint, unwrap_state_dict
        from ldm.models.diffusion.weights import drop_alignment
        from ldm.training.posthoc import put_averages, read_averages
        from ldm.training.runs import find_run

        run, checkpoint = find_run(self.source, self.epoch)
        if run.has_config:
            run.config()  # a run of which other commands refuse the config is not passed on
        content = load_checkpoint(checkpoint)
        if {"component", "components"} & set(content):
            raise ValueError(
                f"{checkpoint} holds the heads of members alone, and no base checkpoint: export the run of the base "
                "model, or gather the members with save_ensemble.py"
            )
        state = unwrap_state_dict(content, checkpoint)
        if self.ema is None:
            return run, checkpoint, drop_alignment(averaged(state))
        # A checkpoint in the middle of a run has the average of what was before it.
        middle = checkpoint.name != "last.ckpt"
        found = read_averages(run, self.ema, content["global_step"] if middle else None)
        return run, checkpoint, drop_alignment(put_averages(state, found))

    def _share(self) -> Path:
        """Write the folder of a model or an ensemble with its card, and send it where that is asked for."""
        from omegaconf import OmegaConf

        from ldm.ensembles.storage import read_ensemble
        from ldm.files import atomic_write
        from ldm.interop.cards import UNCERTAINTY_TABLE, Card
        from ldm.interop.sharing import HUB, check_hub_name, push_folder, write_shared_ensemble, write_shared_model
        from ldm.records import record, write_record
        from ldm.report.class_pages import read_classes, read_summary

        out = Path(self.out)
        name = None if self.push_to_hub is None else check_hub_name(self.push_to_hub)
        described: Mapping[str, Any] = {}
        config: Mapping[str, Any]
        table: Sequence[Mapping[str, Any]] = ()
        summary: Mapping[str, Any] = {}
        members = 0
        if (Path(self.source) / "ensemble.yaml").is_file():
            if self.ema is not None or self.epoch is not None:
                raise ValueError("--ema and --epoch choose weights of a run, and --run is an ensemble: leave them out")
            spec = read_ensemble(self.source).spec
            write_shared_ensemble(self.source, out, self.overwrite)
            config, members = OmegaConf.create(dict(spec["config"])), len(spec["members"])
            described = spec if spec.get("bins") else {**spec, **self._describe_data(config)}
            tables = Path(self.source).rglob(UNCERTAINTY_TABLE)
            newest = max(tables, key=lambda path: path.stat().st_mtime, default=None)
            if newest is not None:
                table, summary = read_classes(newest), read_summary(newest)
        else:
            run, _, state = self._read_weights()
            config = run.config()
            write_shared_model(out, state, config, self.overwrite)
            described = self._describe_data(config)
        place = str(out) if name is None else f"{HUB}{name}"
        title = (name or out.name).rpartition("/")[2]
        card = Card(title, place, config, described, members, table, summary, record(self))
        with atomic_write(out / "README.md", overwrite=True) as partial:
            partial.write_text(card.render(), encoding="utf-8")
        write_record(out / "record.json", self, overwrite=True)
        print(out if name is None else push_folder(out, name, self.private))
        return out

    def _describe_data(self, config: Any) -> dict[str, Any]:
        """Return what the training data of a config tell, their own numbers of images where there are no bins."""
        from ldm.training.gathering import count_training_images, describe_training_data

        try:
            told = describe_training_data(config)
            return {**told, "bins": told["bins"] or count_training_images(config)}
        except (ValueError, FileNotFoundError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            print(f"the card counts no training images, since the training data cannot be read: {reason}")
            return {}

    def _write_folder(self) -> Path:
        from ldm.interop.export import export_folder
        from ldm.pipelines import load_model
        from ldm.records import write_record

        if self.base is None:
            model = load_model(self.source, epoch=self.epoch, device="cpu")
        else:
            model = load_model(base=self.base, ckpt=self.source, device="cpu")
        out = export_folder(model.model, self.out, self.overwrite)
        write_record(out / "record.json", self, overwrite=True, checkpoint=str(model.checkpoint))
        print(out)
        return out

    def _import_folder(self) -> Path:
        from omegaconf import OmegaConf

        from ldm.checkpoint import check_suffix, save_state_dict
        from ldm.files import atomic_write
        from ldm.pipelines import load_model
        from ldm.records import refuse_existing, write_record

        out = check_suffix(self.out)
        config = out.with_suffix(".yaml")
        refuse_existing([out, config], self.overwrite)
        model = load_model(diffusers=self.source, device="cpu")
        save_state_dict(model.model.state_dict(), out, self.overwrite)
        heading = f"# The model of a folder of diffusers, {Path(self.source).name}, as `decu export` read it.\n"
        said = OmegaConf.create(dict(model.config))
        said.model.params.pretrained_path = str(out)  # members start from it
        with atomic_write(config, self.overwrite) as partial:
            partial.write_text(heading + OmegaConf.to_yaml(said), encoding="utf-8")
        write_record(out.with_suffix(".json"), self, overwrite=True)
        print(out)
        return out
