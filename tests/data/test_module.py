"""The order of training data: a function of (seed, member, epoch), the same on any number of devices, resumable."""

from types import SimpleNamespace

import pytest
import torch

from ldm.data.module import DataModuleFromConfig, KeyedBatches, SharedBatches
from ldm.models.diffusion.optimisation import evaluation_positions


def whole(count=10, size=3, epochs=2, **options):
    """Batches of some epochs, counted as a trainer counts them."""
    done = [0]
    batches = KeyedBatches(range(count), size, seed=1, member=2, done=lambda: done[0], **options)
    result = []
    for _ in range(epochs):
        for batch in batches:
            result.append(batch)
            done[0] += 1
    return result


def test_epochs_are_permutations_and_differ():
    batches = whole(count=12, size=3)
    first, second = (sorted(index for batch in half for index in batch) for half in (batches[:4], batches[4:]))
    assert first == second == list(range(12))
    assert batches[:4] != batches[4:]
    assert batches == whole(count=12, size=3), "the same keys give the same order"


def test_seed_and_member_change_the_order():
    def order(seed, member):
        return next(iter(KeyedBatches(range(50), 50, seed, member)))

    assert len({tuple(order(seed, member)) for seed, member in ((0, 0), (0, 1), (1, 0))}) == 3


@pytest.mark.parametrize("at", range(6))
def test_it_goes_on_where_training_stopped(at):
    batches = whole(count=10, size=3)
    rest = KeyedBatches(range(10), 3, seed=1, member=2, done=lambda: at)
    assert list(rest) == batches[at : (at // 3 + 1) * 3]


def test_devices_share_the_global_batches():
    alone = whole(count=24, size=6)
    pair = [whole(count=24, size=3, rank=rank, world_size=2) for rank in range(2)]
    assert [left + right for left, right in zip(*pair, strict=True)] == alone


def test_a_small_data_set_is_one_batch_and_an_empty_one_an_error():
    assert [sorted(batch) for batch in whole(count=2, size=5, epochs=1)] == [[0, 1]]
    with pytest.raises(ValueError, match="is empty"):
        KeyedBatches([], 1, 0, 0)


def test_a_limited_epoch_still_counts_as_one():
    batches = whole(count=12, size=3, epochs=1, limit=2)
    later = KeyedBatches(range(12), 3, seed=1, member=2, done=lambda: 2, limit=2)
    fresh = KeyedBatches(range(12), 3, seed=1, member=2, done=lambda: 4)
    assert list(later) == list(fresh), "two limited batches are an epoch of two"
    assert len(batches) == 4


def test_batches_hold_what_the_published_layout_says():
    digits = {"target": "ldm.data.digits.Digits"}
    module = DataModuleFromConfig(batch_size=4, train=digits, validation=digits, num_workers=0)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (4, 8, 8, 1)
    assert batch["image"].dtype == torch.float32
    assert float(batch["image"].min()) >= -1
    assert float(batch["image"].max()) <= 1
    assert batch["class_label"].shape == (4,)
    seen = torch.cat([batch["index"] for batch in module.val_dataloader()])
    assert sorted(seen.tolist()) == list(range(len(module.datasets["validation"])))
    with pytest.raises(ValueError, match=r"no data\.params\.predict"):
        module.predict_dataloader()


def test_wrapped_data_are_augmented_anew_each_epoch():
    crop = {"target": "ldm.data.base.Crop", "params": {"size": 4, "random": True}}
    digits = {"target": "ldm.data.digits.Digits", "params": {"split": "test", "transform": crop}}
    first, second = (
        DataModuleFromConfig(batch_size=359, train=digits, wrap=wrap, num_workers=0) for wrap in (False, True)
    )
    for module in (first, second):
        module.setup()
    for epoch in (0, 3):
        shown = []
        for module in (first, second):
            batches = module.train_batches()
            batches.done = lambda count=epoch: count  # an epoch has one batch
            shown.append([module.datasets["train"][position]["image"] for position in next(iter(batches))[:5]])
        assert torch.equal(*map(torch.stack, shown))


@pytest.mark.parametrize("devices", [2, 3])
def test_an_image_has_its_draws_on_any_number_of_devices(devices):
    """(batch, image, place in the global batch) of 13 images in global batches of 6, the last one of a single image."""

    def places(world, batch):
        found = set()
        for rank in range(world):
            trainer = SimpleNamespace(global_rank=rank, world_size=world)
            for number, own in enumerate(SharedBatches(range(13), batch, rank, world)):
                drawn = evaluation_positions(trainer, len(own))
                found |= {(number, image, place) for image, place in zip(own, drawn, strict=True)}
        return found

    assert places(devices, 6 // devices) == places(1, 6) == {(image // 6, image, image % 6) for image in range(13)}
    assert {(number, image) for number, image, _ in places(devices, 5)} == {
        (number, image) for number, image, _ in places(1, 5 * devices)
    }
