"""Arguments in Python that do not fit are said in a sentence, as options are."""

import pytest

from ldm import load_model
from tests.posteriors import write_model


def test_bad_arguments_are_said(tmp_path):
    source = write_model(tmp_path)
    model = load_model(base=source.base, ckpt=source.ckpt, device="cpu")
    for call, said in (
        (lambda: model.sample(n=-1), "n must be at least 1"),
        (lambda: model.sample(n=2.5), "n must be a whole number"),
        (lambda: model.sample(classes=[1.5]), r"by its number or its name, got 1\.5"),
        (lambda: model.sample(classes=[True]), "by its number or its name, got True"),
        (lambda: model.sample(classes="38"), "'38' alone: put it into a list"),
        (lambda: load_model("nowhere", trust=[3]), "--trust takes the name of a Python package"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
