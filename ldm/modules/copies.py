"""Copies of a network around the same weights, in which some of its submodules are others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

_M = TypeVar("_M", bound=nn.Module)
# The stage of a network that a faster one may be laid over, see `ldm.pipelines.speed.FastFeatures`.
LAID_OVER = "features"


def exchange_modules(network: _M, others: Mapping[str, nn.Module]) -> _M:
    """Return a copy of a network with other submodules at some of its names; `network` keeps its own.

    Only the modules on the way to these names are copied, each sharing its parameters with the one that it is of. What
    was laid over the stage `features` of a copied module is laid over that of the copy.

    Args:
        network: the network.
        others: the submodules by dotted name.
    """
    copied = copy.copy(network)
    copied._modules = dict(network._modules)
    below: dict[str, dict[str, nn.Module]] = {}
    for name, module in others.items():
        child, _, rest = name.partition(".")
        if rest:
            below.setdefault(child, {})[rest] = module
        else:
            copied._modules[child] = module
    for child, deeper in below.items():
        copied._modules[child] = exchange_modules(network.get_submodule(child), deeper)
    laid = vars(copied).pop(LAID_OVER, None)
    if laid is not None:
        vars(copied)[LAID_OVER] = laid.of(copied)
    return copied
