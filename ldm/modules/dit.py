"""Diffusion transformers, key names and shapes as published with DiT (Peebles & Xie 2023, arXiv 2212.09748)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.modules.attention import attend
from ldm.modules.augment_labels import AugmentEmbedding, split_augmented
from ldm.modules.diffusionmodules.util import timestep_embedding, zero_module
from ldm.modules.parts import Parts
from ldm.util import ImageSize, read_image_size, shorten_size

FREQUENCIES = 256  # width of the sinusoids of a time


def count_patches(size: ImageSize, patch: int, name: str) -> tuple[int, int]:
    """Return how many patches an image has along its height and its width.

    Raises:
        ValueError: if `size` is no size, or does not divide into patches of `patch` pixels a side; `name` names it.
    """
    height, width = read_image_size(size, name)
    if height % patch or width % patch:
        raise ValueError(f"an image of {shorten_size((height, width))} does not divide into patches of {patch}")
    return height // patch, width // patch


def grid_positions(width: int, grid: ImageSize) -> Tensor:
    """Sines and cosines [h w, width] of the columns and rows of a grid of h x w patches, in row-major order.

    The first half of the width encodes the column x: sin(x w_i), then cos(x w_i), w_i = 10000^(-i / (width / 4)); the
    second half the row.

    Raises:
        ValueError: for a width that is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"positions of a grid need a width that is a multiple of 4, got {width}")
    exponents = torch.arange(width // 4, dtype=torch.float64) / (width / 4)
    height, across = read_image_size(grid, "grid")
    places = torch.arange(max(height, across), dtype=torch.float64)
    angles = places[:, None] * 10000.0**-exponents  # [longest side, width / 4]
    code = torch.cat([angles.sin(), angles.cos()], dim=1)  # [longest side, width / 2]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(across), indexing="ij")
    return torch.cat([code[columns.flatten()], code[rows.flatten()]], dim=1).float()


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift for tokens [B, N, D] and modulations [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """Patches of an image [B, C, H, W] as tokens [B, N, D], row by row."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Embedding [B, D] of times [B]: sinusoids, cosines first, and two linear maps."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, FREQUENCIES).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Table of label embeddings; with `null` its last row is the null class of guidance."""

    def __init__(self, classes: int, width: int, null: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + null, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Self-attention of tokens [B, N, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
        return self.proj(attend(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear maps with a GELU (tanh form) between."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """Attention and MLP whose norms are shifted, scaled and gated by the condition; the identity at the start."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(mlp_ratio * width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_module(nn.Linear(width, 6 * width)))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens `[B, N, D]` under a condition `[B, D]`."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)  # [B, D] each
        x = x + gate_a[:, None] * self.attn(modulated(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulated(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Norm shifted and scaled by the condition; `linear` maps tokens to patches."""

    def __init__(self, width: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = zero_module(nn.Linear(width, patch_size**2 * out_channels))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_module(nn.Linear(width, 2 * width)))

    def features(self, x: Tensor, c: Tensor) -> Tensor:
        """Input [B, N, D] of `linear`."""
        return modulated(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1))


class DiT(nn.Module):
    """Transformer over patches of a latent, conditioned on time and class, in stages as `UNetModel`.

    `forward(x, t, y) == readout(features(x, condition(t, y)))`. DiT-XL/2 (the defaults) has 675,129,632
    parameters, the frozen positions [1, 256, 1152] among them. Taps are `layer-0` .. `layer-{depth - 1}`: tokens
    [B, N, D].

    Raises:
        ValueError: if the image does not divide into patches.
    """

    def __init__(
        self,
        input_size: ImageSize = 32,  # Height and width of the latent.
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,  # Width D of tokens.
        depth: int = 28,  # Blocks.
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,  # Above 0: the table has a null class; labels are dropped by the embedder.
        num_classes: int = 1000,
        learn_sigma: bool = True,  # Also predict the fraction between the bounds of the log-variance.
        augment_dim: int = 0,  # Augmentation labels that it is told.
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, in_channels * (1 + learn_sigma)
        self.patch_size = patch_size
        self.grid = count_patches(input_size, patch_size, "input_size")
        self.num_classes, self.augment_dim = num_classes, augment_dim
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null=class_dropout_prob > 0)
        self.pos_embed = nn.Parameter(grid_positions(hidden_size, self.grid)[None], requires_grad=False)
        if augment_dim:
            self.augment_emb = AugmentEmbedding(augment_dim, hidden_size)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        for block in self.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    @property
    def taps(self) -> dict[str, str]:
        """Names of the layers that features are read from: {tap: submodule}."""
        return {f"layer-{index}": f"blocks.{index}" for index in range(len(self.blocks))}

    @property
    def parts(self) -> Parts:
        """Where the class table, the time embedding, the last layer and the taps are.

        Its output is laid out as patches. The last block's `adaLN_modulation` acts before it, in `features`.
        """
        return Parts(
            class_tables={"y_embedder.embedding_table.weight": 0},
            time_embedding=("t_embedder.*",),
            condition=("t_embedder.*", "y_embedder.*", *(("augment_emb.*",) if self.augment_dim else ())),
            output=("final_layer.linear.*",),
            last_layer="final_layer.linear",
            taps=self.taps,
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """`[B, out_channels, H, W]` of latents `[B, C, H, W]`, times `[B]` and labels `[B]`; None: the null class.

        With augmentation labels y is `[B, 1 + A]`, the class first.
        """
        return self.readout(self.backbone(x, timesteps, y))

    def backbone(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The input `[B, N, D]` of the last layer; arguments of `forward`."""
        return self.features(x, self.condition(timesteps, y))

    def condition(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Embedding `[B, D]` of times `[B]` and labels y, see `forward`."""
        labels, changes = split_augmented(y, self.augment_dim, labelled=True)
        if labels is None:
            if self.y_embedder.embedding_table.num_embeddings == self.num_classes:
                raise ValueError("this network has no null class (class_dropout_prob: 0): give labels y [B]")
            labels = torch.full((len(timesteps),), self.num_classes, device=timesteps.device)
        emb = self.t_embedder(timesteps) + self.y_embedder(labels)
        return emb if changes is None else emb + self.augment_emb(changes)

    def features(self, x: Tensor, emb: Tensor, context: None = None) -> Tensor:
        """The input `[B, N, D]` of the last layer for latents and an embedding `[B, D]`."""
        expected = (self.in_channels, *(self.patch_size * side for side in self.grid))
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x must be [B, {', '.join(map(str, expected))}], got {list(x.shape)}")
        h = self.x_embedder(x) + self.pos_embed  # [B, N, D]
        for block in self.blocks:
            h = block(h, emb)
        return self.final_layer.features(h, emb)

    def readout(self, h: Tensor) -> Tensor:
        """`[B, out_channels, H, W]` of tokens `[B, N, D]`."""
        patches = self.final_layer.linear(h).unflatten(1, self.grid)
        patches = patches.unflatten(3, (self.patch_size, self.patch_size, -1))  # [B, h, w, p, p, C]
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
