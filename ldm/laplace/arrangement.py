"""How a network lays out what its last layer makes: tokens into an image, for example, found by one probe.

The layer's output is replaced by numbers that tell its entries apart, so the network's output shows where each goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

# One row of a network's arguments: a state [1, C, H, W], a time [1], a condition [1, ...] or None.
Example = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Arrangement:
    """A network's output as entries of its last layer's: output.flatten(1)[:, i] = made.flatten(1)[:, source[i]].

    Args:
        source: place of each entry of the output in what the layer makes, both flattened, of one image.
        shape: of the output of one image [C, H, W].
        made: of what the layer makes of one image: [N, D] of a linear layer, [D, H', W'] of a convolution.
    """

    source: Tensor
    shape: tuple[int, ...]
    made: tuple[int, ...]

    def place(self, channels: int, linear: bool) -> Places:
        """Find the layer's rows and positions that make the first channels of the output, and where.

        Args:
            channels: of the output, which are regressed.
            linear: whether the layer's own channels come last.

        Raises:
            ValueError: if these rows make other entries at these positions as well.
        """
        count = prod(self.made[:-1]) if linear else prod(self.made[1:])
        depth = self.made[-1] if linear else self.made[0]
        wanted = self.source.reshape(self.shape)[:channels].flatten()
        rows, row = (wanted % depth if linear else wanted // count).unique(return_inverse=True)
        positions, position = (wanted // depth if linear else wanted % count).unique(return_inverse=True)
        if len(wanted) != len(rows) * len(positions):
            raise ValueError(
                f"the first {channels} channels of the output are no whole rows of the last layer: {len(rows)} rows at "
                f"{len(positions)} positions make {len(rows) * len(positions)} entries, the channels hold {len(wanted)}"
            )
        shape = (channels, *self.shape[1:])
        return Places(rows, positions, position * len(rows) + row, shape)


@dataclass(frozen=True, eq=False)
class Places:
    """Channels of a network's output among the entries that its last layer makes, [P, C] of one image.

    Args:
        rows: of the layer that make them [C], in their order.
        positions: at which these make them [P], in their order (a label's token makes none).
        entries: place of each entry of the channels in [P, C], flattened.
        shape: of the channels of one image.
    """

    rows: Tensor
    positions: Tensor
    entries: Tensor
    shape: tuple[int, ...]

    def to(self, device: torch.device) -> Places:
        """Return the same places on a device."""
        return Places(self.rows.to(device), self.positions.to(device), self.entries.to(device), self.shape)

    def lay_out(self, values: Tensor) -> Tensor:
        """The channels [B, ...] of values [B, P, C], or of [B, P, 1], which are every row's."""
        every = values.expand(-1, -1, len(self.rows))
        return every.flatten(1)[:, self.entries].unflatten(1, self.shape)

    def by_position(self, output: Tensor) -> Tensor:
        """The inverse of `lay_out`: [B, P, C] of the channels."""
        shape = (len(self.positions), len(self.rows))
        return output.flatten(1)[:, self.entries.argsort()].unflatten(1, shape)


def find_arrangement(network: nn.Module, name: str, example: Example) -> Arrangement | None:
    """Find how `network(x, t, cond)` lays out what its layer `name` makes; None: its output is the layer's.

    Raises:
        ValueError: if the layer does not run once, or what follows it does more than move entries.
    """
    layer = network.get_submodule(name)
    what = f"'{name}' of {type(network).__name__}"
    made: list[Tensor] = []
    with _replaced(layer, made, None), torch.no_grad():
        output = network(*example)
    if len(made) != 1:
        raise ValueError(f"{what} is not its last layer: it ran {len(made)} times in one pass")
    if not isinstance(output, Tensor) or len(output) != 1:
        raise ValueError(f"{type(network).__name__} must return a tensor [1, ...] for one state")
    entries = made[0].numel()
    source = torch.zeros(output.numel(), dtype=torch.long)
    base = int(1 / torch.finfo(made[0].dtype).eps)  # what this type counts to without rounding
    weight = 1
    while weight < entries:
        numbers = torch.arange(entries, device=made[0].device) // weight % base
        with _replaced(layer, [], numbers.to(made[0].dtype).reshape(made[0].shape)), torch.no_grad():
            found = network(*example).flatten().double()
        digits = found.round().long()
        if not torch.equal(digits.double(), found) or bool(((digits < 0) | (digits >= base)).any()):
            raise ValueError(_changed(what))
        source += weight * digits.cpu()
        weight *= base
    if len(source.unique()) != len(source) or int(source.max()) >= entries:
        raise ValueError(_changed(what))
    same = output.shape == made[0].shape and torch.equal(source, torch.arange(entries))
    return None if same else Arrangement(source, tuple(output.shape[1:]), tuple(made[0].shape[1:]))


def _changed(what: str) -> str:
    return (
        f"what follows {what} does more than move its entries (a scale, an activation, a sum with something else): the "
        "network's output is not that of a last layer; name the layer that it is"
    )


@contextmanager
def _replaced(layer: nn.Module, made: list[Tensor], numbers: Tensor | None) -> Iterator[None]:
    """Keep what a layer makes inside the block in `made`, and let it make `numbers` instead, where they are given."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        made.append(output)
        return numbers

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def make_arrangement(source: Tensor, shape: Sequence[int], made: Sequence[int]) -> Arrangement:
    """Return the arrangement of the values that a file holds."""
    return Arrangement(source.long(), tuple(shape), tuple(made))
