"""The latent cache of a training: which data sets it covers, and encoding what is missing; see `ldm.data.latents`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint import tensors_sha256
from ldm.data.latents import Encode, LatentStore, count_views, describe_data, innermost, with_latents
from ldm.data.module import DataModuleFromConfig
from ldm.jobs import shard_from_environment
from ldm.memory import rows_that_fit
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.stages import split_posterior
from ldm.training.config import to_plain

log = logging.getLogger(__name__)

CACHED = ("train", "validation")


def find_cached_modules(data: pl.LightningDataModule) -> list[DataModuleFromConfig]:
    """The data modules with a latent cache: of one training, or of every member of a joint one."""
    return [module for module in getattr(data, "modules", [data]) if getattr(module, "latent_cache", None)]


def open_stores(
    model: LatentDiffusion, config: Mapping[str, Any], data: pl.LightningDataModule, shard: tuple[int, int]
) -> Iterator[tuple[DataModuleFromConfig, str, LatentStore]]:
    """The store of each data set of a training."""
    params = {key: value for key, value in (config.get("params") or {}).items() if key != "ckpt_path"}  # may move
    weights = tensors_sha256(model.first_stage_model.state_dict())
    first_stage = {"target": config["target"], "params": params, "weights_sha256": weights}
    for module in find_cached_modules(data):
        for name in [name for name in CACHED if name in module.datasets]:
            inner = innermost(module.datasets[name])
            views = count_views(inner, module.latent_views)
            settings = {"first_stage": first_stage, "data": describe_data(inner)}
            count, sampled = len(inner._all_labels), model.first_stage_encoding == "sample"
            yield module, name, LatentStore(str(module.latent_cache), settings, count, views, shard, sampled)


def make_encoder(model: LatentDiffusion, device: torch.device) -> Encode:
    """Move the first stage to a device, and return what encodes images there for a cache."""
    first_stage = model.first_stage_model.to(device)

    @torch.no_grad()
    def encode(images: Tensor) -> tuple[Tensor, ...]:
        return split_posterior(first_stage.encode(images.to(device)))

    return encode


def fill(
    store: LatentStore, module: DataModuleFromConfig, name: str, model: LatentDiffusion, device: torch.device
) -> None:
    """Encode what is missing of this process's share of a data set."""
    pending = store.work.pending(store.keys)
    if not pending:
        return
    inner, encode = innermost(module.datasets[name]), make_encoder(model, device)
    height, width, channels = inner.image_shape
    image = torch.zeros(1, channels, height, width, device=device)
    batch = min(256, rows_that_fit(lambda: encode(image), device))
    total = store.views * sum(min(store.images - int(key) * store.block, store.block) for key in pending)
    with tqdm(desc=f"latents ({name})", unit="image", total=total) as progress:
        for done in store.fill(inner, encode, batch, module.num_workers):
            progress.update(done - progress.n)
    model.first_stage_model.to(model.device)


def prepare_latents(
    model: pl.LightningModule,
    config: DictConfig,
    data: pl.LightningDataModule,
    device: torch.device,
    finish: bool = True,
) -> bool:
    """Encode what the caches of a training lack, and let its data sets read them.

    Processes of torchrun or of an array job take their shares first. With `finish` each then does what is still
    missing, so that the cache is complete on return; without it only the share is done.

    Args:
        model: as it will train, with the first stage's weights; or the members of a joint training.
        config: of the training.
        data: set up; data sets without a `latent_cache` stay as they are.

    Returns:
        Whether all caches are complete.
    """
    if not find_cached_modules(data):
        return True
    own: LatentDiffusion = getattr(model, "members", [model])[0]
    if isinstance(own.first_stage_model, IdentityFirstStage):
        log.warning("data.params.latent_cache: this model has no first stage, there is nothing to encode")
        return True
    first_stage = to_plain(config.model.params.first_stage_config)
    found = list(open_stores(own, first_stage, data, shard_from_environment()))
    for module, name, store in found:
        fill(store, module, name, own, device)
        if finish:
            store.work.shard = (0, 1)
            fill(store, module, name, own, device)
            store.check_deviations(innermost(module.datasets[name]), make_encoder(own, device))
            own.first_stage_model.to(own.device)
            module.datasets[name] = with_latents(module.datasets[name], store)
            log.info("latents of %s: %s", name, store.folder)
    return all(store.complete for _, _, store in found)
