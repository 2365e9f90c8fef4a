"""What lets a foreign network run under the transforms of torch.func, with the same numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from diffusers.models.normalization import AdaGroupNorm
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.modules.diffusionmodules.util import in_forward_mode, in_functorch


class _ContiguousGroupNorm(nn.GroupNorm):
    """Group normalisation of a copy in the usual memory layout, since vmap has no rule for another."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


class _ContiguousAdaGroupNorm(AdaGroupNorm):
    """The same of the norm that an embedding [B, E] scales and shifts."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().forward(x.contiguous(), emb)


def accept_any_layout(network: nn.Module) -> None:
    """Let a network's group norms take inputs of any memory layout under vmap; parameters and results stay."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = _ContiguousGroupNorm
        elif type(module) is AdaGroupNorm:
            module.__class__ = _ContiguousAdaGroupNorm


def exact_attention() -> AbstractContextManager[None]:
    """Compute attention by its formula under derivatives and `torch.func`, where fused kernels have no rule."""
    return sdpa_kernel(SDPBackend.MATH) if in_forward_mode() or in_functorch() else nullcontext()
