"""The parts of a network by name: what heads, folding of members, last-layer Laplace and probes ask of it.

Every network of ours has a property `parts`. Of any other module `find_parts` finds the last layer, which is its
output; its further heads are named by patterns.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

LAYERS = (nn.Conv2d, nn.Linear)
# The argument of the network, after states and times, that takes the rest of the condition.
CONDITION_ARGUMENTS = {"crossattn": "context", "hybrid": "context", "adm": "y"}


@dataclass(frozen=True)
class Parts:
    """Where a network keeps its parts. All names are dotted names below the network, as in its state dict.

    Args:
        class_tables: {parameter that holds something for each class: the axis that counts the classes}.
        time_embedding: patterns (`fnmatch`) of the parameters that embed the time.
        condition: patterns of all parameters that act before the network reads its state x: those of its stage
            `condition`. Empty: the network has no such stage.
        output: patterns of the parameters of its stage `readout`, which come last.
        last_layer: the convolution or linear layer that the output is affine in; None: there is none.
        adds_to_last: whether the output is what the last layer, a convolution, makes and something else added to it.
        taps: {short name: submodule} of the blocks whose output can be read as features.
        token_tables: parameters that hold a row for each token of a text.
    """

    class_tables: Mapping[str, int] = field(default_factory=dict)
    time_embedding: tuple[str, ...] = ()
    condition: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    last_layer: str | None = None
    adds_to_last: bool = False
    taps: Mapping[str, str] = field(default_factory=dict)
    token_tables: tuple[str, ...] = ()

    def below(self, prefix: str) -> Parts:
        """Return the same parts of a module that holds the network under `prefix`, which ends in a dot."""
        return replace(
            self,
            class_tables={prefix + name: axis for name, axis in self.class_tables.items()},
            token_tables=tuple(prefix + name for name in self.token_tables),
            time_embedding=tuple(prefix + pattern for pattern in self.time_embedding),
            condition=tuple(prefix + pattern for pattern in self.condition),
            output=tuple(prefix + pattern for pattern in self.output),
            last_layer=None if self.last_layer is None else prefix + self.last_layer,
            taps={tap: prefix + name for tap, name in self.taps.items()},
        )


def find_parts(network: nn.Module) -> Parts:
    """Return the parts that a network names; of one that names none its last convolution or linear layer."""
    named = getattr(network, "parts", None)
    if isinstance(named, Parts):
        return named
    layers = [name for name, module in network.named_modules() if name and isinstance(module, LAYERS)]
    if not layers:
        return Parts()
    return Parts(output=(f"{layers[-1]}.*",), last_layer=layers[-1])


def check_call(network: nn.Module, conditioning_key: str | None) -> None:
    """Check that a network takes states, times and the condition that `conditioning_key` hands it.

    Raises:
        ValueError: saying what it takes.
    """
    name = CONDITION_ARGUMENTS.get(conditioning_key or "")
    own = inspect.signature(network.forward)
    try:
        own.bind(None, None, **({} if name is None else {name: None}))
    except TypeError:
        given = "x, t" if name is None else f"x, t, {name}={name}"
        taken = ", ".join(own.parameters)
        raise ValueError(
            f"model.params.unet_config: a network with conditioning_key {conditioning_key or 'null'} is called as "
            f"network({given}), and a {type(network).__name__} takes ({taken})"
        ) from None
