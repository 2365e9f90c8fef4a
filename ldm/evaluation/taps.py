"""Features inside a diffusion model: activations of its backbone at a noise level, in passes without a readout.

    x_u = alpha(u) x_0 + sigma(u) eps,    features = mean over eps of pool(activation of a layer at (c_in x_u, t(u)))

A *tap* is a layer by name: what the network's `parts` say (`in_1` .., `mid`, `out_1` .. of a UNet, `layer-0` .. of
a DiT), or a submodule's dotted name. Source: Xiang et al. 2023 (arXiv 2303.09769).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.denoiser import Target
from ldm.diffusion.noise import keyed_normal
from ldm.diffusion.schedule import Schedule
from ldm.modules.parts import Parts

# (time u, tap): one place that features are read from.
Place = tuple[float, str]


class _Reached(Exception):
    """Ends a forward pass whose remaining layers nobody reads."""


def named_taps(network: nn.Module) -> dict[str, str]:
    """{tap: submodule of `network`} by the first module in it that names its parts; empty where none does."""
    for prefix, module in network.named_modules():
        parts = getattr(module, "parts", None)
        if isinstance(parts, Parts):
            return dict((parts.below(f"{prefix}.") if prefix else parts).taps)
    return {}


def resolve_taps(network: nn.Module, taps: Sequence[str]) -> dict[str, str]:
    """{tap: submodule} of the wanted taps, given by tap or by dotted name; "all" are the network's own.

    Raises:
        ValueError: for a layer that does not exist.
    """
    known, modules = named_taps(network), dict(network.named_modules())
    if list(taps) == ["all"]:
        if not known:
            raise ValueError(f"{type(network).__name__} names no taps; give layers by their dotted names")
        return known
    found = {tap: known.get(tap, tap) for tap in taps}
    missing = [tap for tap, name in found.items() if not name or name not in modules]  # "" is the whole network
    if missing:
        raise ValueError(f"no layers {missing}; the taps are {', '.join(known) or 'none'}, or dotted submodule names")
    return found


def activations(network: nn.Module, taps: Mapping[str, str], *inputs: Any) -> dict[str, Tensor]:
    """{tap: output of its submodule} of `network(*inputs)`; the pass ends when the last of them is there."""
    found: dict[str, Tensor] = {}

    def keep(tap: str):
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found[tap] = output
            if len(found) == len(taps):
                raise _Reached

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(tap)) for tap, name in taps.items()]
    try:
        network(*inputs)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return {tap: found[tap] for tap in taps}


def pool_activation(activation: Tensor, pool: int | None = 1) -> Tensor:
    """Vectors [B, D] of a map [B, C, H, W], of tokens [B, N, C], or of what is a vector already.

    `pool` 1 is the mean over positions (D = C), k the means of a k x k grid (D = k k C), None all positions.

    Raises:
        ValueError: for another shape, or tokens that form no square where a grid is wanted.
    """
    if activation.ndim == 2:
        return activation
    if activation.ndim == 3:
        if pool == 1:
            return activation.mean(1)
        side = round(activation.shape[1] ** 0.5)
        if side**2 != activation.shape[1]:
            raise ValueError(f"{activation.shape[1]} tokens are no square grid; pool them to 1")
        activation = activation.transpose(1, 2).unflatten(2, (side, side))
    if activation.ndim != 4:
        raise ValueError(f"expected a map [B, C, H, W] or tokens [B, N, C], got {tuple(activation.shape)}")
    if pool == 1:
        return activation.mean((2, 3))
    return (activation if pool is None else F.adaptive_avg_pool2d(activation, pool)).flatten(1)


@dataclass(frozen=True)
class Reading:
    """What is read from a backbone.

    Args:
        times: noise levels as times u of the schedule.
        taps: {tap: submodule}, see `resolve_taps`.
        pool: see `pool_activation`.
        draws: numbers of the noise draws that features are averaged over.
        seed: of the noise; that of image i at draw k comes from (seed, i, k), the same at every time.
    """

    times: tuple[float, ...]
    taps: Mapping[str, str]
    pool: int | None = 1
    draws: tuple[int, ...] = (0,)
    seed: int = 0

    def __post_init__(self):
        if not (self.times and self.taps and self.draws):
            raise ValueError("a reading needs at least one time, one tap and one noise draw")

    @property
    def places(self) -> list[Place]:
        return [(u, tap) for u in self.times for tap in self.taps]

    def describe(self) -> dict[str, Any]:
        return {"times": self.times, "taps": dict(self.taps), "pool": self.pool, "draws": self.draws, "seed": self.seed}


@dataclass(frozen=True)
class Backbone:
    """A diffusion model as a reader of features.

    Args:
        network: `network(x, t, cond)`, in evaluation mode.
        schedule, target: noise levels, and the scaling of the network's input.
        cond: class label that every image gets (the null class, for example); None where the network takes none.
    """

    network: nn.Module
    schedule: Schedule
    target: Target
    cond: int | None = None

    def inputs(self, x0: Tensor, eps: Tensor, u: Tensor | float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Arguments of the network for clean states and noise [B, C, H, W] at the time u, or times [B]."""
        alpha, sigma = self.schedule.per_image(u)
        scale = self.target.coefficients(alpha, sigma)[2].to(x0)
        time = self.schedule.time_to_net(u).to(device=x0.device, dtype=torch.float32).expand(len(x0))
        cond = None if self.cond is None else torch.full((len(x0),), self.cond, device=x0.device)
        return scale * (alpha.to(x0) * x0 + sigma.to(x0) * eps), time, cond

    def read(
        self, taps: Mapping[str, str], x0: Tensor, eps: Tensor, u: Tensor | float, pool: int | None = 1
    ) -> dict[str, Tensor]:
        """{tap: features [B, D]} in one pass, with autograd if it is on; taps as `resolve_taps` gives them."""
        found = activations(self.network, taps, *self.inputs(x0, eps, u))
        return {tap: pool_activation(value.float(), pool) for tap, value in found.items()}

    @torch.no_grad()
    def features(self, x0: Tensor, images: Sequence[int], reading: Reading) -> dict[Place, Tensor]:
        """Features [B, D] float32 of clean states [B, C, H, W] at every place; one pass a time and noise draw.

        `images` [B] numbers the states, which names their noise: features depend neither on the batch nor on what
        else is read.

        Raises:
            ValueError: if images and states differ in number.
        """
        if len(images) != len(x0):
            raise ValueError(f"{len(x0)} states need as many numbers, got {len(images)}")
        total: dict[Place, Tensor] = {}
        for draw in reading.draws:
            keys = [("features", reading.seed, image, draw) for image in images]
            eps = keyed_normal(keys, x0.shape[1:]).to(x0)
            for u in reading.times:
                for tap, value in self.read(reading.taps, x0, eps, u, reading.pool).items():
                    total[u, tap] = total[u, tap] + value if (u, tap) in total else value
        return {place: value / len(reading.draws) for place, value in total.items()}


def place_name(place: Place) -> str:
    """A place as text, for files and tables: `11_out_6`."""
    return f"{place[0]:.10g}_{place[1]}"
