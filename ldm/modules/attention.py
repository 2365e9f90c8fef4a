"""Attention over sequences and images; key names as published with latent-diffusion (Rombach et al. 2022)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.diffusionmodules.util import (
    LayerNorm32,
    checkpoint,
    conv_nd,
    in_forward_mode,
    in_functorch,
    normalization,
    repeat_rows,
    zero_module,
)
from ldm.util import default as default
from ldm.util import exists as exists


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention `softmax(q k^T / sqrt(d)) v` (Vaswani et al. 2017, equation 1).

    Args:
        query: `[B, heads, N, d]`.
        key: `[B, heads, T, d]`.
        value: `[B, heads, T, d]`.

    Returns:
        `[B, heads, N, d]`. The formula itself is evaluated where the fused kernels have no rule: under forward-mode
        derivatives and inside `torch.func` transforms.
    """
    if not (in_forward_mode() or in_functorch()):
        # What comes in float32 under autocast is to stay so (ldm.modules.paired); all else is in half precision by now.
        kept = query.dtype == torch.float32 and torch.is_autocast_enabled(query.device.type)
        with torch.autocast(query.device.type, enabled=False) if kept else nullcontext():
            return F.scaled_dot_product_attention(query, key, value)
    scale = query.shape[-1] ** -0.25  # on both sides, so that half precision does not overflow
    scores = (query * scale) @ (key * scale).mT  # [B, heads, N, T]
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype) @ value  # [B, heads, N, d]


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence to a context, or to itself where there is none.

    Args:
        query_dim: width of the sequence.
        context_dim: width of the context; None for self-attention.
        heads, dim_head: number of heads and width of each.
        dropout: on the output.
    """

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ):
        super().__init__()
        inner = heads * dim_head
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend from x `[B, N, D]` to context `[B, T, E]` (x itself if None); returns `[B, N, D]`."""
        context = x if context is None else context
        query = self._split(self.to_q(x))  # [B, heads, N, d]
        key = self._split(self.to_k(context))  # [B, heads, T, d]
        value = self._split(self.to_v(context))  # [B, heads, T, d]
        out = attend(query, key, value).transpose(1, 2).flatten(2)  # [B, N, heads * d]
        return self.to_out(out)  # [B, N, D]

    def of_one_token(self, context: Tensor, length: int) -> Tensor:
        """Attention to a single token, context `[B, 1, E]`, from `length` = N positions; returns `[B, N, D]`.

        Softmax over one key is 1, so this is `to_out(to_v(context))` at every position, exactly, whatever x is.
        """
        out = self.to_out[0](self.to_v(context))  # [B, 1, D]
        return self.to_out[1](out.expand(-1, length, -1))  # [B, N, D]

    def wants_query_gradients(self) -> bool:
        """True if a backward pass is to reach the query and key maps (distributed training must find them there)."""
        return torch.is_grad_enabled() and (self.to_q.weight.requires_grad or self.to_k.weight.requires_grad)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, length, d]


class GEGLU(nn.Module):
    """`a * gelu(b)` with `a, b` two linear maps of the input (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # 2 x [..., dim_out]
        return value * F.gelu(gate)  # [..., dim_out]


class FeedForward(nn.Module):
    """Two linear layers with a hidden width of `mult * dim`, gated by GEGLU or plain GELU."""

    def __init__(self, dim: int, mult: int = 4, gated: bool = True, dropout: float = 0.0):
        super().__init__()
        inner = mult * dim
        first = GEGLU(dim, inner) if gated else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # [..., dim]


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward layer, each with a norm before and a sum after."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
    ):
        super().__init__()
        self.attn1 = CrossAttention(dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, gated=gated_ff, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1 = LayerNorm32(dim)
        self.norm2 = LayerNorm32(dim)
        self.norm3 = LayerNorm32(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `[B, N, D]`, context `[B, T, E]` or None; returns `[B, N, D]`."""
        x = x + self.attn1(self.norm1(x))  # [B, N, D]
        x = x + self._cross(x, context)  # [B, N, D]
        return x + self.ff(self.norm3(x))  # [B, N, D]

    def _cross(self, x: Tensor, context: Tensor | None) -> Tensor:
        if context is not None and context.shape[1] == 1 and not self.attn2.wants_query_gradients():
            return self.attn2.of_one_token(context, x.shape[1])  # [B, N, D]
        return self.attn2(self.norm2(x), context)  # [B, N, D]


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of an image, conditioned by a context.

    Args:
        in_channels: channels C of the image, a multiple of 32.
        n_heads, d_head: number and width of the attention heads.
        depth: number of blocks.
        dropout: in attention and feed-forward layers.
        context_dim: width E of the context; None: the second attention looks at the image too.
        use_checkpoint: recompute each block's activations in the backward pass.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        inner = n_heads * d_head
        self.use_checkpoint = use_checkpoint
        self.context_dim = context_dim
        self.norm = normalization(in_channels, eps=1e-6)
        self.proj_in = conv_nd(2, in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, n_heads, d_head, dropout, context_dim) for _ in range(depth)
        )
        self.proj_out = zero_module(conv_nd(2, inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `[B, C, H, W]`, context `[B, T, E]` (or a divisor of B rows, repeated); returns `[B, C, H, W]`."""
        if context is not None:
            context = repeat_rows(context.to(self.proj_in.weight.dtype), len(x))  # [B, T, E]
        size = x.shape[2:]
        h = self.proj_in(self.norm(x)).flatten(2).mT  # [B, H W, inner]
        for block in self.transformer_blocks:
            h = checkpoint(block, h, context, enabled=self.use_checkpoint)  # [B, H W, inner]
        return x + self.proj_out(h.mT.unflatten(2, size))  # [B, C, H, W]
