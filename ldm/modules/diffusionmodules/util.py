"""Small pieces every network here is built of: time embeddings, norms, convolutions by dimension, checkpointing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as torch_checkpoint

# What networks and samplers written for latent-diffusion look for in this module, beside its own functions.
from ldm.modules.diffusionmodules.tables import betas_for_alpha_bar as betas_for_alpha_bar
from ldm.modules.diffusionmodules.tables import extract_into_tensor as extract_into_tensor
from ldm.modules.diffusionmodules.tables import make_beta_schedule as make_beta_schedule
from ldm.modules.diffusionmodules.tables import make_ddim_sampling_parameters as make_ddim_sampling_parameters
from ldm.modules.diffusionmodules.tables import make_ddim_timesteps as make_ddim_timesteps
from ldm.modules.diffusionmodules.tables import noise_like as noise_like
from ldm.util import mean_flat as mean_flat

linear = nn.Linear
SiLU = nn.SiLU

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
NORM_GROUPS = 32


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Sinusoids of a time, cosines first: `cos(t w_i), sin(t w_i)` with `w_i = max_period ** (-i / (dim // 2))`.

    Args:
        t: times `[B]`, whole or fractional.
        dim: width D of the embedding; an odd one ends with a zero.
        max_period: period of the slowest sinusoid, over 2 pi.
        repeat_only: return the times themselves, D times.

    Returns:
        `[B, D]`, float64 for a float64 `t` and float32 otherwise; with `repeat_only` of the type of `t`.

    Source: Vaswani et al. 2017, section 3.5, in the order of Ho et al. 2020 as published in latent-diffusion.
    """
    if t.ndim != 1:
        raise ValueError(f"times must have shape [B], got {list(t.shape)}; expand a single time to the batch")
    if repeat_only:
        return t[:, None].repeat(1, dim)
    half = dim // 2
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    exponents = -math.log(max_period) * torch.arange(half, dtype=dtype, device=t.device) / half  # published rounding
    angles = t.to(dtype)[:, None] * exponents.exp()  # [B, D // 2]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, 2 (D // 2)]
    return F.pad(embedding, (0, dim % 2))  # [B, D]


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32 (or wider) whatever the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        return F.group_norm(x.to(dtype), self.num_groups, weight, bias, self.eps).to(x.dtype)  # [B, C, ...]


class LayerNorm32(nn.LayerNorm):
    """Layer normalisation computed in float32 (or wider) whatever the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)  # [..., D]


def normalization(channels: int, eps: float = 1e-5, groups: int = NORM_GROUPS) -> GroupNorm32:
    """Group norm of a residual block (`eps` 1e-5) or of a spatial transformer (1e-6)."""
    if channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups; choose a multiple of {groups}")
    return GroupNorm32(groups, channels, eps=eps)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply every parameter of `module` by a number and return it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """Convolution over 1, 2 or 3 dimensions; further arguments are those of `torch.nn.ConvNd`."""
    return _by_dimension(CONVOLUTIONS, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """Average pooling over 1, 2 or 3 dimensions; further arguments are those of `torch.nn.AvgPoolNd`."""
    return _by_dimension(AVERAGE_POOLS, dims)(*args, **kwargs)


def _by_dimension(classes: dict[int, type[nn.Module]], dims: int) -> type[nn.Module]:
    if dims not in classes:
        raise ValueError(f"dims must be one of {sorted(classes)}, got {dims}")
    return classes[dims]


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """`x` [B, ...] laid end to end until it has `rows` rows, a multiple of B; row j is row j mod B of x."""
    return x if len(x) == rows else x.expand(rows // len(x), *x.shape).flatten(0, 1)


def in_functorch() -> bool:
    """True inside `torch.func.vmap`, `grad`, `jvp` and kin."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_forward_mode() -> bool:
    """True while forward-mode derivatives are being carried."""
    return forward_ad._current_level >= 0


def checkpoint(module: Any, *inputs: Any, enabled: bool = True) -> Tensor:
    """Return `module(*inputs)` and, if `enabled`, recompute its activations in the backward pass.

    latent-diffusion's call `checkpoint(function, (input, ...), parameters, enabled)` is taken as well.

    Gradients reach the inputs whether or not the parameters want any, so a backbone may be frozen. The parameters of
    the
    recomputation are those of the forward pass, also inside `torch.func.functional_call`. Nothing is recomputed
    without gradients, in forward mode and inside `torch.func` transforms, which know no saved-tensor hooks.

    Source: Chen et al. 2016 (arXiv 1604.06174), by the non-reentrant form of `torch.utils.checkpoint`.
    """
    if inputs and isinstance(inputs[0], (tuple, list)):
        inputs, enabled = tuple(inputs[0]), bool(inputs[2])
    if not (enabled and torch.is_grad_enabled()) or in_functorch() or in_forward_mode():
        return module(*inputs)
    if not isinstance(module, nn.Module):
        return torch_checkpoint(module, *inputs, use_reentrant=False)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return torch_checkpoint(lambda *args: functional_call(module, tensors, args), *inputs, use_reentrant=False)


def convert_linear_maps(module: nn.Module, dtype: torch.dtype, kinds: tuple[type[nn.Module], ...]) -> None:
    """Give the parameters of every submodule of the named kinds another type, in place; norms keep theirs."""
    for child in module.modules():
        if isinstance(child, kinds):
            child.to(dtype)


def split_last_layer(net: nn.Module, name: str) -> tuple[Callable[..., Tensor], nn.Module]:
    """Split a network at its last layer: `net(*args) == layer(phi(*args))`.

    Args:
        net: an `nn.Sequential`, or a network whose `backbone(*args)` is the input of the submodule called `out` (or as
            its `head_name` says).
        name: the last layer, as in `net.named_modules()`: `out.2` of a UNet, `out` where that is one layer.

    Returns:
        `phi`, taking the arguments of `net`, and `layer`. Both read the parameters of `net` when called.

    Raises:
        ValueError: if `name` is not the last layer of such a network.
    """
    if isinstance(net, nn.Sequential) and len(net) and name == str(len(net) - 1):
        return net[:-1], net[-1]
    head_name = getattr(net, "head_name", "out")
    head = getattr(net, head_name, None)
    if head is None or not hasattr(net, "backbone"):
        raise ValueError(f"cannot split {type(net).__name__} at '{name}': it has no `backbone` and '{head_name}'")
    if not isinstance(head, nn.Sequential):
        last, layer, before = head_name, head, nn.Identity()
    else:
        last, layer, before = f"{head_name}.{len(head) - 1}", head[-1], head[:-1]
    if name != last:
        raise ValueError(f"the last layer of {type(net).__name__} is '{last}', got '{name}'")

    def phi(*args, **kwargs) -> Tensor:
        return before(net.backbone(*args, **kwargs))

    return phi, layer
