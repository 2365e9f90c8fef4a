"""Every room's `__init__.py` is its door: the names it lists exist, and any module of it can be imported first."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

ROOMS = [
    "ldm",
    "ldm.commands",
    "ldm.diffusion",
    "ldm.diffusion.samplers",
    "ldm.ensembles",
    "ldm.laplace",
    "ldm.pipelines",
    "ldm.settings",
    "ldm.uncertainty",
    "ldm.uncertainty.propagation",
]
# A function in a module of its own.
HIDES = {"ldm.diffusion.samplers": {"ancestral"}}


@pytest.mark.parametrize("room", ROOMS)
def test_listed_names_exist_and_are_explained(room):
    door = importlib.import_module(room)
    assert door.__doc__
    assert len(set(door.__all__)) == len(door.__all__)
    for name in door.__all__:
        value = getattr(door, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{room}.{name} has no docstring"


@pytest.mark.parametrize("room", ROOMS)
def test_names_do_not_hide_modules(room):
    """`from room import name` gives one thing, whether it was imported as a module before or not."""
    door = importlib.import_module(room)
    modules = {module.name for module in pkgutil.iter_modules(door.__path__)}
    assert modules & set(door.__all__) == HIDES.get(room, set())


@pytest.mark.parametrize("room", ["ldm.diffusion.ode.adaptive", "ldm.ensembles.heads", "ldm.uncertainty.branch"])
def test_a_module_can_be_imported_first(room):
    subprocess.run([sys.executable, "-c", f"import {room}"], check=True, timeout=300)
