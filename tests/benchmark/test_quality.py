"""What is left of pictures, noise levels and averaged members, on cases whose answers are known."""

import numpy as np
import pytest
import torch

from ldm.benchmark.averaging import AVERAGED_METRICS, LOSS_NAME, compare_averaging, find_losses
from ldm.benchmark.cells import RETRAINED
from ldm.benchmark.levels import compare_levels, list_sources
from ldm.benchmark.measures import HALF
from ldm.benchmark.quality import PICTURE_METRICS, KeptPictures, PictureJudge
from ldm.ensembles.members import MemberNetwork
from ldm.experiments.small_networks import draw_noised
from ldm.util import generator


@pytest.fixture(scope="module")
def judge(images):
    return PictureJudge.make(images)


def test_held_back_images_are_good_and_noise_is_not(judge, images):
    good = judge.measure(judge.features(images.tests))
    noise = torch.rand(360, 64, generator=generator("noise")) * 2 - 1
    bad = judge.measure(judge.features(noise))
    assert good["FD"] == pytest.approx(0, abs=1e-6)
    assert good["precision"] == good["recall"] == 1
    assert all(sign * (good[name] - bad[name]) > 0 for name, sign in PICTURE_METRICS.items())
    assert judge.recognised(images.tests, images.test_labels).mean() > 0.9


def test_random_removals_keep_the_metrics_and_removing_noise_mends_them(judge, images):
    noise = torch.rand(20, 64, generator=generator("noise")) * 2 - 1
    pictures = torch.cat([images.tests[:80], noise])
    kept = KeptPictures(judge, judge.features(pictures), 0)
    gained = kept.values(torch.arange(80)) - kept.at_random(80)
    signs = np.array(list(PICTURE_METRICS.values()))
    assert (signs * gained)[[0, 1, 2]].min() > 0


def test_levels_of_twice_the_deviation_have_four_times_the_variance():
    truth = torch.rand(9, 20, 6, generator=generator("truth")) + 0.1
    other = torch.rand(9, 20, 6, generator=generator("other"))
    seeds = [{RETRAINED: truth, "other half of the oracle": truth, HALF: truth, "wide": 4 * truth, "else": other}] * 2
    rows = compare_levels(seeds)
    wide = [row for row in rows if row["weights"] == "wide"]
    assert len(wide) == 9
    assert all(row["ratio"] == pytest.approx(4) and row["pixel ranks"] == pytest.approx(1) for row in wide)
    assert max(abs(row["picture ranks"]) for row in rows if row["weights"] == "else") < 0.8


def test_sources_hold_the_oracle_and_its_halves(problem):
    found = list_sources(problem)
    assert len(found[RETRAINED]) == 4
    assert len(found[HALF]) == 2
    assert len(found["last layer refitted"]) == problem.settings.refits


def test_mean_of_outputs_has_the_loss_of_the_mean_minus_the_variance(problem):
    """Squared errors: that of the mean is the members' mean less their variance, whatever they say."""
    network = MemberNetwork(problem.base, problem.trained.ensemble)
    losses = find_losses(problem, network)
    images = problem.trained.source
    rows = draw_noised(images.tests.repeat(4, 1), images.test_labels.repeat(4), generator("held-back loss", 0), "v")
    outputs = network(images.square(rows.x), rows.t, rows.cond)
    variance = outputs.var(0, unbiased=False).mean()
    torch.testing.assert_close(losses[-1], losses[:-1].mean() - variance)


def test_averages_that_are_better_at_every_seed_are_said_to_be(judge, images):
    labels = images.test_labels[:60]
    seeds = []
    for number in range(4):
        noise = torch.randn(2, 60, 64, generator=generator("pictures", number))
        own = {"x/single": images.tests[:60] + noise, "x/together": images.tests[:60] + 0.01 * noise[0]}
        seeds.append(own | {"x/losses": torch.tensor([1.0, 1.0, 1.0])})
    rows = compare_averaging({"few": seeds}, judge, labels)
    by = {row["metric"]: row for row in rows}
    assert set(by) == set(AVERAGED_METRICS)
    assert by["recognised"]["better"]
    assert by["FD"]["gain"] > 0
    assert by[LOSS_NAME]["gain"] == 0
    assert not by[LOSS_NAME]["better"]
