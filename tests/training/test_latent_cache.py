"""Training on cached latents is training on the images, for a trunk, for members together, for random crops."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import save_checkpoint
from ldm.commands.data_latents import EncodeLatents
from ldm.data.augmentation import NonLeaky
from ldm.data.base import Compose, Crop, Flip
from ldm.data.digits import Digits
from ldm.data.latents import LatentStore, count_views, describe_data, innermost, with_latents
from ldm.settings import Training
from tests.conftest import tiny_model
from tests.training.conftest import write_config
from tests.training.runs import end_state, losses, run_training

AUTOENCODER = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 1,
        "ddconfig": {
            "double_z": True, "z_channels": 1, "resolution": 16, "in_channels": 1, "out_ch": 1, "ch": 32,
            "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    """The tiny config on digits of 16x16 pixels, through an autoencoder with latents 8x8."""
    path = write_config(tmp_path)
    content = OmegaConf.load(path)
    content.model.params.first_stage_config = AUTOENCODER
    content.model.params.unet_config.params.dropout = 0.0
    for split in ("train", "validation"):
        content.data.params[split].params.image_size = 16
    OmegaConf.save(content, path)
    return path


def cached(tmp_path):
    return f"data.params.latent_cache={tmp_path / 'latents'}"


def assert_same_losses(first, second):
    """The first to rounding; Adam makes of a gradient's rounding a step as large as any other, so later ones less."""
    assert list(losses(first)) == list(losses(second)) == list(range(8))
    assert losses(first)[0] == pytest.approx(losses(second)[0], rel=1e-6)
    assert list(losses(first).values()) == pytest.approx(list(losses(second).values()), rel=2e-3)


@pytest.mark.slow
def test_losses_of_a_trunk_are_those_of_encoding_on_the_fly(config, tmp_path):
    plain = run_training(config, tmp_path / "plain")
    run = run_training(config, tmp_path / "cached", cached(tmp_path))
    assert_same_losses(run, plain)
    (folder,) = (tmp_path / "latents").iterdir()
    assert sorted(path.name for path in folder.glob("*.npy")) == ["deviations_0.npy", "index_0.npy", "latents_0.npy"]
    assert np.load(folder / "latents_0.npy").shape == (len(Digits("test")), 1, 8, 8, 1)
    before = (folder / "latents_0.npy").stat().st_mtime_ns
    run_training(config, tmp_path / "again", cached(tmp_path), max_steps=1)
    assert (folder / "latents_0.npy").stat().st_mtime_ns == before, "what is there is not encoded again"
    run_training(config, tmp_path / "other", cached(tmp_path), seed=5, max_steps=1)
    assert len(list((tmp_path / "latents").iterdir())) == 2, (
        "another first stage (seed 5 draws its weights) has its own"
    )


@pytest.mark.slow
def test_members_together_share_one_cache(config, tmp_path):
    content = OmegaConf.load(config)
    model = tiny_model(first_stage_config=AUTOENCODER)
    save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "trunk.ckpt")
    content.model.params.pretrained_path, content.model.params.use_ema = str(tmp_path / "trunk.ckpt"), False
    OmegaConf.save(content, config)
    members = {"start_from_pretrained": True, "ensemble_name": "b", "component": "all", "members": 2}
    plain = run_training(config, tmp_path / "plain", **members)
    assert EncodeLatents(Training(base=(str(config),), changes=(cached(tmp_path),), **members)).run()
    run = run_training(config, tmp_path / "cached", cached(tmp_path), **members)
    assert len(list((tmp_path / "latents").iterdir())) == 1
    assert_same_losses(run, plain)
    for name, value in end_state(run).items():
        torch.testing.assert_close(value, end_state(plain)[name], rtol=0, atol=1e-3)


def encode(images):
    """A first stage with known latents: means over 2x2 pixels."""
    return (torch.nn.functional.avg_pool2d(images, 2),)


def filled(folder, data, views, settings=None, shard=(0, 1)):
    store = LatentStore(folder, settings or describe_data(data), len(data._all_labels), views, shard)
    for _ in store.fill(data, encode, batch=50):
        pass
    return store


def test_views_are_the_crops_and_flips_of_the_first_epochs(tmp_path):
    """Epoch e < K gives what it gives on the fly; later ones begin again; a repeat in a bootstrap is another view."""
    crop = Compose(Crop(12, random=True), Flip())
    data, plain = (Digits("test", image_size=16, transform=crop, seed=3) for _ in range(2))
    data.image_shape = plain.image_shape = (12, 12, 1)
    with pytest.raises(ValueError, match="latent_views=10"):
        count_views(data, None)
    assert count_views(data, 3) == 3 and count_views(Digits("test"), 3) == 1
    latents = with_latents(data, filled(tmp_path, data, 3))
    assert data.epoch == 0, "whether it was encoded now or before makes no difference"
    for epoch in range(5):
        latents.set_epoch(epoch)
        for index in (0, 17, 300):
            plain.set_epoch(epoch % 3)
            expected = encode(plain.item(index)["image"].movedim(-1, 0)[None])[0][0].movedim(0, -1)
            item = latents.item(index)
            torch.testing.assert_close(item["image"], expected)
            assert item["class_label"] == plain.item(index)["class_label"] and item["encoded"]
            plain.set_epoch((epoch + 1) % 3)
            repeat = encode(plain.item(index)["image"].movedim(-1, 0)[None])[0][0].movedim(0, -1)
            torch.testing.assert_close(latents.item(index, draw=1)["image"], repeat)


def test_shards_make_the_store_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.data.latents._BLOCK", 100)
    data = Digits("test")
    whole = filled(tmp_path / "one", data, 1)
    first = filled(tmp_path / "two", data, 1, shard=(0, 2))
    assert not first.complete
    second = filled(tmp_path / "two", data, 1, shard=(1, 2))
    assert first.complete and second.complete and len(whole.keys) == 4
    for index in range(0, 360, 7):
        assert torch.equal(whole.read(index, 0)[0][0], second.read(index, 0)[0][0])


def test_the_key_tells_data_transform_and_first_stage_apart(tmp_path):
    known = [Digits("test"), Digits("train"), Digits("test", image_size=16), Digits("test", transform=Crop(6))]
    known += [Digits("test", transform=Crop(7)), Digits("test", seed=1)]
    folders = {LatentStore(tmp_path, describe_data(data), len(data), 1).folder for data in known}
    folders.add(LatentStore(tmp_path, {**describe_data(known[0]), "first_stage": "b"}, len(known[0]), 1).folder)
    folders.add(LatentStore(tmp_path, describe_data(known[0]), len(known[0]), 2).folder)
    assert len(folders) == 8
    assert LatentStore(tmp_path, describe_data(Digits("test")), len(known[0]), 1).folder in folders


def test_what_is_no_data_set_of_this_project_is_refused():
    with pytest.raises(ValueError, match="LabelledImages"):
        innermost([1, 2])


def test_a_transform_that_tells_the_network_what_it_did_is_refused():
    with pytest.raises(ValueError, match="augment_labels"):
        count_views(Digits("test", transform=NonLeaky()), 2)


def encode_posterior(images):
    """A KL first stage with known means and deviations."""
    mean = torch.nn.functional.avg_pool2d(images, 2)
    return mean, mean.abs() + 0.1


def test_a_cache_keeps_means_and_deviations_and_an_older_one_says_that_it_has_none(tmp_path):
    data = Digits("test")
    store = LatentStore(tmp_path, describe_data(data), len(data), 1)
    list(store.fill(data, encode_posterior, batch=100))
    mean, std = encode_posterior(data.item(5)["image"].movedim(-1, 0)[None])
    item = with_latents(data, store).item(5)
    torch.testing.assert_close(item["image"], mean[0].movedim(0, -1))
    torch.testing.assert_close(item["latent_std"], std[0].movedim(0, -1))
    store.check_deviations(data, encode_posterior)
    (store.folder / "deviations_0.npy").unlink()
    store.work.save("0", {"images": len(data)})  # as it was written before
    again = LatentStore(tmp_path, describe_data(data), len(data), 1)
    with pytest.raises(ValueError, match=r"holds none in 1 of its 1 files: remove it.*--first_stage mode"):
        again.check_deviations(data, encode_posterior)
    again.check_deviations(data, encode)  # latents alone: nothing is missing
    means = LatentStore(tmp_path, describe_data(data), len(data), 1, sampled=False)
    means.check_deviations(data, encode_posterior)
    assert "latent_std" not in with_latents(data, means).item(5)
