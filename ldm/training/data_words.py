"""Which data set words of a command line mean: one of a config file, one by its class, or the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from ldm.data.own import splits_of
from ldm.training.config import SPLITS, to_plain
from ldm.training.config_keys import load_checked_config


def read_data_config(words: Sequence[str], name: str = "--data") -> dict[str, Any]:
    """Return the `target` and `params` of a data set named by words: target=.. params.x=.., or CONFIG.yaml:train a.b=c.

    Args:
        name: of the option that the words were given to, for messages.

    Raises:
        ValueError: if the words name no target, or the config has no such split.
    """
    if ".yaml" not in words[0]:
        own = to_plain(OmegaConf.from_dotlist(list(words)))
        if "target" not in own:
            raise ValueError(f"{name} needs target=..., or CONFIG.yaml:train; got {' '.join(words)}")
        return own
    file, _, split = words[0].partition(":")
    params = load_checked_config([file], words[1:], needs=("data",), build=()).data.params
    if split not in params or split not in SPLITS:
        known = ", ".join(f"{file}:{name}" for name in SPLITS if name in params)
        raise ValueError(f"{name} {words[0]}: expected one of {known}")
    return to_plain(params[split])


def choose_data_config(
    words: Sequence[str] | None, config: Mapping[str, Any], split: str, remedy: str, name: str = "--data"
) -> Mapping[str, Any]:
    """Return the `target` and `params` of the data set that words name, or without any of a split of a model's config.

    Args:
        words, name: see `read_data_config`.
        config: of the model.
        split: of its `data.params`.
        remedy: what to do where it has no such split.

    Raises:
        ValueError: if the words name no data set, or the config has none.
    """
    return splits_of(config, split, remedy=remedy)[split] if words is None else read_data_config(words, name)
