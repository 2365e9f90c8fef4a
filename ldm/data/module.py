"""DataModuleFromConfig: data sets from a config, in an order that depends on (seed, member, epoch) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.data.loading import ResumableLoader
from ldm.data.own import check_map_style
from ldm.util import generator, instantiate_from_config


class KeyedBatches(Sampler[list[int]]):
    """Batches of one device, from permutations of the data seeded by (seed, member, epoch).

    A global batch holds `batch_size * world_size` images and rank r takes the r-th part of it, so any number of devices
    sees the same global batches. The last, smaller batch of an epoch is left out, unless it is the only one.

    `done()` counts the batches of the whole training so far; every iteration goes on from there to the end of that
    epoch. `limit` is the number of batches that make an epoch, if it is cut short.
    """

    def __init__(
        self,
        data: Sized,
        batch_size: int,
        seed: int,
        member: int,
        rank: int = 0,
        world_size: int = 1,
        done: Callable[[], int] = int,
        limit: int | float = 1.0,
    ):
        if len(data) == 0:
            raise ValueError("the training data set is empty: check its folder, split and subset")
        self.data, self.batch_size, self.seed, self.member = data, batch_size, seed, member
        self.rank, self.world_size, self.done = rank, world_size, done
        whole = max(1, len(data) // (batch_size * world_size))
        self.per_epoch = max(1, min(whole, limit) if isinstance(limit, int) else int(whole * limit))

    def __len__(self) -> int:
        return max(1, len(self.data) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        done = self.done()
        epoch, start = divmod(done, self.per_epoch)
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)
        order = self.order(epoch)
        for batch in range(start, len(self)):
            yield self.share(order, batch)

    def order(self, epoch: int) -> list[int]:
        """The permutation of an epoch."""
        return torch.randperm(len(self.data), generator=generator("order", self.seed, self.member, epoch)).tolist()

    def share(self, order: Sequence[int], batch: int) -> list[int]:
        """This device's part of a global batch of the order."""
        size = self.batch_size * self.world_size
        chosen = order[batch * size : (batch + 1) * size]
        share = -(-len(chosen) // self.world_size)
        return list(chosen[self.rank * share : (self.rank + 1) * share] or chosen[:1])


class SharedBatches(Sampler[list[int]]):
    """Batches of one device for an evaluation: global batches in a given order, none left out.

    Rank r takes every world_size-th image from the r-th on, so that it knows their places in the global batch whatever
    that batch's size (`ldm.models.diffusion.optimisation.evaluation_positions`).
    """

    def __init__(self, order: Sequence[int], batch_size: int, rank: int = 0, world_size: int = 1):
        size, self.batches = batch_size * world_size, []
        for start in range(0, len(order), size):
            self.batches.append(list(order[start : start + size])[rank::world_size])
        self.batches = [batch for batch in self.batches if batch]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class WrappedDataset(Dataset):
    """Any object with `__len__` and `__getitem__` as a torch Dataset."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation the data draw, where they draw any."""
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)


class DataModuleFromConfig(pl.LightningDataModule):
    """Train, validation, test and predict sets given as `target`/`params` (latent-diffusion's `main.py`).

    `seed` and `member` (set by the trainer script) decide the order of training. Batches hold what the data
    sets return: `image` [B, H, W, C] in [-1, 1], `class_label` [B], `index` [B], ... With `latent_cache`, a folder,
    main.py encodes the images once and `image` holds latents (see `ldm.data.latents`); `latent_views` is the number of
    random crops and flips of each that it keeps.
    """

    # `use_worker_init_fn` is accepted for released YAMLs: draws are seeded per image here, whatever the worker.
    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        predict: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        latent_cache: str | None = None,
        latent_views: int | None = None,
    ):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.params.batch_size must be at least 1, got {batch_size}")
        self.latent_cache, self.latent_views = latent_cache, latent_views
        named = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {name: config for name, config in named.items() if config is not None}
        self.batch_size, self.wrap = batch_size, wrap
        self.num_workers = min(2 * batch_size, 8) if num_workers is None else num_workers
        self.shuffled = {"validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        self.seed = self.member = 0
        self.datasets: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets, once."""
        for name, config in self.dataset_configs.items():
            if name not in self.datasets:
                data = instantiate_from_config(config)
                check_map_style(data, config, f"data.params.{name}: ")
                self.datasets[name] = WrappedDataset(data) if self.wrap else data

    def dataset(self, name: str) -> Any:
        """The data set of a split.

        Raises:
            ValueError: if the config has none.
        """
        if name not in self.datasets:
            raise ValueError(f"the config has no data.params.{name}; it has {sorted(self.dataset_configs)}")
        return self.datasets[name]

    def loader(self, data: Any, **options: Any) -> DataLoader:
        """A loader with this module's workers."""
        return ResumableLoader(
            data,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def train_batches(self) -> KeyedBatches:
        """Keyed order; a resumed training continues at the batch where it stopped, by the trainer's own count."""
        trainer = self.trainer
        options: dict[str, Any] = {}
        if trainer is not None:
            options = {
                "rank": trainer.global_rank,
                "world_size": trainer.world_size,
                "limit": trainer.limit_train_batches,
            }
            options["done"] = lambda: trainer.fit_loop.epoch_loop.batch_progress.total.processed
        return KeyedBatches(self.dataset("train"), self.batch_size, self.seed, self.member, **options)

    def train_dataloader(self) -> DataLoader:
        batches = self.train_batches()
        return self.loader(batches.data, batch_sampler=batches)

    def _evaluation_loader(self, name: str) -> DataLoader:
        data, trainer = self.dataset(name), self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        order = range(len(data))
        if self.shuffled.get(name):
            order = torch.randperm(len(order), generator=generator(name, self.seed)).tolist()
        return self.loader(data, batch_sampler=SharedBatches(order, self.batch_size, rank, world))

    def val_dataloader(self) -> DataLoader | list:
        return self._evaluation_loader("validation") if "validation" in self.datasets else []

    def test_dataloader(self) -> DataLoader | list:
        return self._evaluation_loader("test") if "test" in self.datasets else []

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader("predict")
