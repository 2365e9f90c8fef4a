"""Transformers over token ids: latent-diffusion's text encoder, and CLIP's.

Key names are those of the released files (x-transformers below `transformer.`, CLIP's text model below
`transformer.text_model.`), so that they load strictly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import attend

# Standard deviation of both embedding tables at the start.
START = 0.02


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return x [B, L, heads d] as [B, heads, L, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class TokenAttention(nn.Module):
    """Self-attention of tokens [B, L, D] with `heads` heads of `width`, whatever D is; every token sees every other."""

    def __init__(self, dim: int, heads: int = 8, width: int = 64):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * width, bias=False)
        self.to_k = nn.Linear(dim, heads * width, bias=False)
        self.to_v = nn.Linear(dim, heads * width, bias=False)
        self.to_out = nn.Linear(heads * width, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(layer(x), self.heads) for layer in (self.to_q, self.to_k, self.to_v))
        return self.to_out(attend(query, key, value).transpose(1, 2).flatten(2))  # [B, L, D]


class TokenFeedForward(nn.Module):
    """Linear(D, 4 D), GELU, Linear(4 D, D) on each token [B, L, D]."""

    def __init__(self, dim: int):
        super().__init__()
        first = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU())
        self.net = nn.Sequential(first, nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TokenPositions(nn.Module):
    """A table of one row a position."""

    def __init__(self, dim: int, length: int):
        super().__init__()
        self.emb = nn.Embedding(length, dim)
        nn.init.normal_(self.emb.weight, std=START)

    def forward(self, length: int) -> Tensor:
        """Return the first rows [L, D]."""
        return self.emb.weight[:length]


class TokenLayers(nn.Module):
    """Attention and feed-forward in turn, each as x + block(norm(x)) on tokens [B, L, D]."""

    def __init__(self, dim: int, depth: int):
        super().__init__()
        blocks = [block for _ in range(depth) for block in (TokenAttention(dim), TokenFeedForward(dim))]
        self.layers = nn.ModuleList(nn.ModuleList((nn.LayerNorm(dim), block)) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in self.layers:
            x = x + block(norm(x))
        return x


class TokenTransformer(nn.Module):
    """Token ids [B, L] to embeddings [B, L, D]: tables of tokens and positions, layers, and a last norm.

    As in the text encoders of latent-diffusion (Rombach et al. 2022) no mask is passed: padding is attended to.

    Args:
        num_tokens: rows of the table of tokens.
        max_seq_len: rows of the table of positions.
        dim: width D.
        depth: pairs of attention and feed-forward.
    """

    def __init__(self, num_tokens: int, max_seq_len: int, dim: int, depth: int):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_emb.weight, std=START)
        self.pos_emb = TokenPositions(dim, max_seq_len)
        self.emb_dropout = nn.Dropout(0.0)  # on the sums of token and position; a user of it may set its rate
        self.attn_layers = TokenLayers(dim, depth)
        self.norm = nn.LayerNorm(dim)
        # In the released files, and unused for embeddings.
        self.to_logits = nn.Linear(dim, num_tokens).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_emb(tokens) + self.pos_emb(tokens.shape[-1])  # [B, L, D]
        return self.norm(self.attn_layers(self.emb_dropout(x)))


class ClipAttention(nn.Module):
    """CLIP's self-attention of tokens [B, L, D]: a token sees itself and those before it."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        scores = query @ key.mT * query.shape[-1] ** -0.5  # [B, heads, L, L]
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2))  # [B, L, D]


class ClipFeedForward(nn.Module):
    """Two linear layers on each token [B, L, D], with x sigmoid(1.702 x) or the exact GELU between them."""

    def __init__(self, dim: int, inner: int, activation: str):
        super().__init__()
        if activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act of CLIP's text model is quick_gelu or gelu, got '{activation}'")
        self.quick = activation == "quick_gelu"
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class ClipLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside what came in."""

    def __init__(self, dim: int, heads: int, inner: int, activation: str, eps: float):
        super().__init__()
        self.self_attn = ClipAttention(dim, heads)
        self.layer_norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = ClipFeedForward(dim, inner, activation)
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipTextModel(nn.Module):
    """CLIP's text transformer (Radford et al. 2021): token ids [B, L] to the last hidden state [B, L, D], normed.

    Arguments are those of transformers' `CLIPTextConfig`; the defaults are ViT-L/14's, which Stable Diffusion v1 reads.
    """

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.embeddings.position_embedding = nn.Embedding(max_position_embeddings, hidden_size)
        for table in self.embeddings.children():
            nn.init.normal_(table.weight, std=START)
        shape = (hidden_size, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(ClipLayer(*shape) for _ in range(num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.embeddings.position_embedding.weight[: tokens.shape[-1]]
        x = self.embeddings.token_embedding(tokens) + positions  # [B, L, D]
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)
