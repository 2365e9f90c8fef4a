"""Exponential moving average of a model's parameters, under the published state-dict keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# The decay that update n may have at most.
RAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "counts": lambda n: (1 + n) / (10 + n),
    "power": lambda n: 1 - (1 + n) ** (-2 / 3),
    "half_life": lambda n: 2.0 ** (-20 / n.clamp(min=1)),
}


class LitEma(nn.Module):
    """Averages of the parameters that require gradients when it is built.

    Update n: `shadow -= (1 - d) (shadow - parameter)` with `d = min(decay, (1 + n) / (10 + n))`, with the ramp "power"
    `d = min(decay, 1 - (1 + n)^(-2/3))`, or with "half_life" `d = min(decay, 2^(-20 / n))`: half of the average is of
    the last twentieth of the updates, until the decay is reached.

    State dict: `decay` (float32), `num_updates` (int32; -1: no warm-up) and each parameter's name without its dots.

    Args:
        model: whose parameters are averaged.
        decay: limit of d, in [0, 1].
        use_num_updates: begin with a smaller d, as above; otherwise d = decay.
        ramp: how d grows, "counts", "power" or "half_life".

    Source: the rule of TensorFlow's ExponentialMovingAverage; keys of latent-diffusion; the power is k-diffusion's, the
    half-life EDM's (Karras et al. 2022, `ema_rampup_ratio` 0.05).
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True, ramp: str = "counts"):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        if ramp not in RAMPS:
            raise ValueError(f"ramp must be one of {', '.join(RAMPS)}, got '{ramp}'")
        self.ramp = ramp
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_updates else -1, dtype=torch.int32))
        self.shadow_names: dict[str, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shadow_name = name.replace(".", "")
                if shadow_name in self.shadow_names.values():
                    raise ValueError(
                        f"two parameters are called '{shadow_name}' once dots are removed; rename '{name}'"
                    )
                self.shadow_names[name] = shadow_name
                self.register_buffer(shadow_name, parameter.detach().clone())
        self._stored: list[Tensor] | None = None

    def forward(self, model: nn.Module) -> None:
        """Move the averages towards the parameters of `model`."""
        self.update(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the parameters of `model`, all tensors at once; the device is not waited for."""
        counted = self.num_updates >= 0
        self.num_updates += counted
        n = self.num_updates
        decay = torch.where(counted, torch.minimum(self.decay, RAMPS[self.ramp](n)), self.decay)
        pairs = self._pairs(model)
        if not pairs:
            return
        shadows, parameters = (list(side) for side in zip(*pairs, strict=True))
        moves = torch._foreach_sub(shadows, parameters)
        torch._foreach_mul_(moves, 1 - decay)
        torch._foreach_sub_(shadows, moves)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into the parameters of `model`."""
        for shadow, parameter in self._pairs(model):
            parameter.copy_(shadow)

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Start the averages again from the model's weights."""
        for shadow, parameter in self._pairs(model):
            shadow.copy_(parameter)
        self.num_updates.fill_(min(int(self.num_updates), 0))

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep a copy of parameters, to be put back by `restore`."""
        self._stored = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put back what `store` kept, in the same order, and forget it."""
        if self._stored is None:
            raise ValueError("nothing to restore; call store first")
        for stored, parameter in zip(self._stored, parameters, strict=True):
            parameter.copy_(stored)
        self._stored = None

    @contextmanager
    def scope(self, model: nn.Module) -> Iterator[None]:
        """The model with averaged weights inside the block, its own again after it."""
        parameters = list(model.parameters())
        self.store(parameters)
        self.copy_to(model)
        try:
            yield
        finally:
            self.restore(parameters)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, nn.Parameter]]:
        parameters = dict(model.named_parameters())
        missing = [name for name in self.shadow_names if name not in parameters]
        if missing:
            raise ValueError(f"the model lacks {len(missing)} averaged parameters, e.g. '{missing[0]}'")
        buffers = dict(self.named_buffers())
        return [(buffers[shadow], parameters[name]) for name, shadow in self.shadow_names.items()]
