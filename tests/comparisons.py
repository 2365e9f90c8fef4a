"""Packages that tests compare with and that the project's own imports must not meet.

scripts/install.sh puts them in a folder apart: torchmetrics imports both at its start wherever they are found, which
costs every command seconds (transformers) or fails where there is no torchvision (torch-fidelity).
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

APART = Path(sys.prefix) / "comparisons"
STUBS = ("", ".datasets", ".models", ".transforms", ".transforms.functional")


class Stub(ModuleType):
    """A module whose every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def package(name: str, imports_torchvision: bool = False) -> Iterator[ModuleType]:
    """The module `name`, importable within the block; skips the test where it is not installed.

    Args:
        imports_torchvision: it imports torchvision for what the test does not use: empty classes stand in for one
            that is absent.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(APART)
        with pytest.MonkeyPatch.context() as during_import:
            if imports_torchvision and importlib.util.find_spec("torchvision") is None:
                put_stubs(during_import)
            module = pytest.importorskip(name, exc_type=ImportError)
        yield module


def put_stubs(patch: pytest.MonkeyPatch) -> None:
    """Make torchvision one that holds nothing, until the patch ends."""
    for place in STUBS:
        stub = Stub(f"torchvision{place}")
        patch.setitem(sys.modules, stub.__name__, stub)
        parent, _, last = stub.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, stub)


def hide(patch: pytest.MonkeyPatch, name: str) -> None:
    """Make a package one that is not installed, until the patch ends."""
    loaded = [module for module in sys.modules if module.startswith(f"{name}.")]
    for module in (name, *loaded):
        patch.setitem(sys.modules, module, None)


def vgg16_layers(*_, **__) -> nn.Sequential:
    """The convolutional layers of VGG16 (Simonyan & Zisserman 2014, configuration D), numbered as torchvision's."""
    layers, channels = [], 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)
