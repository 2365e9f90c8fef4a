"""A torch module of the user's own as the network of a diffusion model, with nothing asked of it but its call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.modules.diffusionmodules.util import in_forward_mode, in_functorch
from ldm.modules.parts import LAYERS, Parts, find_parts

# Calls a network: (network, x [B, C, H, W], t [B], condition or None) -> output [B, C', H, W].
Adapter = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Any]
BELOW = "network."


def call_plainly(network: nn.Module, x: Tensor, t: Tensor, cond: Tensor | None) -> Any:
    """Return `network(x, t)`, or `network(x, t, cond)` where there is a condition."""
    return network(x, t) if cond is None else network(x, t, cond)


class AdaptedNetwork(nn.Module):
    """A network (x, t, condition) -> output in the form that a diffusion model takes; its weights lie at `network.*`.

    All of it is one stage: members are evaluated by `vmap`, whichever of its parameters they differ in.

    Args:
        network: the user's module.
        adapter: how it is called, where that is not `network(x, t)` or `network(x, t, condition)`. An output that is
            no tensor is read at its attribute `sample`, or at its first entry.
        parts: of `network`, by its own names, where it does not name them itself.
    """

    def __init__(self, network: nn.Module, adapter: Adapter | None = None, parts: Parts | None = None):
        super().__init__()
        self.network = network
        self.adapter = adapter or call_plainly
        found = find_parts(network) if parts is None else parts
        self.parts = replace(found, condition=()).below(BELOW)

    def condition(self, timesteps: Tensor, y: None = None) -> Tensor:
        """Times `[B]` as they are."""
        return timesteps

    def features(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        """Output `[B, C', H, W]` of states `[B, C, H, W]`, times `[B]` and a condition [B, ...] or None.

        Raises:
            ValueError: if the network returns nothing that holds a tensor.
        """
        with _exact_attention():
            output = self.adapter(self.network, x, emb, context)
        if not isinstance(output, Tensor):
            output = getattr(output, "sample", output[0] if isinstance(output, (tuple, list)) else output)
        if not isinstance(output, Tensor):
            name = type(self.network).__name__
            raise ValueError(f"{name} returned {type(output).__name__}, no tensor: give an adapter that returns one")
        return output

    def readout(self, features: Tensor) -> Tensor:
        """The output as it is."""
        return features

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        return self.features(x, timesteps, context)


def _exact_attention() -> AbstractContextManager[Any]:
    """Attention by its formula where fused kernels have no rule: under transforms and forward derivatives."""
    return sdpa_kernel(SDPBackend.MATH) if in_functorch() or in_forward_mode() else nullcontext()


class GivenLabels(nn.Module):
    """The condition of a network that embeds class labels itself: labels [B], the null class the last of them.

    Args:
        n_classes: number of labels, the null class included.
        null_class: whether the last label is the null class.
        key: entry of a batch that holds the labels.
        ucg_rate: probability of dropping a label in training, as for `ClassEmbedder`.
        null_row: what the network calls the null class, where that is not the last label. Classes are then the other
            labels of the network in their order.
    """

    def __init__(
        self,
        n_classes: int,
        null_class: bool = True,
        key: str = "class_label",
        ucg_rate: float = 0.0,
        null_row: int | None = None,
    ):
        super().__init__()
        self.n_classes = n_classes
        self.null_class = n_classes - 1 if null_class else None
        self.null_row = self.null_class if null_row is None else null_row
        self.key = key
        self.ucg_rate = ucg_rate

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None) -> Tensor:
        """Labels `[B]` of a batch."""
        return batch[self.key if key is None else key]

    def embed(self, labels: Tensor) -> Tensor:
        """The network's labels of labels [B]."""
        null = self.null_class
        if null is None or self.null_row is None or self.null_row == null:
            return labels
        behind = (labels >= self.null_row) & (0 <= self.null_row < null)
        return torch.where(labels == null, self.null_row, labels + behind)

    def drop_labels(self, labels: Tensor, uniform: Tensor) -> Tensor:
        """In training, replace labels `[B]` by the null class where `uniform` [B] is below `ucg_rate`."""
        if not self.training or self.null_class is None:
            return labels
        return torch.where(uniform.to(labels.device) < self.ucg_rate, self.null_class, labels)


def describe_parts(
    network: nn.Module,
    last_layer: str | None,
    n_classes: int | None,
    heads: Mapping[str, Sequence[str]] | None = None,
    taps: Mapping[str, str] | None = None,
) -> Parts:
    """Return the parts of a network that names none, from what is said and what can be seen.

    Args:
        network: the module.
        last_layer: its last layer; None: it has none.
        n_classes: number of its labels, the null class included. A single `nn.Embedding` of so many rows is the class
            table.
        heads: patterns of parameters of the heads class_embedding, output and time_embedding.
        taps: {short name: submodule}.

    Raises:
        ValueError: for a head of another name.
    """
    given = {head: tuple(patterns) for head, patterns in (heads or {}).items()}
    named = {"class_embedding", "output", "time_embedding"}
    if not given.keys() <= named:
        raise ValueError(f"heads of a network are named {sorted(named)}, got {sorted(given.keys() - named)}")
    tables = {
        f"{name}.weight": 0
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == n_classes
    }
    said = given.get("class_embedding")
    output = () if last_layer is None else (f"{last_layer}.*",)
    return Parts(
        class_tables=({} if len(tables) > 1 else tables) if said is None else _class_axes(network, said, n_classes),
        time_embedding=given.get("time_embedding", ()),
        output=given.get("output", output),
        last_layer=last_layer,
        taps=dict(taps or {}),
    )


def _class_axes(network: nn.Module, patterns: Sequence[str], n_classes: int | None) -> dict[str, int]:
    """Return {parameter: axis} of the parameters that fit and have an axis of `n_classes` entries."""
    chosen = {
        name: list(value.shape)
        for name, value in network.named_parameters()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    axes = {name: shape.index(n_classes) for name, shape in chosen.items() if n_classes in shape}
    if not axes:
        raise ValueError(
            f"head class_embedding: none of {list(patterns)} is a parameter with an axis of {n_classes} classes; "
            f"those that fit are {chosen or 'none'}"
        )
    return axes


def find_last_layer(network: nn.Module, call: Callable[[], Any]) -> str | None:
    """Return the convolution or linear layer that runs last in a call; None where none runs."""
    order: list[str] = []
    with _watched(network, order):
        call()
    return order[-1] if order else None


@contextmanager
def _watched(network: nn.Module, order: list[str]) -> Iterator[None]:
    """Append the names of the layers that run inside the block."""
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, LAYERS)]

    def write(name: str) -> Callable[..., None]:
        return lambda *_: order.append(name)

    handles = [module.register_forward_pre_hook(write(name)) for name, module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
