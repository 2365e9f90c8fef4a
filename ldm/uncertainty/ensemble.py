"""An ensemble on disk: `ensemble.yaml`, a reference to the trunk, and one small file of heads a member.

{path}/{ensemble_name}_{dataset}_{M}/ensemble.yaml
                                     member_000.safetensors ...     keys as in the base model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldm.checkpoint import load_state_dict, save_tensors, sha256
from ldm.uncertainty.posterior import Members
from ldm.util import atomic_write

FORMAT = 1
REQUIRED = ("format", "name", "trunk", "config", "heads", "patterns", "null_class", "members")


@dataclass(frozen=True)
class Ensemble:
    """What `ensemble.yaml` says (`spec`), where it lies, and the members' stacked heads."""

    folder: Path
    spec: Mapping[str, Any]
    members: Members

    def trunk(self, pretrained: str | None = None) -> Path:
        """The trunk's checkpoint, from the record or from `pretrained` where it moved; its sha256 must agree.

        Raises:
            ValueError: if there is no such file, or it is another trunk.
        """
        path = Path(pretrained or self.spec["trunk"]["path"])
        if not path.is_file():
            raise ValueError(f"the ensemble's trunk is not at {path}; give its place with --pretrained PATH")
        found, expected = sha256(path), self.spec["trunk"]["sha256"]
        if found != expected:
            raise ValueError(
                f"{path} is not the trunk that the members were trained on "
                f"(sha256 {found[:12]}, expected {expected[:12]})"
            )
        return path


def save_ensemble(
    folder: str | Path, spec: Mapping[str, Any], members: Sequence[Mapping[str, Tensor]], overwrite: bool = False
) -> Path:
    """Write an ensemble; `spec` needs all of `REQUIRED` but format, its `members` one record for each of `members`.

    Raises:
        FileExistsError: if there is an ensemble and `overwrite` is False.
        ValueError: if the record is incomplete, or the members' heads differ in names or shapes.
    """
    folder, spec = Path(folder), {"format": FORMAT, **spec}
    missing = [key for key in REQUIRED if key not in spec]
    if missing or len(spec["members"]) != len(members):
        raise ValueError(f"the ensemble's record lacks {missing} or does not list its {len(members)} members")
    Members.stack(members)
    if (folder / "ensemble.yaml").exists() and not overwrite:
        raise FileExistsError(f"{folder} holds an ensemble; use --overwrite to replace it")
    records = []
    for number, (record, heads) in enumerate(zip(spec["members"], members, strict=True)):
        file = f"member_{number:03d}.safetensors"
        metadata = {key: str(value) for key, value in record.items()}
        save_tensors(heads, folder / file, metadata, overwrite=True)
        records.append({**record, "file": file})
    with atomic_write(folder / "ensemble.yaml", overwrite=True) as partial:
        partial.write_text(yaml.safe_dump({**spec, "members": records}, sort_keys=False))
    return folder


def load_ensemble(folder: str | Path) -> Ensemble:
    """Read an ensemble.

    Raises:
        ValueError: if the folder holds none, or one of another format.
    """
    folder = Path(folder)
    file = folder / "ensemble.yaml"
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no ensemble.yaml; make an ensemble with save_ensemble.py, and pass its folder"
        )
    spec = yaml.safe_load(file.read_text())
    missing = [key for key in REQUIRED if key not in spec]
    if missing or spec["format"] != FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT} with {list(REQUIRED)}; it lacks {missing}")
    members = [load_state_dict(folder / record["file"]) for record in spec["members"]]
    return Ensemble(folder, spec, Members.stack(members))
