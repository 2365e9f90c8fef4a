"""What is made of a posterior by commands: sweep, filtering, variants."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from ldm.commands.evaluate_metrics import EvaluateMetrics, MetricName, MetricSettings
from ldm.commands.images import ImageSource
from ldm.commands.laplace_filter import FilterLaplace
from ldm.commands.laplace_resample import Kind, ResampleLaplace
from ldm.commands.laplace_sample import SampleLaplace
from ldm.commands.laplace_sweep import SweepLaplace
from ldm.evaluation.metrics import METRICS
from ldm.images import to_uint8
from ldm.settings import Sampling
from ldm.uncertainty.resampling import VARIANT_KINDS
from tests.cli import call
from tests.posteriors import CPU, table, write_posterior


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_posterior(tmp_path_factory.mktemp("laplace"))


def test_the_commands_know_what_the_library_measures():
    assert get_args(MetricName) == tuple(METRICS) and get_args(Kind) == VARIANT_KINDS


def test_the_sweep_scales_as_the_formulas_say(place, tmp_path):
    sweep = SweepLaplace(out=str(tmp_path / "sweep"), sigmas=(0.05, 0.5), precisions=(1.0, 100.0), n=3, **place.shared)
    with pytest.raises(ValueError, match="--image below it"):
        replace(sweep, image=3)
    rows = sweep.run()
    totals = {(row["sigma_noise"], row["prior_precision"]): row["total"] for row in rows}
    assert totals[0.5, 1.0] == pytest.approx(100 * totals[0.05, 100.0], rel=1e-3)
    assert all(0 <= row["slope_sigma"] <= 2.001 for row in rows if row["slope_sigma"] is not None)
    assert all(-1.001 <= row["slope_precision"] <= 0 for row in rows if row["slope_precision"] is not None)
    maps = np.load(tmp_path / "sweep" / "sweep.npz")["maps"]
    assert maps.shape == (2, 2, 3, 8, 8)
    alone = []
    for size in (1, 2):
        out = tmp_path / str(size)
        one = replace(sweep, sigmas=(0.5,), precisions=(1.0,), n=2, method="persistent", batch_size=size, out=str(out))
        replace(one, sampling=Sampling(steps=2)).run()
        alone.append(np.load(out / "sweep.npz")["maps"])
    np.testing.assert_allclose(*alone, rtol=1e-3, atol=1e-4 * alone[0].max())
    with pytest.raises(FileExistsError, match="holds a sweep"):
        sweep.run()


def test_filtering_keeps_the_certain_and_compares_with_chance(place, tmp_path):
    samples, ref, out = tmp_path / "samples", str(place.folder / "ref"), tmp_path / "filtered"
    quick = {"n": 30, "batch_size": 30, "shown": 1, "control_maps": ("edges",)}
    SampleLaplace(out=str(samples), method="path", **quick, **place.shared).run()
    command = FilterLaplace(str(samples), str(out), ref, keep=0.5, random=3, place=CPU)
    rows = command.run()
    scores = [float(row["sum"]) for row in table(samples / "scores.csv")]
    kept = [int(line) for line in (out / "kept" / "sum.txt").read_text().split()]
    assert len(kept) == 15 and max(scores[i] for i in kept) <= min(scores[i] for i in set(range(30)) - set(kept))
    found = {row["removed by"]: row for row in rows}
    assert {"none", "sum", "patch_max", "random", "random, s.d."} <= set(found)
    assert found["none"]["z_fid"] is None and found["none"]["kept"] == 30
    keep = ImageSource(images=str(samples / "samples.npz"), keep=str(out / "kept" / "sum.txt"))
    quick = {"metrics": ("fid",), "settings": MetricSettings(fid_resamples=0), "place": CPU}
    (row,) = EvaluateMetrics(keep, ref, str(tmp_path / "calc"), **quick).run()
    assert row.value == pytest.approx(found["sum"]["fid"], rel=1e-6)
    with pytest.raises(FileExistsError, match="holds a table"):
        command.run()
    command = replace(command, overwrite=True, per_class=True)
    replace(command, keep=0.67, scores=("sum",)).run()
    for name in ("sum", "random_1"):
        stayed = [int(line) % 10 for line in (out / "kept" / f"{name}.txt").read_text().split()]
        assert sorted(stayed) == sorted([*range(10)] * 2)  # two of the three images of each class
    names = ("sum", "percentile", "control_map_edges")
    sigma = replace(command, rule="sigma", metrics=("fid",), scores=names, out=str(tmp_path / "sigma"))
    found = {row["removed by"]: row for row in sigma.run()}
    features, reference = (
        np.load(at / "pooled.npy").astype(float) for at in (tmp_path / "sigma/features", place.folder / "ref")
    )
    for name in names:
        values = np.array([float(row[name]) for row in table(samples / "scores.csv")])
        kept = [i for i in range(30) if values[i] <= values[i % 10 :: 10].mean() + values[i % 10 :: 10].std()]
        assert found[name]["kept"] == len(kept)
        counts = np.bincount(np.array(kept) % 10, minlength=10)
        files = [np.loadtxt(file, dtype=int) for file in (tmp_path / "sigma" / "kept").glob("random*.txt")]
        alike = [own for own in files if (np.bincount(own % 10, minlength=10) == counts).all()]
        assert len(alike) == 3
        chance = [frechet(features[own], reference) for own in alike]
        expected = (np.mean(chance) - frechet(features[kept], reference)) / np.std(chance, ddof=1)
        assert found[name]["z_fid"] == pytest.approx(expected, rel=1e-4)


def frechet(a, b):
    """Fréchet distance by the eigenvalues of the covariances' product."""
    covariances = [np.cov(features, rowvar=False) for features in (a, b)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances)) - 2 * roots.sum()


def test_variants_of_a_cut(place, tmp_path):
    command = ResampleLaplace(
        cut=2,
        n=4,
        variants=3,
        kinds=("variance", "uniform", "members"),
        classifier=place.classifier,
        out=str(tmp_path / "out"),
        **place.shared,
    )
    rows = command.run()
    assert [row["kind"] for row in rows] == ["variance", "uniform", "members"]
    assert all(row["diversity"] > 0 for row in rows)
    pipeline = place.load()
    plain = to_uint8(pipeline.decode(pipeline.sample_latents(range(4), range(4))))
    pictures = np.load(tmp_path / "out" / "variants_uniform.npz")["arr_0"].reshape(4, 3, 8, 8, 1)
    np.testing.assert_array_equal(pictures[:, 0], plain)
    with pytest.raises(ValueError, match="--cut 4"):
        replace(command, cut=4, out=str(tmp_path / "no")).run()
    with pytest.raises(ValueError, match="3 --draws for 4 --variants"):
        replace(command, variants=4, posterior=replace(place.posterior, draws=2))


def test_the_studies_take_words(place, tmp_path):
    """One of each, and an option that none of them has."""
    sweep = [*place.words, "--method", "persistent"]
    call("laplace sweep", [*sweep, "--sigmas", "0.1", "--precisions", "1", "--n", "2", "--out", tmp_path / "a"])
    call("laplace resample", [*place.words, "--cut", "1", "--n", "1", "--kinds", "uniform", "--out", tmp_path / "b"])
    assert (tmp_path / "a" / "sweep.csv").exists() and (tmp_path / "b" / "numbers.csv").exists()
    with pytest.raises(SystemExit):
        call("laplace filter", ["--samples", "a", "--ref", "b", "--out", "c", "--rule", "none"])


def test_a_curvature_that_was_not_gathered_is_an_error(place, tmp_path):
    published = replace(place.published, curvature="full")
    with pytest.raises(ValueError, match="did not gather"):
        SampleLaplace(place.model, published, str(tmp_path / "samples"), place=CPU).run()
