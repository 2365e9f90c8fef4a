"""Probes: fused heads against heads trained alone with torch's own layers, selection, splits, fine-tuning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ldm.evaluation.finetuning import Tuning, tune
from ldm.evaluation.probe import ProbeTraining, choose, class_errors, fit_heads, probe, validation_split
from ldm.evaluation.taps import Backbone, Reading, resolve_taps
from ldm.util import generator
from tests.conftest import tiny_model
from tests.evaluation.test_taps import Given

CLASSES = 3


def clusters(count, width, spread, seed=0):
    """Features around one centre a class, and their classes."""
    source = generator("clusters", seed)
    labels = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, width, generator=generator("centres", width))
    features = centres[labels] + spread * torch.randn(count, width, generator=source)
    return features.numpy(), labels.numpy()


def grid(count=60, seed=0):
    near, labels = clusters(count, 5, 0.3, seed)
    far, _ = clusters(count, 5, 3.0, seed)
    wide, _ = clusters(count, 7, 1.0, seed)
    return {(1.0, "near"): near, (1.0, "far"): far, (2.0, "wide"): wide}, labels


def alone(features, labels, rows, training, seed):
    """One head by torch.nn.Linear and its own Adam."""
    chosen = torch.from_numpy(features)[rows]
    deviation = chosen.std(0, correction=0) + 1e-6 if training.standardise else 1.0
    mean = chosen.mean(0) if training.standardise else 0.0
    layer = torch.nn.Linear(features.shape[1], CLASSES)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    adam = torch.optim.Adam(layer.parameters(), training.learning_rate)
    total = training.epochs * math.ceil(len(rows) / training.batch_size)
    step = 0
    for epoch in range(training.epochs):
        order = torch.randperm(len(rows), generator=generator("probe order", seed, epoch)).numpy()
        for batch in torch.from_numpy(rows[order]).split(training.batch_size):
            adam.param_groups[0]["lr"] = training.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
            logits = layer((torch.from_numpy(features)[batch] - mean) / deviation)
            adam.zero_grad()
            F.cross_entropy(logits, torch.from_numpy(labels)[batch]).backward()
            adam.step()
            step += 1
    return layer


@pytest.mark.parametrize("standardise", [True, False])
def test_heads_trained_together_are_heads_trained_alone(standardise):
    arrays, labels = grid()
    rows, training = np.arange(7, 58), ProbeTraining(4, 16, 1e-2, standardise=standardise)
    heads = fit_heads([arrays], labels, rows, CLASSES, training, seed=3)
    for group in heads.groups:
        for index, place in enumerate(group.places):
            layer = alone(arrays[place], labels, rows, training, 3)
            torch.testing.assert_close(group.weight[index], layer.weight.detach().T, rtol=1e-4, atol=2e-6)
            torch.testing.assert_close(group.bias[index, 0], layer.bias.detach(), rtol=1e-4, atol=2e-6)


def test_a_place_is_chosen_on_validation_images_and_only_it_is_tested():
    arrays, labels = grid(300)
    tests, test_labels = grid(150, seed=9)
    asked = []

    def tested(place, seed):
        asked.append((place, seed))
        return {place: tests[place]}, test_labels

    result = probe([arrays], labels, tested, CLASSES, ProbeTraining(20, 32, 3e-2), seeds=(0, 1, 2))
    assert result.place == (1.0, "near")
    assert asked == [((1.0, "near"), seed) for seed in (0, 1, 2)]
    assert result.mean > 0.95 > np.mean([seed[1.0, "far"] for seed in result.validation])
    assert len(result.errors) == 3
    for accuracy, errors in zip(result.test, result.errors, strict=True):
        assert 1 - np.mean(errors) == pytest.approx(accuracy)  # classes of equal size


def test_copies_take_turns():
    arrays, labels = grid()
    garbage = {place: np.zeros_like(values) for place, values in arrays.items()}
    rows, training = np.arange(60), ProbeTraining(1, 16, 1e-2)
    first = fit_heads([arrays, garbage], labels, rows, CLASSES, training, 0)
    only = fit_heads([arrays], labels, rows, CLASSES, training, 0)
    longer = ProbeTraining(2, 16, 1e-2)
    changed = fit_heads([arrays, garbage], labels, rows, CLASSES, longer, 0)
    assert torch.equal(first.groups[0].weight, only.groups[0].weight)
    assert not torch.equal(
        changed.groups[0].weight, fit_heads([arrays], labels, rows, CLASSES, longer, 0).groups[0].weight
    )


def test_validation_split_takes_a_share_of_every_class():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    training, validation = validation_split(labels, 0.1, seed=0)
    assert np.bincount(labels[validation]).tolist() == [5, 3, 2]
    assert sorted([*training, *validation]) == list(range(100))
    assert not np.array_equal(validation, validation_split(labels, 0.1, seed=1)[1])
    with pytest.raises(ValueError, match="between 0 and 1"):
        validation_split(labels, 1.0, 0)


def test_choice_averages_over_seeds():
    assert choose([{(1.0, "a"): 0.9, (1.0, "b"): 0.7}, {(1.0, "a"): 0.5, (1.0, "b"): 0.8}]) == (1.0, "b")


def test_class_errors():
    errors = class_errors(np.array([0, 1, 1, 0]), np.array([0, 0, 1, 1]), 3)
    assert errors[:2] == [0.5, 0.5]
    assert math.isnan(errors[2])


def test_mismatched_labels_are_refused():
    arrays, labels = grid()
    with pytest.raises(ValueError, match="59 images"):
        fit_heads([arrays], labels[:-1], np.arange(50), CLASSES, ProbeTraining(), 0)


def test_the_network_as_a_whole_is_no_layer():
    with pytest.raises(ValueError, match=r"no layers \[''\]"):
        resolve_taps(tiny_model().network, [""])


def test_tuning_learns_what_a_frozen_trunk_cannot_show_and_leaves_it_alone():
    """Classes are the sign of one corner pixel, in states whose trunk is random."""
    model = tiny_model()
    trunk = Backbone(model.network.eval(), model.schedule, model.target, model.null_class)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    x = 0.3 * torch.randn(96, 1, 8, 8, generator=generator("tuned states"))
    labels = (x[:, 0, :2, :2].mean((1, 2)) > 0).long()
    x[:, 0, :2, :2] += 1.5 * (2 * labels.float() - 1)[:, None, None]
    reading = Reading((50.0,), resolve_taps(trunk.network, ["out_1"]))
    data = Given(x[:64], labels[:64]), Given(x[64:], labels[64:])
    accuracy = tune(trunk, reading, data[0], np.arange(64), data[1], 2, Tuning(4, 21, 2e-3), seed=0)  # 64 = 3 x 21 + 1
    assert accuracy > 0.9
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
