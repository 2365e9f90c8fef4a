"""An ensemble on disk: `ensemble.yaml`, a reference to the base checkpoint, and one small file of heads a member.

{path}/{ensemble_name}_{dataset}_{M}/ensemble.yaml
                                     member_000.safetensors ...     keys as in the base model
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldm.checkpoint import load_state_dict, save_tensors, sha256, tensors_sha256
from ldm.ensembles.members import Members
from ldm.util import atomic_write

_FORMAT = 1
EMBEDDING_TABLE = "cond_stage_model.embedding.weight"
PUBLISHED_TABLE = re.compile(r"cond_stage_model_ensemble\.(\d+)\.embedding\.weight")
REQUIRED = ("format", "name", "trunk", "config", "heads", "patterns", "null_class", "members")


@dataclass(frozen=True)
class Ensemble:
    """What `ensemble.yaml` says (`spec`), where it lies, and the members' stacked heads."""

    folder: Path
    spec: Mapping[str, Any]
    members: Members

    @property
    def members_sha256(self) -> str:
        """SHA-256 over the members' heads: what was measured of others does not belong to these."""
        return tensors_sha256(self.members.overrides)

    def trunk(self, pretrained: str | None = None) -> Path:
        """Find the base checkpoint in this folder, where the record says, or at `pretrained`; its sha256 must agree.

        Raises:
            ValueError: if there is no such file, or it is another one.
        """
        beside = self.folder / self.spec["trunk"]["path"]
        path = beside if beside.is_file() else self.spec["trunk"]["path"]
        return verified_base(pretrained or path, self.spec["trunk"]["sha256"])


def verified_base(path: str | Path, expected: str) -> Path:
    """Return the path, if the file there has the sha256 `expected`.

    Raises:
        ValueError: if there is no such file, or it is another one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the base checkpoint is not at {path}; give its place with --pretrained PATH")
    found = sha256(path)
    if found != expected:
        raise ValueError(
            f"{path} is not the base checkpoint that the members were trained on: its sha256 begins with {found[:12]}, "
            f"expected {expected[:12]}"
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
    folder, spec = Path(folder), {"format": _FORMAT, **spec}
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
    if missing or spec["format"] != _FORMAT:
        raise ValueError(f"{file}: expected format {_FORMAT} with {list(REQUIRED)}; it lacks {missing}")
    members = [load_state_dict(folder / record["file"]) for record in spec["members"]]
    return Ensemble(folder, spec, Members.stack(members))


def load_published(path: str | Path) -> tuple[dict[str, Tensor], Members]:
    """Backbone and members of the `model.pth` that DECU's published save_ensemble.py writes.

    The file holds one class embedding a member, `cond_stage_model_ensemble.{i}.embedding.weight`, and none for the
    base model: member 0's is taken for it here, so that it is whole.

    Raises:
        ValueError: if it holds no such tables, or their numbers are not 0 .. M - 1.
    """
    state = load_state_dict(path)
    tables = {int(match[1]): state.pop(name) for name in list(state) if (match := PUBLISHED_TABLE.fullmatch(name))}
    if not tables or sorted(tables) != list(range(len(tables))):
        raise ValueError(
            f"{path} is no published ensemble: expected cond_stage_model_ensemble.0.embedding.weight and so on to "
            f"M - 1, got members {sorted(tables)}"
        )
    return {**state, EMBEDDING_TABLE: tables[0]}, Members.stack(
        [{EMBEDDING_TABLE: tables[index]} for index in range(len(tables))]
    )
