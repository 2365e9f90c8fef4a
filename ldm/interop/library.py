"""diffusers as a library: whether it is installed, and which of its classes are taken.

Nothing of a folder is executed. A class is taken where its name stands in a table here, never by what a folder says.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

from torch import nn

from ldm.util import DIFFUSERS_TARGETS, get_obj_from_str


def require_diffusers() -> ModuleType:
    """Return the library.

    Raises:
        ValueError: naming the extra, where it is not installed.
    """
    try:
        # transformers says at every import that torchvision, which nothing here needs, is missing.
        logging.getLogger("transformers").setLevel(logging.ERROR)
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"models of diffusers need the extra `diffusers`: pip install 'decu-uncertainty[diffusers]' ({error})"
        ) from None


def find_class(name: str) -> type[nn.Module]:
    """Return our subclass of a class of diffusers, which has its constructor and its key names.

    Raises:
        ValueError: for a class that is not taken, with those that are.
    """
    target = f"diffusers.{name}"
    if target not in DIFFUSERS_TARGETS:
        known = ", ".join(sorted(name.removeprefix("diffusers.") for name in DIFFUSERS_TARGETS))
        raise ValueError(f"expected one of diffusers' classes {known}; got '{name}'")
    require_diffusers()
    return get_obj_from_str(target)
