"""Measuring a tiny ensemble: what is averaged, when it stops, and that no number depends on the batch."""

import math

import pytest
import torch

from ldm import Branching, Sampling, Speed, load_ensemble
from ldm.commands.shared import EnsembleSource
from ldm.evaluation.diversity import pairwise_ssim
from ldm.modules.distributions.gaussian import Gaussian
from ldm.pipelines.information import InformationPlan, measure_classes, measure_round
from ldm.report.class_tables import class_row, summarise_classes
from ldm.stats import look_level, skewed_mean_interval
from ldm.uncertainty.information import mutual_information
from tests.ensembles import write_ensemble

# Batches of different sizes round differently; a few guided float32 steps carry it to 1e-4 of the values.
ROUNDING = {"rtol": 2e-3, "atol": 1e-9}


def loaded(folder, sampling=None, **branching):
    return load_ensemble(folder, sampling, Branching(**branching), device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ensemble(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Class 0 is hidden from member 3, class 1 from members 0 and 1, class 2 from nobody, class 4 from all but one."""
    hidden = {0: [1, 4], 1: [1, 4], 2: [4], 3: [0]}
    sees = {member: [label for label in range(10) if label not in labels] for member, labels in hidden.items()}
    record = {"split": "masked_classes", "bins": dict.fromkeys(range(10), "all"), "sees": sees}
    return write_ensemble(tmp_path_factory.mktemp("masked"), members=4, **record)


def measured(ensemble, labels, plan, at_once=10):
    return {result.label: result for result in measure_classes(ensemble, labels, plan, at_once)}


def test_one_step_is_the_mutual_information_of_the_branched_step(folder):
    ensemble = loaded(folder)
    found = measured(ensemble, [3], InformationPlan(n=3))[3]
    walk = ensemble.sample_branched([3] * 3, range(3), (0,), only_first=True)
    torch.testing.assert_close(found.mi, mutual_information(walk.first.distribution))
    named = {"mi", "mi_by_base", "mean_pairwise_distance", "epistemic_variance", "aleatoric_variance"}
    assert set(found.tensors()) == named


def test_curve_starts_with_one_step_and_ends_with_the_samples(folder):
    """The last step's distribution has no variance, so its means are the samples."""
    ensemble = loaded(folder, step=1)
    found = measured(ensemble, [0, 5], InformationPlan(n=2, curve=True, keep=True))
    for result in found.values():
        assert result.curve.shape == (3, 2)
        torch.testing.assert_close(result.curve[0], result.mi)
        last = mutual_information(Gaussian(result.latents.double()))
        torch.testing.assert_close(result.curve[-1], last, rtol=1e-5, atol=1e-9)
    assert found[0].curve[-1].mean() > found[0].mi.mean()


def test_average_over_base_members_is_the_mean_of_single_runs(folder):
    singles = [measured(loaded(folder, base=base), [0, 4], InformationPlan(n=3)) for base in range(3)]
    averaged = measured(loaded(folder, base="all"), [0, 4], InformationPlan(n=3))
    for label in (0, 4):
        each = torch.stack([single[label].mi for single in singles])
        torch.testing.assert_close(averaged[label].mi_by_base, each, **ROUNDING)
        torch.testing.assert_close(averaged[label].mi, each.mean(0), **ROUNDING)
        assert each.std(0).max() > 1e-6, "the bases differ, or the test says nothing"
    row = class_row(averaged[0], loaded(folder))
    means = torch.stack([single[0].mi.mean() for single in singles])
    assert row["mi_base_sd"] == pytest.approx(means.std().item(), rel=1e-2)


def test_at_the_first_step_one_base_stands_for_all(folder):
    ensemble = loaded(folder, base="all", step=0)
    assert ensemble.bases(0) == (0,)
    other = loaded(folder, base=2, step=0)
    torch.testing.assert_close(
        measured(ensemble, [1], InformationPlan(n=2))[1].mi,
        measured(other, [1], InformationPlan(n=2))[1].mi,
        rtol=0,
        atol=0,
    )


def test_with_stochastic_steps_bases_share_their_noises(folder):
    averaged = measured(loaded(folder, Sampling(eta=1.0), base=(1, 2)), [7], InformationPlan(n=2, curve=True))[7]
    alone = measured(loaded(folder, Sampling(eta=1.0), base=2), [7], InformationPlan(n=2, curve=True))[7]
    torch.testing.assert_close(averaged.mi_by_base[1], alone.mi, **ROUNDING)
    assert (alone.aleatoric_variance > 0).all()


def test_noises_do_not_depend_on_the_batch(folder):
    ensemble = loaded(folder)
    together = measured(ensemble, [0, 2, 5, 6], InformationPlan(n=4))
    apart = measured(ensemble, [6, 2], InformationPlan(n=4), at_once=1)
    later = measure_round(ensemble, [2], [2, 3], InformationPlan(n=2))[0]
    for label in (6, 2):
        torch.testing.assert_close(together[label].mi, apart[label].mi, **ROUNDING)
    torch.testing.assert_close(together[2].mi[2:], later.mi, **ROUNDING)


def test_noises_are_added_until_the_interval_is_narrow(folder):
    ensemble = loaded(folder)
    fixed = measured(ensemble, [0, 1, 2], InformationPlan(n=8))

    def width_at(label, count):
        return skewed_mean_interval(fixed[label].mi[:count].tolist(), look_level(count // 2)).width

    widths = {label: width_at(label, 8) for label in fixed}
    wanted = sorted(widths.values())[1] * 1.05
    found = measured(ensemble, [0, 1, 2], InformationPlan(n=2, width=wanted, most=8, keep=True))
    for label, result in found.items():
        count = len(result.mi)
        assert count in (2, 4, 6, 8) and result.latents.shape[1] == count
        torch.testing.assert_close(result.mi, fixed[label].mi[:count], **ROUNDING)
        rounds = [width_at(label, n) for n in range(2, count + 1, 2)]
        assert result.looks == len(rounds) and result.width == pytest.approx(rounds[-1], rel=1e-2)
        assert all(width > wanted for width in rounds[:-1])
        assert rounds[-1] <= wanted or count == 8
    assert len({len(result.mi) for result in found.values()}) > 1
    for wrong in ({"n": 1, "width": 0.1}, {"n": 0}, {"width": 0.1, "most": 5}):
        with pytest.raises(ValueError, match="n >= 2 and max_n >= n"):
            InformationPlan(**wrong)


def test_diversity_is_the_similarity_of_the_decoded_samples(folder):
    ensemble = loaded(folder, base=(0, 1))
    found = measured(ensemble, [0, 2], InformationPlan(n=2, diversity=True))
    for label in (0, 2):
        pictures = ensemble.decode(ensemble.member_latents([label] * 2, range(2)))  # [M, n, K, C, H, W]
        by_base = torch.stack([pairwise_ssim(pictures[:, :, base]) for base in range(2)])
        torch.testing.assert_close(found[label].ssim, by_base.mean(0), rtol=1e-3, atol=1e-3)
    assert found[0].ssim.mean() < found[2].ssim.mean(), "a wide class is more diverse than a narrow one"


def test_groups_of_masked_classes(masked):
    ensemble = loaded(masked)
    assert ensemble.classes.groups(1) == ((2, 3), (0, 1)) and ensemble.classes.groups(2) == ((0, 1, 2, 3), ())
    assert ensemble.classes.member_names(1)[1:3] == ["member 1 (hidden)", "member 2 (saw it)"]
    found = measured(ensemble, [0, 1, 2, 4], InformationPlan(n=3))
    walk = ensemble.sample_branched([1] * 3, range(3), (0,), only_first=True).first.distribution
    torch.testing.assert_close(found[1].mi_certain, mutual_information(walk, members=[2, 3]), **ROUNDING)
    torch.testing.assert_close(found[1].mi_uncertain, mutual_information(walk, members=[0, 1]), **ROUNDING)
    assert found[0].mi_uncertain.tolist() == [0, 0, 0], "a group of one"
    rows = {label: class_row(result, ensemble) for label, result in found.items()}
    assert rows[2]["mi_uncertain"] is None and rows[2]["uncertain"] == ""
    assert rows[0]["distance_uncertain"] is None and rows[0]["mi_uncertain"] == 0
    numbers, words = summarise_classes(list(rows.values()), ensemble)
    assert numbers["compared_classes"] == 1 and "did not see" in words[0]
    ratio = rows[1]["distance_uncertain"] / rows[1]["distance_certain"]
    assert numbers["hidden_to_seen"]["estimate"] == pytest.approx(ratio)


def test_base_among_those_that_did_not_see_the_class(masked, folder):
    ensemble = loaded(masked, uncertain=True)
    assert [ensemble.bases(label) for label in (0, 1, 4)] == [(3,), (0,), (0,)]
    found = measured(ensemble, [0, 1, 4], InformationPlan(n=2))
    alone = measured(loaded(masked, base=3), [0], InformationPlan(n=2))[0]
    torch.testing.assert_close(found[0].mi, alone.mi, **ROUNDING)
    assert sorted(found) == [0, 1, 4]
    with pytest.raises(ValueError, match="needs an ensemble on masked_classes"):
        loaded(folder, uncertain=True).bases(0)
    with pytest.raises(ValueError, match="no --base_comp"):
        loaded(masked, uncertain=True, base=1).bases(1)
    for wrong in (("all", 1), (1, 1), (99,)):
        with pytest.raises(ValueError, match="--base_comp takes different members"):
            loaded(folder, base=wrong).bases(0)
    with pytest.raises(ValueError, match="of class 2 among those that did not see it"):
        ensemble.bases(2)


def test_masked_ensembles_without_their_record_are_refused(tmp_path):
    ensemble = loaded(write_ensemble(tmp_path, split="masked_classes"))
    with pytest.raises(ValueError, match=r"no key 'sees'.*gather the ensemble again with save_ensemble\.py"):
        ensemble.classes.groups(0)


@pytest.mark.parametrize("base", [3, (1, 1)])
def test_wrong_base_members_are_named(folder, base):
    with pytest.raises(ValueError, match=r"different members of 0\.\.2, or 'all'"):
        loaded(folder, base=base).bases(0)


def test_published_choices_fill_in_what_was_not_given(folder):
    source = EnsembleSource(str(folder), published=True)
    published = source.load(Sampling(), Branching(), Speed(), "cpu")
    assert (len(published.times) - 1, published.scale, published.branches) == (200, 5.0, [199])
    # Network times 996, 991, .. 1 of the published times are u = 997, 992, .. 2 here.
    assert float(published.times[0]) == 997 and published.describe()["spacing"] == "published"
    given = source.load(Sampling(steps=7, scale=2.0), Branching(at=0.5), Speed(), "cpu")
    # CompVis' times of 7 steps has 1000 // 7 = 142 between times, which fits 8 times.
    assert (len(given.times) - 1, given.scale, given.branches) == (8, 2.0, [4])


def test_identical_members_agree_on_everything(tmp_path):
    ensemble = loaded(write_ensemble(tmp_path, spread=torch.zeros(11)))
    result = measured(ensemble, [0], InformationPlan(n=2, curve=True, diversity=True))[0]
    assert result.mi.tolist() == [0, 0] and result.curve.abs().max() < 1e-9
    torch.testing.assert_close(result.ssim, torch.ones(2, dtype=torch.float64))


def test_members_far_apart_saturate(tmp_path):
    spread = torch.full((11,), 300.0)
    ensemble = loaded(write_ensemble(tmp_path, spread=spread), Sampling(scale=30.0), step=0)
    result = measured(ensemble, [0], InformationPlan(n=2, curve=True))[0]
    row = class_row(result, ensemble)
    assert row["multistep_mean"] == pytest.approx(math.log(3), abs=0.2)
