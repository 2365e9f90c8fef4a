"""The small classifier: learning, reproducibility, and its files."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm.data.digits import Digits
from ldm.evaluation.classifier import (
    Architecture,
    ClassifierTraining,
    SmallClassifier,
    accuracy,
    load_classifier,
    save_classifier,
    shifted,
    train_classifier,
)
from ldm.pipelines.images import DataSetImages
from ldm.util import generator

TINY = Architecture(1, 8, 10, width=4, num_features=16)


def digits(split="train", count=None):
    images, labels = DataSetImages(Digits(split)).everything()
    return images[:count], labels[:count]


def test_it_learns_digits_and_seeds_fix_the_result():
    images, labels = digits()
    states = []
    for seed in (0, 0, 1):
        model = SmallClassifier(Architecture(1, 8, 10, width=8, num_features=32), seed)
        train_classifier(model, images[:500], labels[:500], ClassifierTraining(epochs=5, batch_size=50), seed)
        states.append(model.state_dict())
    assert accuracy(model, *digits("test")) > 0.85
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["logits.weight"], states[2]["logits.weight"])


def test_files_give_the_same_network_and_must_belong_together(tmp_path):
    model = SmallClassifier(TINY, 3).eval()
    path = tmp_path / "a.safetensors"
    save_classifier(model, path, {"test_accuracy": 0.5})
    images = torch.randn(2, 1, 8, 8, generator=generator("classifier"))
    assert torch.equal(load_classifier(path)(images), model(images))
    assert OmegaConf.load(tmp_path / "a.yaml").architecture.num_features == 16
    with pytest.raises(FileExistsError):
        save_classifier(model, path, {})
    save_classifier(SmallClassifier(TINY, 4), tmp_path / "b.safetensors", {})
    (tmp_path / "b.safetensors").replace(path)
    with pytest.raises(ValueError, match="sha256"):
        load_classifier(path)
    with pytest.raises(FileNotFoundError, match="decu evaluate classifier"):
        load_classifier(tmp_path / "none.safetensors")


@pytest.mark.parametrize(("side", "maps"), [(8, 8), (28, 7), (32, 8), (64, 8)])
def test_maps_are_at_most_eight_pixels_wide(side, maps):
    model = SmallClassifier(Architecture(3, side, 5, width=2, num_features=7))
    found = model.activations(torch.zeros(1, 3, side, side))
    assert found[0].shape[-1] == maps and found[1].shape == (1, 7) and found[2].shape == (1, 5)


def test_shifts_move_pixels_by_whole_steps():
    image = torch.zeros(40, 1, 5, 5, dtype=torch.uint8)
    image[:, 0, 2, 2] = 9
    moved = shifted(image, 1, generator("shift"))
    places = moved.flatten(1).argmax(1)
    assert (moved.flatten(1).sum(1) == 9).all() and set(places.tolist()) == {6, 7, 8, 11, 12, 13, 16, 17, 18}
    assert shifted(image, 0, generator("shift")) is image


def test_what_does_not_fit_is_refused():
    images, labels = digits(count=20)
    with pytest.raises(ValueError, match="expected images"):
        train_classifier(SmallClassifier(Architecture(3, 8, 10)), images, labels, ClassifierTraining(), 0)
