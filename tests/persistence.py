"""Files as NVIDIA publishes its networks: modules pickled whole with the source text of their classes."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch import nn

EXECUTED = "raise RuntimeError('the text of the class was run')"


class Persistent:
    """Pickles a module as NVIDIA's `torch_utils.persistence` does: a hook's name, and the text and state of a class."""

    def __init__(self, module, class_name):
        self.module, self.class_name = module, class_name

    def __reduce__(self):
        state = dict(self.module.__dict__)
        state["_modules"] = OrderedDict(
            (name, child if isinstance(child, nn.ModuleDict) else Persistent(child, type(child).__name__))
            for name, child in state["_modules"].items()
        )
        state["_init_kwargs"] = {"skip_scale": np.sqrt(0.5)}
        meta = {"type": "class", "version": 6, "module_src": EXECUTED, "class_name": self.class_name, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def _reconstruct_persistent_obj(meta):
    exec(meta["module_src"])


def write_published(content: Any, path: Path) -> Path:
    """Write what is given, `Persistent` modules among it, as NVIDIA's pickles are written."""
    with pytest.MonkeyPatch.context() as during:
        hooks = ModuleType("torch_utils.persistence")
        hooks._reconstruct_persistent_obj = _reconstruct_persistent_obj
        during.setitem(sys.modules, "torch_utils", ModuleType("torch_utils"))
        during.setitem(sys.modules, "torch_utils.persistence", hooks)
        during.setattr(_reconstruct_persistent_obj, "__module__", "torch_utils.persistence")
        path.write_bytes(pickle.dumps(content))
    return path
