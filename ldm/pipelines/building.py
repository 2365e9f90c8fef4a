"""A diffusion model of a config, and the weights of its parts from the files that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.checkpoint import load_checkpoint, matches
from ldm.ensembles.heads import merge
from ldm.ensembles.storage import verified_base
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.conditioned import network_alone
from ldm.modules.low_rank import fold_factors
from ldm.state_dicts import name_some
from ldm.trust import escape
from ldm.util import get_obj_from_str, instantiate_from_config

FIRST_STAGE = "model.params.first_stage_config.params"


def build_model(config: Mapping[str, Any]) -> LatentDiffusion:
    """Build the diffusion model of a config without weights: no file is read, and no averages are kept.

    Raises:
        ValueError: if the config's model is something else, a first stage for example.
    """
    model = _as_node(config).get("model")
    spec = (
        OmegaConf.create(escape(OmegaConf.to_container(model, resolve=True)))
        if isinstance(model, DictConfig)
        else model
    )
    if not isinstance(spec, DictConfig) or not {"target", "params"} <= set(spec):
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
    What the config's `ignore_keys` name may be in a file without a place in the model, here as in training.

    Raises:
        ValueError: if a part of the model has weights and none are given.
    """
    content = load_checkpoint(checkpoint)
    is_member = isinstance(content, dict) and "component" in content
    if pretrained is not None and not is_member:
        raise ValueError(f"--pretrained is the base of a member, and {checkpoint} is no member: leave it out")
    if is_member:
        member = content["component"]
        base = verified_base(pretrained or member["trunk_path"], member["trunk_sha256"])
        load_weights(model, base, config=config)
        state = model.state_dict()
        check_heads(content["state_dict"], member["patterns"], state, checkpoint)
        model.load_state_dict(merge(state, fold_factors(content["state_dict"], state)))
        return
    if network_alone(content, averaged) is not None:
        _load_first_stage(model, checkpoint, config or {})
    model.init_from_ckpt(str(checkpoint), use_averaged=averaged, content=content)


def _load_first_stage(model: LatentDiffusion, checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Read the first stage of a file of the network alone from the file that a config names, where it has weights."""
    if not any(True for _ in model.first_stage_model.parameters()):
        return
    params = OmegaConf.select(_as_node(config), FIRST_STAGE) or {}
    if not params.get("ckpt_path"):
        raise ValueError(
            f"{checkpoint} holds the network alone: name its first stage in the config, {FIRST_STAGE}.ckpt_path"
        )
    model.first_stage_model.init_from_ckpt(params["ckpt_path"], params.get("ignore_keys") or ())


def check_heads(
    heads: Mapping[str, Any], patterns: Sequence[str], state: Mapping[str, Any], source: str | Path
) -> None:
    """Check that a member has all the heads that its record names.

    Args:
        heads: what the member holds, by name.
        patterns: of its heads.
        state: the base model's state dict.
        source: the file or folder, for messages.

    Raises:
        ValueError: naming those that it lacks.
    """
    lacking = [name for name in state if matches(name, patterns) and name not in heads]
    if lacking:
        raise ValueError(f"{source} lacks heads of the member that it holds: {name_some(lacking)}; train it again")
