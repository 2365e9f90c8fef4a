"""Classifiers of noisy images: sizes, that they learn what noise leaves, and repeat."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.schedule import EDMSchedule
from ldm.evaluation.fitting import half_cosine
from ldm.evaluation.noise_conditional import (
    WRN_TRAINING,
    BackboneClassifier,
    NetworkClassifier,
    NoiseHead,
    NoisyTraining,
    level_times,
    recognition,
    train_noisy,
)
from ldm.evaluation.taps import Backbone, resolve_taps
from ldm.modules.wide_resnet import WideResNet
from ldm.util import generator
from tests.conftest import tiny_model


class Halves:
    """Images whose upper or lower half is bright, by class; or whose whole is bright or dark."""

    def __init__(self, count, seed, whole=False):
        self.labels = torch.arange(count) % 2
        x = 0.2 * torch.randn(count, 1, 8, 8, generator=generator("halves", seed))
        x[self.labels == 0, :, : 8 if whole else 4] += 0.8
        x[self.labels == 1, :, 0 if whole else 4 :] += -0.8 if whole else 0.8
        self.x = x

    def __len__(self):
        return len(self.labels)

    def at(self, rows, epoch=0):
        return self.x[rows]


def test_the_head_has_the_published_size():
    assert sum(parameter.numel() for parameter in NoiseHead(256, 10).parameters()) == 219_146
    with pytest.raises(ValueError, match="multiple of 8"):
        NoiseHead(12, 2)


def test_a_network_recognises_what_noise_leaves():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = WideResNet(10, 1, classes=2, in_channels=1)
    schedule, train, tests = EDMSchedule(), Halves(48, 0), Halves(40, 1)
    levels = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    model = NetworkClassifier(net, schedule)
    training = NoisyTraining(6, 16, 0.03, 1, 0.9)
    train_noisy(model, train, level_times(levels), training, seed=0)
    near, far = recognition(model, tests, [0.1, 80.0])
    assert near > 0.9
    assert far < 0.8
    assert recognition(model, tests, [0.1, 80.0], batch_size=7) == [near, far]


def test_a_head_learns_on_a_frozen_trunk_and_leaves_it_alone():
    model = tiny_model()
    trunk = Backbone(model.network.eval().requires_grad_(False), model.schedule, model.target, model.null_class)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    tap, levels = resolve_taps(trunk.network, ["out_1"]), torch.tensor([20.0, 120.0], dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = NoiseHead(32, 2)
    classifier = BackboneClassifier(trunk, tap, levels, head)
    train_noisy(classifier, Halves(48, 0, True), level_times(levels), NoisyTraining(6, 16, 1e-2), seed=0)
    clean, noisy = recognition(classifier, Halves(40, 1, True), [20.0, 999.0])
    assert clean > 0.9 > noisy
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


def test_the_published_rates_warm_up_and_fall():
    network = WideResNet(10, 1)
    optimiser = WRN_TRAINING.optimiser(list(network.parameters()))
    factor = half_cosine(optimiser, 10 * WRN_TRAINING.epochs, 10 * WRN_TRAINING.warm_up).lr_lambdas[0]
    factors = [factor(step) for step in (0, 49, 50, 1025, 2000)]
    assert factors[:3] == [1 / 50, 1.0, 1.0]
    assert factors[3:] == pytest.approx([0.5, 0.0], abs=1e-9)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.1 / 50)
