"""DataModuleFromConfig: data sets from a config, in an order that depends on (seed, member, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.util import generator, instantiate_from_config


class KeyedBatches(Sampler[list[int]]):
    """Batches of one device, from a permutation of the data seeded by (seed, member, epoch).

    A global batch holds `batch_size * world_size` images and rank r takes the r-th part of it, so any number of devices
    sees the same global batches. The last, smaller batch of an epoch is left out, unless it is the only one.
    `start` skips batches of the first epoch that a resumed run has done.
    """

    def __init__(
        self,
        data: Sized,
        batch_size: int,
        seed: int,
        member: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ):
        if len(data) == 0:
            raise ValueError("the training data set is empty: check its folder, split and subset")
        self.data, self.batch_size, self.seed, self.member = data, batch_size, seed, member
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return max(1, len(self.data) // (self.batch_size * self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; called by Lightning before each one."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def resume(self, batches_done: int, batches_per_epoch: int) -> None:
        """Continue after `batches_done` batches of the whole training."""
        epoch, start = divmod(batches_done, batches_per_epoch)
        self.set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Iterator[list[int]]:
        count, size = len(self.data), self.batch_size * self.world_size
        if self.shuffle:
            order = torch.randperm(count, generator=generator("order", self.seed, self.member, self.epoch)).tolist()
        else:
            order = list(range(count))
        for batch in range(self.start, len(self)):
            chosen = order[batch * size : (batch + 1) * size]
            share = -(-len(chosen) // self.world_size)
            part = chosen[self.rank * share : (self.rank + 1) * share]
            yield part or chosen[:1]


class WrappedDataset(Dataset):
    """Any object with `__len__` and `__getitem__` as a torch Dataset."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class DataModuleFromConfig(pl.LightningDataModule):
    """Train, validation, test and predict sets given as `target`/`params` (latent-diffusion's `main.py`).

    `seed` and `member` (set by the trainer script) decide the order of training. Batches hold what the data
    sets return: `image` [B, H, W, C] in [-1, 1], `class_label` [B], `index` [B], ...
    """

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
    ):
        super().__init__()
        named = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {name: config for name, config in named.items() if config is not None}
        self.batch_size, self.wrap = batch_size, wrap
        self.num_workers = min(2 * batch_size, 8) if num_workers is None else num_workers
        self.shuffled = {"validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        self.use_worker_init_fn = use_worker_init_fn
        self.seed = self.member = 0
        self.datasets: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets, once."""
        for name, config in self.dataset_configs.items():
            if name not in self.datasets:
                data = instantiate_from_config(config)
                self.datasets[name] = WrappedDataset(data) if self.wrap else data

    def _loader(self, name: str, **options: Any) -> DataLoader:
        if name not in self.datasets:
            raise ValueError(f"the config has no data.params.{name}; it has {sorted(self.dataset_configs)}")
        return DataLoader(
            self.datasets[name], num_workers=self.num_workers, pin_memory=torch.cuda.is_available(), **options
        )

    def train_dataloader(self) -> DataLoader:
        """Keyed order; a resumed training continues at the batch where it stopped."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        batches = KeyedBatches(self.datasets["train"], self.batch_size, self.seed, self.member, rank, world)
        if trainer is not None:
            limit = trainer.limit_train_batches
            per_epoch = min(len(batches), limit) if isinstance(limit, int) else int(len(batches) * limit)
            batches.resume(trainer.fit_loop.epoch_loop.batch_progress.total.processed, max(1, per_epoch))
        return self._loader("train", batch_sampler=batches)

    def _evaluation_loader(self, name: str) -> DataLoader:
        if name not in self.datasets:
            return self._loader(name)
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        order = range(len(self.datasets[name]))
        if self.shuffled.get(name):
            order = torch.randperm(len(order), generator=generator(name, self.seed)).tolist()
        return self._loader(name, batch_size=self.batch_size, sampler=list(order)[rank::world])

    def val_dataloader(self) -> DataLoader | list:
        return self._evaluation_loader("validation") if "validation" in self.datasets else []

    def test_dataloader(self) -> DataLoader | list:
        return self._evaluation_loader("test") if "test" in self.datasets else []

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader("predict")
