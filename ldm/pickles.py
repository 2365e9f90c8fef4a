"""Weights of a module that was pickled whole, as NVIDIA publishes them; nothing that the pickle names is run.

`torch_utils.persistence` pickles a module with the source text of its class. Here whatever a pickle names becomes an
inert record of its arguments and state, but for tensors, dictionaries and sets; the weights are then found by the names
that `torch.nn.Module` keeps them under. Source: github.com/NVlabs/edm (Karras et al. 2022, arXiv 2206.00364).
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BROKEN_PICKLE = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(OverflowError, MemoryError, SystemError, RuntimeError),
)
PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"


def check_sizes(content: bytes) -> None:
    """Refuse a pickle whose parts claim more memory than its own size, which a few bytes can do.

    Raises:
        ValueError: naming the part.
    """
    for code, argument, position in pickletools.genops(content):  # itself refuses strings longer than the rest
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= argument <= len(content):
            raise ValueError(f"at byte {position} it asks for a memo of {argument} places")


@dataclass(frozen=True)
class PickledModule:
    """A module that was pickled whole.

    Attributes:
        class_name: of the module.
        state: its state dict.
    """

    class_name: str
    state: dict[str, Tensor]


class Unread:
    """What a pickle would have made by something that it names: the arguments and the state that it gives."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_keywords: Any) -> Unread:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Items are not kept: no weights are among them."""

    def append(self, _item: Any) -> None:
        """Entries of a list are not kept either."""

    def extend(self, _items: Any) -> None:
        """See `append`."""

    @property
    def described(self) -> Mapping[str, Any]:
        """What was pickled of a class with its source text; empty for anything else."""
        meta = self.args[0] if self.name == PERSISTENT and self.args else None
        return meta if isinstance(meta, Mapping) else {}

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The attributes of the object that was pickled."""
        state = self.described.get("state", self.state)
        return state if isinstance(state, Mapping) else {}


class InertUnpickler(pickle.Unpickler):
    """An unpickler that makes tensors and plain containers, and `Unread` of all else.

    What it allows is bound to the unpickler, so that a pickle cannot set attributes on it.

    Args:
        content: of the pickle.
        read_storage: reads the bytes that torch pickles a storage as, without running any of it.
    """

    def __init__(self, content: bytes, read_storage: Callable[[bytes], Any]):
        super().__init__(io.BytesIO(content))
        self._read_storage = read_storage
        self._allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
            ("torch._utils", "_rebuild_tensor_v2"): self._make_tensor,
            ("torch._utils", "_rebuild_parameter"): self._make_parameter,
            ("torch.storage", "_load_from_bytes"): self._make_storage,
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed function or class; for any other name a class of `Unread`, without importing anything."""
        found = self._allowed.get((module, name))
        return type("Unread", (Unread,), {"name": f"{module}.{name}"}) if found is None else found

    def _make_storage(self, content: bytes) -> Any:
        return self._read_storage(content)

    def _make_tensor(self, storage: Any, offset: int, size: tuple, stride: tuple, *_rest: Any) -> Tensor:
        if not isinstance(storage, torch.storage.TypedStorage):
            raise pickle.UnpicklingError("a tensor of it has no storage")
        return torch._utils._rebuild_tensor(storage, offset, size, stride)

    def _make_parameter(self, data: Any, *_rest: Any) -> Any:
        return data


def read_pickled_module(path: Path, entry: str, read_storage: Callable[[bytes], Any]) -> PickledModule:
    """Read the weights of the module that a pickled dictionary holds under `entry`.

    Args:
        path: of the pickle.
        entry: name in the dictionary.
        read_storage: see `InertUnpickler`.

    Raises:
        ValueError: if the file is no such pickle; nothing of it has been run.
    """
    content = path.read_bytes()
    try:
        check_sizes(content)
        held = InertUnpickler(content, read_storage).load()
    except BROKEN_PICKLE as error:
        raise ValueError(f"{path} is no pickle of weights that can be read, or is damaged: {error}") from None
    if not isinstance(held, dict) or not isinstance(held.get(entry), Unread):
        names = ", ".join(map(str, list(held)[:8])) if isinstance(held, dict) else type(held).__name__
        raise ValueError(
            f"{path} was refused: expected a dictionary whose entry '{entry}' is a module, as NVlabs/edm publishes it; "
            f"it holds {names}. Save the state dict of its network as safetensors, and give that"
        )
    try:
        state = dict(find_weights(held[entry]))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: the module in its entry '{entry}' cannot be read: {error}") from None
    if not state:
        raise ValueError(f"{path}: its entry '{entry}' holds no weights ({held[entry].name})")
    return PickledModule(str(held[entry].described.get("class_name", "")), state)


def find_weights(module: Unread, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Find the tensors of a module and of those in it, {name in its state dict: tensor}.

    Raises:
        ValueError: for one that is no tensor.
    """
    own = module.attributes
    temporary = own.get("_non_persistent_buffers_set", ())
    buffers = {name: value for name, value in own.get("_buffers", {}).items() if name not in temporary}
    for name, value in [*own.get("_parameters", {}).items(), *buffers.items()]:
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{prefix}{name} is no tensor")
        yield f"{prefix}{name}", value
    for name, child in own.get("_modules", {}).items():
        if isinstance(child, Unread):
            yield from find_weights(child, f"{prefix}{name}.")
