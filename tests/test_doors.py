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


def test_any_module_can_be_imported_first():
    """One interpreter, which forgets the package before each: what it stands on is imported once."""
    code = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]:\n"
        "    for name in [name for name in sys.modules if name.partition('.')[0] == 'ldm']:\n"
        "        del sys.modules[name]\n"
        "    importlib.import_module(module)\n"
    )
    modules = ["ldm.diffusion.ode.adaptive", "ldm.ensembles.heads", "ldm.uncertainty.branch"]
    subprocess.run([sys.executable, "-c", code, *modules], check=True, timeout=300)
