"""The class embedder that is told of augmentations: without any it is the plain one, and a training uses both."""

import csv

import pytest
import torch
from omegaconf import OmegaConf

from ldm import Sampling, load_model
from ldm.modules.encoders.augmented import AugmentedClassEmbedder
from ldm.modules.encoders.modules import ClassEmbedder
from tests.training.conftest import write_config
from tests.training.runs import end_state, run_training


def test_images_left_alone_are_embedded_as_by_the_plain_one():
    torch.manual_seed(0)
    own = AugmentedClassEmbedder(8, n_classes=5, augment_dim=3, key="label")
    plain = ClassEmbedder(8, n_classes=5, key="label")
    plain.load_state_dict({"embedding.weight": own.embedding.weight})
    labels, changes = torch.tensor([0, 4, 2]), torch.tensor([[0.0, 0, 0], [1.0, 0, -1], [0.5, 2, 0]])
    joined = own.join(labels, {"augment_labels": changes})
    assert joined.shape == (3, 4) and torch.equal(own.join(labels, {}), labels)
    torch.testing.assert_close(own.embed(joined), plain.embed(labels), msg="W starts at zero")
    own.augmentation.weight.data = torch.randn(8, 3)
    found, expected = own.embed(joined), plain.embed(labels) + (changes @ own.augmentation.weight.T)[:, None]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[0], plain.embed(labels)[0])
    torch.testing.assert_close(own.embed(labels), plain.embed(labels))
    assert own.null_class == 4 and own.parts == plain.parts


def test_a_training_learns_what_augmentations_do_and_samples_none(tmp_path):
    """The network is told of each change; its validation and its samples are of images left alone."""
    config = write_config(tmp_path)
    content = OmegaConf.load(config)
    content.model.params.cond_stage_config.target = "ldm.modules.encoders.augmented.AugmentedClassEmbedder"
    content.data.params.train.params.transform = {
        "target": "ldm.data.augmentation.NonLeaky",
        "params": {"probability": 0.9},
    }
    OmegaConf.save(content, config)
    stop = "lightning.callbacks.early_stopping.params"
    words = [f"{stop}.monitor=val/loss", f"{stop}.patience=1", f"{stop}.min_delta=1e9", "data.params.batch_size=4"]
    run = run_training(config, tmp_path, *words, limit_train_batches=2)
    assert end_state(run)["cond_stage_model.augmentation.weight"].abs().sum() > 0
    with open(run / "csv" / "metrics.csv") as rows:
        held_out = [row for row in csv.DictReader(rows) if row.get("val/loss")]
    assert len(held_out) == 2, "the second validation does not fall by 1e9, and ends the training before its 8 steps"
    pipeline = load_model(run, Sampling(steps=2, scale=1.0), device="cpu")
    first = pipeline.sample([3], 1)
    with torch.no_grad():
        pipeline.model.cond_stage_model.augmentation.weight += 1
    assert torch.equal(pipeline.sample([3], 1), first)


def test_a_stop_without_its_metric_is_refused(tmp_path):
    with pytest.raises(ValueError, match="monitor"):
        run_training(write_config(tmp_path), tmp_path, "lightning.callbacks.early_stopping.params.patience=3")
