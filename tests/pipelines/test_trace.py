"""How much a reader must follow: what one image passes from noise to its mutual information."""

import sys
from pathlib import Path

import pytest

import ldm
from ldm import load_ensemble
from ldm.pipelines import information
from tests.ensembles import write_ensemble

ROOT = str(Path(ldm.__file__).parent) + "/"  # not the folder above: an environment may lie in it
MOST_FUNCTIONS = 60
MOST_FILES = 12
NAMELESS = ("<listcomp>", "<genexpr>", "<lambda>", "<dictcomp>", "<setcomp>", "<module>")


def traced(call, monkeypatch):
    """The functions of the project that run within `measure_round`, network modules left out: (file, name)."""
    found = set()
    within = []

    def profile(frame, event, _):
        code = frame.f_code
        name = getattr(code, "co_qualname", code.co_name)
        ours = code.co_filename.startswith(ROOT) and not code.co_filename.startswith(ROOT + "modules/")
        if event == "call" and within and ours and not name.endswith(NAMELESS):
            found.add((code.co_filename.removeprefix(ROOT), name))

    measure_round = information.measure_round

    def watched(*args):
        within.append(True)
        try:
            return measure_round(*args)
        finally:
            within.pop()

    monkeypatch.setattr(information, "measure_round", watched)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer is at work already")
def test_from_noise_to_mutual_information_in_few_functions_and_files(tmp_path, monkeypatch):
    ensemble = load_ensemble(write_ensemble(tmp_path), device="cpu")
    functions = traced(lambda: ensemble.information(classes=[0, 1], n=2), monkeypatch)
    files = {file for file, _ in functions}
    assert 30 < len(functions) <= MOST_FUNCTIONS, sorted(functions)
    assert 5 < len(files) <= MOST_FILES, sorted(files)
