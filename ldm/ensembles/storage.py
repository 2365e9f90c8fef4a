"""An ensemble on disk: `ensemble.yaml`, a reference to the base checkpoint, and one small file of heads a member.

{path}/{ensemble_name}_{dataset}_{M}/ensemble.yaml
                                     member_000.safetensors ...     keys as in the base model
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldm.arguments import check_value
from ldm.checkpoint import free_name, load_state_dict, save_tensors, sha256, tensors_sha256
from ldm.ensembles.classes import Classes, class_size_order
from ldm.ensembles.members import Members
from ldm.files import read_mapping, reading
from ldm.settings.names import suggest
from ldm.trust import accept
from ldm.util import atomic_write

_FORMAT = 1
EMBEDDING_TABLE = "cond_stage_model.embedding.weight"
PUBLISHED_TABLE = re.compile(r"cond_stage_model_ensemble\.(\d+)\.embedding\.weight")
REQUIRED = ("format", "name", "trunk", "config", "heads", "patterns", "null_class", "members")
# What a record may hold besides.
FURTHER = ("initialisation", "row_rates", "dataset", "class_names", "bins", "split", "sees", "natural", "ema")
# What is read of them; what is absent is None.
RECORD_KINDS: dict[str, Any] = {
    "name": str,
    "heads": Sequence[str],
    "patterns": Sequence[str],
    "null_class": str | None,
    "initialisation": Mapping[str, Any] | None,
    "class_names": Sequence[str] | None,
    "bins": Mapping[Any, Any] | None,
    "sees": Mapping[Any, Any] | None,
    "split": str | None,
    "natural": bool | None,
}
GATHER_AGAIN = "gather the ensemble again (decu gather --overwrite)"


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

    def base_checkpoint(self, pretrained: str | Path | None = None) -> Path:
        """Return the base checkpoint, where the record says or at `pretrained`; its sha256 must agree.

        Raises:
            ValueError: if there is no such file, or it is another checkpoint.
        """
        recorded = self.spec["trunk"]["path"]
        path = find_from(self.folder, recorded) if pretrained is None else pretrained
        return verified_base(path, self.spec["trunk"]["sha256"])


def find_from(folder: str | Path, recorded: str | Path) -> Path:
    """Return the file that a record in `folder` names: relative to the folder, or to one of those above it.

    Where there is none, the path from the folder, for a message.

    The first version recorded paths relative to where it was started, which is a folder above the record, or the
    working directory.
    """
    folder = Path(folder).resolve()
    places = [Path(os.path.normpath(place / recorded)) for place in (folder, *folder.parents, Path.cwd())]
    return next((place for place in places if place.is_file()), places[0])


def verified_base(path: str | Path, expected: str) -> Path:
    """Return the path of a base checkpoint, if the file there has the sha256 `expected`.

    Raises:
        ValueError: if there is no such file, or it is another checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"the base checkpoint is not at {path}; give its place with pretrained=PATH (--pretrained PATH)"
        )
    found = sha256(path)
    if found != expected:
        raise ValueError(
            f"{path} is not the base checkpoint that the members were trained on (sha256 {found[:12]}, expected "
            f"{expected[:12]})"
        )
    return path


def write_ensemble(
    folder: str | Path,
    spec: Mapping[str, Any],
    members: Sequence[Mapping[str, Tensor]],
    overwrite: bool = False,
    prepare: Callable[[Path], object] | None = None,
) -> Path:
    """Write an ensemble; `spec` needs all of `REQUIRED` but format, its `members` one record for each of `members`.

    The path of the base checkpoint is recorded relative to the folder, so that the ensemble opens from anywhere.
    Members get names that are free and the record is written last: whoever is killed before leaves the earlier
    ensemble whole.

    Args:
        prepare: called with the folder before the record is written, for what belongs beside it.

    Raises:
        FileExistsError: if there is an ensemble and `overwrite` is False.
        ValueError: if the record is incomplete, or the members' heads differ in names or shapes.
    """
    folder = Path(folder)
    spec = {"format": _FORMAT, **spec}
    missing = [key for key in REQUIRED if key not in spec]
    if missing or len(spec["members"]) != len(members):
        raise ValueError(f"the ensemble's record lacks {missing} or does not list its {len(members)} members")
    Members.stack(members)
    if (folder / "ensemble.yaml").exists() and not overwrite:
        raise FileExistsError(f"{folder} holds an ensemble; use --overwrite to replace it")
    earlier = set(folder.glob("member_*.safetensors"))
    records = []
    for number, (record, heads) in enumerate(zip(spec["members"], members, strict=True)):
        file = free_name(folder, f"member_{number:03d}", ".safetensors")
        metadata = {key: str(value) for key, value in record.items()}
        save_tensors(heads, folder / file, metadata)
        records.append({**record, "file": file, "sha256": tensors_sha256(heads)})
    base = {**spec["trunk"], "path": _relative_to(folder, spec["trunk"]["path"])}
    if prepare is not None:
        prepare(folder)
    with atomic_write(folder / "ensemble.yaml", overwrite=True) as partial:
        partial.write_text(yaml.safe_dump({**spec, "trunk": base, "members": records}, sort_keys=False))
    for replaced in earlier:
        replaced.unlink()
    return folder


def _relative_to(folder: Path, path: str | Path) -> str:
    """Return a path relative to the folder; one that is found in the folder already stays as it is."""
    if not Path(path).is_absolute() and (folder / path).is_file():
        return str(path)
    return os.path.relpath(path, folder)


def read_ensemble(folder: str | Path) -> Ensemble:
    """Read an ensemble, members and record.

    Raises:
        ValueError: if the folder holds none, or one of another format.
    """
    folder = Path(folder)
    file = folder / "ensemble.yaml"
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no ensemble.yaml; make an ensemble with save_ensemble.py, and pass its folder"
        )
    spec = accept(read_mapping(file, "an ensemble's record", GATHER_AGAIN, REQUIRED), file)
    _check_record(file, spec)
    members = []
    for record in spec["members"]:
        heads = load_state_dict(folder / record["file"])
        # Of the tensors: the bytes of a file with metadata differ each time it is written.
        if "sha256" in record and tensors_sha256(heads) != record["sha256"]:
            raise ValueError(
                f"{folder / record['file']} is not the file that {file} was written with: gather the ensemble again"
            )
        members.append(heads)
    with reading(file, "the record of members that fit together", GATHER_AGAIN):
        return Ensemble(folder, spec, Members.stack(members))


def _check_record(file: Path, spec: Mapping[str, Any]) -> None:
    """Make sure that a record's sections hold what is read of them, and that its keys are known.

    Raises:
        ValueError: naming the key that does not.
    """
    if spec["format"] != _FORMAT:
        raise ValueError(f"{file} has format {spec['format']}, expected format {_FORMAT}: {GATHER_AGAIN}")
    for key in spec:
        if key not in REQUIRED + FURTHER:
            raise ValueError(f"{file} has an unknown key '{key}'{suggest(str(key), REQUIRED + FURTHER)}")
    trunk, config, members = spec["trunk"], spec["config"], spec["members"]
    if not isinstance(trunk, dict) or not {"path", "sha256"} <= trunk.keys():
        raise ValueError(f"{file} must name its base checkpoint under trunk by path and sha256: {GATHER_AGAIN}")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{file} must hold the config of its model under config: {GATHER_AGAIN}")
    listed = isinstance(members, list) and all(isinstance(one, dict) and "file" in one for one in members)
    if not listed or not members:
        raise ValueError(f"{file} must list its members, at least one, each with its file: {GATHER_AGAIN}")
    for key, kind in RECORD_KINDS.items():
        check_value(spec.get(key), kind, f"{file}: {key}")
    for key in ("path", "sha256"):
        check_value(trunk[key], str, f"{file}: trunk.{key}")
    for number, member in enumerate(members):
        check_value(member["file"], str, f"{file}: members.{number}.file")
    with reading(file, "an ensemble's record", GATHER_AGAIN):
        classes = Classes.from_record(spec, 0, len(members))
        sorted(classes.sizes.values(), key=class_size_order)
    names = [one["file"] for one in members]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{file} lists {twice} twice, and a member counts once: {GATHER_AGAIN}")


def read_published(path: str | Path) -> tuple[dict[str, Tensor], Members]:
    """Read base weights and members of the `model.pth` that DECU's published save_ensemble.py writes.

    The file holds one class embedding a member, `cond_stage_model_ensemble.{i}.embedding.weight`, and none for the
    base: member 0's is the base's here, so that the base is a whole model.

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
