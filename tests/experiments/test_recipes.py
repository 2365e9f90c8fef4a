"""Recipes of small networks: whose images are drawn, how errors weigh, what is kept, and samples that must agree."""

from dataclasses import replace

import pytest
import torch

from ldm.diffusion.guidance import GuidanceRule
from ldm.experiments.judged_digits import Judge
from ldm.experiments.recipe_samples import GuidanceWay, SampleStudy, list_ways
from ldm.experiments.recipes import LAST, NULL_LABEL, DigitBank, RecipeTraining, SmallRecipe, pick_best
from ldm.experiments.small_networks import read_digits
from ldm.util import generator

PLAIN = SmallRecipe()
RECIPES = [(replace(PLAIN, per_class=3), 0), (replace(PLAIN, per_class=3, augmented=True), 0)]
RECIPES += [(replace(PLAIN, weight="min_snr"), 1), (replace(PLAIN, dropout=0.5), 1)]


@pytest.fixture(scope="module")
def bank():
    return DigitBank.make(versions=2)


@pytest.fixture(scope="module")
def training(bank):
    return RecipeTraining(bank, RECIPES, (0.1, 0.2), steps=40, batch=16, width=16, warm_up=4)


@pytest.fixture(scope="module")
def result(training):
    return training.run(0, 1e-2)


@pytest.fixture(scope="module")
def study():
    """Networks are told apart by their samples alone: four of each class are enough."""
    return SampleStudy(Judge.make(), 40, 4)


def test_few_images_are_of_every_class_and_among_more(bank):
    labels = read_digits("train")[1]
    few, more = bank.choose(3, 7), bank.choose(5, 7)
    assert labels[few].bincount().tolist() == [3] * 10 and labels[more].bincount().tolist() == [5] * 10
    assert set(few.tolist()) < set(more.tolist()) and set(few.tolist()) != set(bank.choose(3, 8).tolist())
    assert len(bank.choose(None, 7)) == len(labels)


def test_each_network_draws_its_own_images(bank, training):
    """Of the few chosen ones, as they are or as one of their versions, with the labels that say which."""
    source = generator("draws")
    images, cond = (torch.cat(parts, 1) for parts in zip(*(training.draw(source) for _ in range(40)), strict=True))
    chosen = bank.choose(3, 0)
    plain = {tuple(row) for row in bank.images[0, chosen].tolist()}
    versions = {tuple(row) for row in bank.images[1:, chosen].flatten(0, 1).tolist()}
    assert {tuple(row) for row in images[0].tolist()} == plain
    assert {tuple(row) for row in images[1].tolist()} <= versions
    assert not cond[0, :, 1:].any() and cond[1, :, 1:].any()
    dropped = (cond[:, :, 0] == NULL_LABEL).double().mean()
    assert float(dropped) == pytest.approx(0.1, abs=4 * (0.09 / cond[:, :, 0].numel()) ** 0.5)


def test_errors_weigh_as_the_papers_say(training):
    """On v: snr / (snr + 1) of eps, and min(snr, 5) / (snr + 1) of min-SNR."""
    t = torch.linspace(0.05, 0.95, 16).expand(4, 16)
    snr = torch.tan(torch.pi / 2 * t) ** -2
    found = training.weigh(torch.full((4, 16), 2.0), t)
    torch.testing.assert_close(found[0], 2 * snr[0] / (snr[0] + 1), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[2], 2 * snr[2].clamp(max=5) / (snr[2] + 1), rtol=1e-5, atol=0)


def test_what_a_training_leaves(result, bank):
    losses = [result.loss(*own) for own in RECIPES]
    first = next(iter(result.losses.values()))
    assert all(end < float(start) for end, start in zip(losses, first, strict=True)), "it learns"
    plain, told = (result.network(*own, LAST) for own in RECIPES[:2])
    assert not plain.augment_emb.weight.any() and told.augment_emb.weight.any()
    width = result.states[0.1]["first.weight"]
    torch.testing.assert_close(width, result.states[40, 0.1]["first.weight"], rtol=1e-4, atol=1e-5)
    for own in RECIPES:
        curve = result.curve(*own)
        assert result.loss(*own, best=True) == min(curve.values()) == curve[result.best_step(*own)]


def test_the_best_state_is_that_of_the_least_loss():
    states = [{"w": torch.full((2, 1), float(step))} for step in (1, 2, 3)]
    losses = {1: torch.tensor([3.0, 1.0]), 2: torch.tensor([1.0, 2.0]), 3: torch.tensor([2.0, 3.0])}
    best = {}
    for step, state in enumerate(states, start=1):
        best = pick_best(best, state, {key: losses[key] for key in range(1, step + 1)}, step)
    assert best["w"].flatten().tolist() == [2.0, 1.0]


def test_ways_of_guidance_that_change_nothing(result, study):
    """The scale 1, an interval that no level is in, and a weaker network that is the network itself."""
    network = result.network(*RECIPES[2])
    expected = study.measure(0, network)
    assert study.measure(0, network, GuidanceWay("plain", GuidanceRule(1.0))) == pytest.approx(expected)
    assert study.measure(0, network, GuidanceWay("interval", GuidanceRule(3.0, 1e3, 2e3))) == pytest.approx(expected)
    itself = study.measure(0, network, GuidanceWay("autoguidance", GuidanceRule(3.0), weaker=True), network)
    assert itself == pytest.approx(expected, rel=1e-3)
    assert study.measure(0, network, GuidanceWay("plain", GuidanceRule(3.0))) != pytest.approx(expected, rel=1e-3)
    assert len({(way.name, way.rule.scale) for way in list_ways()}) == len(list_ways())


def test_members_that_are_one_say_nothing(result, study):
    network, other = (result.network(*own) for own in RECIPES[2:])
    same = study.information([network, network])
    torch.testing.assert_close(same, torch.zeros(10, dtype=same.dtype), rtol=0, atol=1e-9)
    apart = study.information([network, other])
    assert bool((apart > 0).all()) and bool((apart <= torch.tensor(2.0).log() + 1e-6).all())
