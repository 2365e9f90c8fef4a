"""Redrawn weights beside held ones, and the recursion beside the process, on a tiny model."""

from dataclasses import replace

import pytest

from benchmarks.redrawn import StudyRedrawn
from ldm.commands.line import parse
from ldm.data.digits import Digits
from ldm.laplace import save_laplace
from ldm.pipelines import new_posterior, observations
from ldm.settings import Sampling
from tests.posteriors import CPU, PosteriorSource, model_words, write_model


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("redrawn")
    model = write_model(folder)
    pipeline = model.load(Sampling(steps=2, scale=1.0), device="cpu")
    laplace = new_posterior(pipeline, prior_precision=100.0)
    save_laplace(laplace.fit(observations(pipeline.model, Digits(split="train"), range(8))), folder / "fit")
    sizes = {"n": 3, "states": 4, "numbers": (2,), "grids": (2,), "batch_size": 2}
    return StudyRedrawn(PosteriorSource(str(folder / "fit")), model, sampling=Sampling(scale=1.0), place=CPU, **sizes)


def test_the_table(study, tmp_path):
    rows = replace(study, samplers=("DDIM", "Heun"), out=str(tmp_path / "table.csv")).run()
    assert [row["sampler"] for row in rows] == ["DDIM"] * 6 + ["Heun"] * 6
    assert {row["against"] for row in rows} == {"held", "redrawn", "the other half", "the same, another seed"}
    assert all(row["total"] > 0 and -1 <= row["image"] <= 1 for row in rows)
    assert (tmp_path / "table.csv").exists()


def test_images_do_not_depend_on_their_batch(study):
    model = study.source.load(Sampling(steps=2, scale=1.0), device="cpu")
    posterior = replace(study.posterior.load(model), draws=study.states)
    apart = replace(study, batch_size=1)
    for name in ("persistent", "redrawn"):
        found, alone = (each.measure(posterior, name)[0] for each in (study, apart))
        assert float((found - alone).abs().max() / found.max()) < 1e-3
    found, alone = (each.recur(posterior, 4, 0) for each in (study, apart))
    assert float((found - alone).abs().max() / found.max()) < 1e-3


def test_words_make_the_study(study):
    words = [*model_words(study.source), "--posterior", "P", "--grids", "10", "--samplers", "DDIM", "RK4"]
    found = parse(StudyRedrawn, words, "redrawn.py")
    assert (found.posterior.posterior, found.grids, found.samplers) == ("P", (10,), ("DDIM", "RK4"))
