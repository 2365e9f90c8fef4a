"""Metrics by name, extraction to disk, and the study of sample sizes."""

import math

import numpy as np
import pytest
import torch

from ldm.evaluation import cmmd as cmmd_module
from ldm.evaluation import extraction
from ldm.evaluation import precision_recall as precision_module
from ldm.evaluation.cmmd import cmmd, cubic_kernel, mmd2
from ldm.evaluation.extraction import FeatureSet, extract, is_feature_folder, open_features
from ldm.evaluation.extractors import make_extractor
from ldm.evaluation.features import Activations, Extractor
from ldm.evaluation.fid import frechet_distance
from ldm.evaluation.inception_score import inception_score, probabilities
from ldm.evaluation.metrics import METRICS, Options, Reference, measure, obstacle, warn_of_few_images
from ldm.evaluation.precision_recall import density_coverage, precision_recall
from ldm.evaluation.sample_sizes import sample_sizes, summarise_sizes, without_bias
from ldm.evaluation.statistics import BLOCK, FeatureStatistics, moments
from ldm.pipelines.images import TensorImages
from ldm.util import generator

FEW = Options(resamples=20, fid_resamples=3, kid_subsets=4, kid_subset_size=20, splits=2)


def draw(*shape, key=0):
    return torch.randn(shape, generator=generator("metrics", key), dtype=torch.float64)


def feature_set(count, key, shift=0.0):
    return FeatureSet(
        *(draw(count, size, key=10 * key + size).float().numpy() + np.float32(shift) for size in (6, 4, 5))
    )


def test_a_distance_of_fewer_images_than_features_says_so():
    few, many = feature_set(5, 1), feature_set(6, 2)
    (said,) = warn_of_few_images(["fid", "kid"], many, few)
    assert said.startswith("fid of 5 images of the samples in 6 features")
    assert [line.split()[0] for line in warn_of_few_images(["fid", "sfid"], many, few)] == ["fid", "sfid"][:1]


@pytest.fixture(scope="module")
def sets():
    return feature_set(90, 1), feature_set(70, 2, 0.4)


def test_every_row_is_its_function(sets):
    reference, samples = sets
    rows = {row.metric: row for row in measure(METRICS, reference, samples, FEW)}
    expected = {
        "fid": frechet_distance(*(moments(s.pooled).statistics() for s in sets)),
        "sfid": frechet_distance(*(moments(s.spatial).statistics() for s in sets)),
        "is": float(inception_score(probabilities(samples.logits))),
        "is_2_splits": float(inception_score(probabilities(samples.logits), 2, seed=0).mean()),
        "kid": mmd2(cubic_kernel, reference.pooled, samples.pooled).estimate,
        "cmmd": cmmd(reference.pooled, samples.pooled).estimate,
        "cmmd_biased": cmmd(reference.pooled, samples.pooled, biased=True).estimate,
        "precision": precision_recall(reference.pooled, samples.pooled).precision.estimate,
        "recall": precision_recall(reference.pooled, samples.pooled).recall.estimate,
        "density": density_coverage(reference.pooled, samples.pooled).density.estimate,
        "coverage": density_coverage(reference.pooled, samples.pooled).coverage.estimate,
    }
    assert set(rows) == {*expected, "kid_subsets", "is_corrected"}
    for name, value in expected.items():
        assert rows[name].value == pytest.approx(value, rel=1e-9), name
        assert rows[name].low <= rows[name].value <= rows[name].high, name
        assert rows[name].interval and rows[name].n == 70, name
    assert rows["is"].n_reference is None and rows["fid"].n_reference == 90


def test_a_reference_keeps_what_it_computed_for_its_own_settings(sets):
    reference = Reference(sets[0])
    for sigma, k in ((10.0, 3), (2.0, 5), (10.0, 3)):
        rows = measure(["cmmd", "precision_recall"], reference, sets[1], Options(0, 0, sigma=sigma, precision_k=k))
        assert rows[0].value == pytest.approx(cmmd(sets[0].pooled, sets[1].pooled, sigma).estimate)
        assert rows[1].value == precision_recall(sets[0].pooled, sets[1].pooled, k).precision.estimate


def test_statistics_alone_are_enough_for_fid_and_nothing_else(sets):
    reference = FeatureSet(given={"pooled": moments(sets[0].pooled).statistics()})
    (row,) = measure(["fid"], reference, sets[1], Options(fid_resamples=0))
    assert row.value == pytest.approx(measure(["fid"], *sets, Options(fid_resamples=0))[0].value)
    assert math.isnan(row.low) and row.interval == ""
    assert obstacle("is", reference, sets[1]) is None
    assert "no statistics of spatial" in obstacle("sfid", reference, sets[1])
    with pytest.raises(ValueError, match="statistics only"):
        measure(["kid"], reference, sets[1])
    with pytest.raises(ValueError, match="no logits"):
        measure(["is"], reference, FeatureSet(pooled=sets[1].pooled))
    with pytest.raises(ValueError, match="unknown metric 'lpips'"):
        measure(["lpips"], *sets)


def test_sample_sizes_show_the_bias_of_fid_and_none_of_kid():
    """Samples of the reference's law: FID is bias alone, which falls as 1/N; KID is 0 at every size."""
    reference = FeatureSet(given={"pooled": FeatureStatistics(torch.zeros(6).double(), torch.eye(6).double())})
    reference = Reference(FeatureSet(pooled=draw(800, 6, key=1), given=reference.given))
    samples = FeatureSet(pooled=draw(800, 6, key=2))
    rows = sample_sizes(["fid", "kid"], reference, samples, [50, 100, 800], repeats=6)
    assert [sum(row.metric == "fid" and row.size == size for row in rows) for size in (50, 100, 800)] == [6, 6, 1]
    found = {(s.metric, s.size): s for s in summarise_sizes(rows)}
    assert found["fid", 50].mean / found["fid", 100].mean == pytest.approx(2, rel=0.3)
    assert found["fid", 800].percent == 100 and found["fid", 50].percent > 500
    assert abs(found["kid", 50].mean) < 4 * found["kid", 50].error
    assert abs(without_bias(rows)) < 0.1 * found["fid", 50].mean
    again = sample_sizes(["fid"], reference, samples, [50], repeats=2)
    assert [row.value for row in again] == [row.value for row in rows if row.metric == "fid" and row.size == 50][:2]
    with pytest.raises(ValueError, match=r"2\.\.800"):
        sample_sizes(["fid"], reference, samples, [900])


class Sums(Extractor):
    """Features that can be computed by hand; counts the images it sees."""

    name, channels, num_features = "sums", 1, 2

    def __init__(self):
        super().__init__()
        self.seen = 0

    def activations(self, images):
        self.seen += len(images)
        flat = self.prepared(images).float().flatten(1)
        return Activations(torch.stack((flat.sum(1), flat.square().sum(1)), 1), spatial=flat[:, :3])

    def describe(self):
        return {"extractor": "sums", "sha256": "0"}


def pictures(count, key=0):
    size = (count, 1, 4, 4)
    return torch.randint(256, size, generator=generator("pictures", key), dtype=torch.uint8)


def test_processes_share_an_extraction_and_a_stopped_one_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "PART", 10)
    source, extractor = TensorImages(pictures(35)), Sums()
    assert extract(source, extractor, tmp_path, batch_size=4, shard=(1, 2)) is None
    assert extractor.seen == 15 and is_feature_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no complete features"):
        open_features(tmp_path)
    steps = []
    found = extract(source, extractor, tmp_path, batch_size=7, progress=steps.append)
    assert extractor.seen == 35
    assert steps == [15, 7, 3, 7, 3], "what was there at once, then batch by batch"
    flat = pictures(35).float().flatten(1)
    np.testing.assert_array_equal(found.pooled[:, 0], flat.sum(1))
    np.testing.assert_array_equal(found.spatial, flat[:, :3])
    assert found.logits is None and isinstance(found.pooled, np.memmap)
    np.testing.assert_allclose(found.statistics("pooled").mean, found.pooled.mean(0, dtype=np.float64))
    extract(source, extractor, tmp_path)
    assert extractor.seen == 35, "all was there"
    for other in (pictures(36), pictures(35, key=1)):
        with pytest.raises(ValueError, match="other settings"):
            extract(TensorImages(other), extractor, tmp_path)


def test_changed_images_are_measured_and_named(tmp_path):
    change = {"change": lambda images, positions: images // 2, "change_settings": {"distortion": "half"}}
    found = extract(TensorImages(pictures(5)), Sums(), tmp_path, **change)
    np.testing.assert_array_equal(found.pooled[:, 0], (pictures(5) // 2).float().flatten(1).sum(1))
    assert found.settings["change"] == {"distortion": "half"}
    chosen = found.rows(np.array([3, 1]))
    np.testing.assert_array_equal(chosen.pooled, found.pooled[[3, 1]])


class Rows:
    """Features that tell how many rows were asked for at once."""

    def __init__(self, values):
        self.values, self.shape, self.largest = values, values.shape, 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, chosen):
        rows = self.values[chosen]
        self.largest = max(self.largest, len(rows))
        return rows


def test_no_metric_holds_more_rows_than_a_block(monkeypatch):
    for module in (cmmd_module, precision_module):
        monkeypatch.setattr(module, "TILE", 256)
    values = [draw(1300, 2, key=key).numpy() for key in (1, 2)]
    sets = [FeatureSet(pooled=Rows(array)) for array in values]
    rows = measure(["fid", "kid", "precision_recall"], *sets, Options(resamples=0, fid_resamples=0, kid_subsets=0))
    assert max(part.pooled.largest for part in sets) == BLOCK < 1300
    assert rows[0].value == pytest.approx(frechet_distance(*(moments(array).statistics() for array in values)))


def test_extractor_by_target_can_be_extracted(tmp_path):
    found = extract(TensorImages(pictures(6)), make_extractor("torch.nn.Flatten", channels=1), tmp_path)
    assert found.pooled.shape == (6, 16) and not found.has_statistics("spatial")
