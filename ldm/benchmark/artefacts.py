"""What is trained once for all methods of a benchmark: files of tensors, each with the seconds that it took."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ldm.checkpoint import load_state_dict, save_tensors
from ldm.files import read_metadata, reading

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Artefact:
    """Tensors by name, the seconds of their making, and their bytes."""

    tensors: Tensors
    seconds: float

    @property
    def bytes(self) -> int:
        """The size of what is kept on disk."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())


@dataclass
class Artefacts:
    """Artefacts of one world in a folder; what is not there is made.

    Attributes:
        folder: of the files.
        used: the artefacts asked for since it was emptied: what a method stands on.
    """

    folder: Path
    used: dict[str, Artefact] = field(default_factory=dict)
    _known: dict[str, Artefact] = field(default_factory=dict)

    def get(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Tensors:
        """Return the tensors of this name, of the file or made and written."""
        if name not in self._known:
            self._known[name] = self._read_or_make(name, make)
        self.used[name] = self._known[name]
        return self._known[name].tensors

    def note(self, name: str, tensors: Mapping[str, Tensor] | None = None, seconds: float = 0.0) -> None:
        """Say that something was used which is made in every run and not kept; with tensors, that it was made now."""
        if tensors is not None:
            self._known[name] = Artefact(dict(tensors), seconds)
        self.used[name] = self._known[name]

    def _read_or_make(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Artefact:
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            began = time.perf_counter()
            tensors = {key: value.detach() for key, value in make().items()}
            seconds = time.perf_counter() - began
            save_tensors(tensors, file, {"record": json.dumps({"seconds": seconds})}, overwrite=True)
        with reading(file, "what a benchmark kept of its work", "remove it, and start the command again"):
            seconds = json.loads(read_metadata(file, "record")["record"])["seconds"]
        return Artefact(load_state_dict(file), seconds)
