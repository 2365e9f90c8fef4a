"""A diffusion model of a config, and the weights of its parts from the files that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.checkpoint import load_checkpoint
from ldm.ensembles.heads import merge
from ldm.ensembles.storage import verified_base
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.conditioned import network_alone
from ldm.modules.low_rank import fold_factors
from ldm.util import get_obj_from_str, instantiate_from_config

FIRST_STAGE = "model.params.first_stage_config.params.ckpt_path"


def build_model(config: Mapping[str, Any]) -> LatentDiffusion:
    """Build the diffusion model of a config without weights: no file is read, and no averages are kept.

    Raises:
        ValueError: if the config's model is something else, a first stage for example.
    """
    spec = OmegaConf.create(OmegaConf.to_container(_as_node(config)["model"], resolve=True))
    if not isinstance(spec, DictConfig):
        raise ValueError(f"a config's model is a mapping with target and params, got '{spec}'")
    target = get_obj_from_str(spec.target)
    if not (isinstance(target, type) and issubclass(target, LatentDiffusion)):
        raise ValueError(f"model.target {spec.target} is no LatentDiffusion, there is nothing to sample from it")
    spec.params.use_ema = False
    for params in (spec.params, OmegaConf.select(spec, "params.first_stage_config.params")):
        if params is not None and "ckpt_path" in params:
            params.ckpt_path = None
    return instantiate_from_config(spec)


def _as_node(config: Mapping[str, Any]) -> DictConfig:
    """Return a mapping as OmegaConf's, which interpolates and selects."""
    return config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))


def load_weights(
    model: LatentDiffusion,
    checkpoint: Path,
    averaged: bool = True,
    pretrained: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Load a checkpoint strictly; that of a member is its heads, on the base checkpoint it names or `pretrained`.

    A published file of the network alone comes without a first stage: it is read from the file that `config` names.

    Raises:
        ValueError: if the first stage has weights and none are given.
    """
    content = load_checkpoint(checkpoint)
    if "component" in content:
        member = content["component"]
        base = verified_base(pretrained or member["trunk_path"], member["trunk_sha256"])
        model.init_from_ckpt(str(base), use_averaged=True)
        state = model.state_dict()
        model.load_state_dict(merge(state, fold_factors(content["state_dict"], state)))
        return
    alone = network_alone(content, averaged) is not None
    model.init_from_ckpt(str(checkpoint), use_averaged=averaged, content=content)
    if alone and any(True for _ in model.first_stage_model.parameters()):
        first_stage = OmegaConf.select(_as_node(config or {}), FIRST_STAGE)
        if not first_stage:
            raise ValueError(f"{checkpoint} holds the network alone: name its first stage in the config, {FIRST_STAGE}")
        model.first_stage_model.init_from_ckpt(first_stage)
