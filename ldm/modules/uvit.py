"""U-ViT, key names and shapes as published (Bao et al. 2023, arXiv 2209.12152): transformers with long skips."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.modules.attention import attend
from ldm.modules.augment_labels import AugmentEmbedding, split_augmented
from ldm.modules.diffusionmodules.util import checkpoint, timestep_embedding
from ldm.modules.dit import PatchEmbed, count_patches
from ldm.modules.parts import Parts
from ldm.util import ImageSize


class UViTAttention(nn.Module):
    """Self-attention of tokens [B, N, D]; the rows of `qkv` are ordered (3, heads, d)."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, qk_scale: float | None):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.heads = heads
        # `attend` divides by sqrt(d): a scale of its own acts on the queries.
        self.query_factor = qk_scale * (width // heads) ** 0.5 if qk_scale else 1.0
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
        return self.proj(attend(self.query_factor * query, key, value).transpose(1, 2).flatten(2))


class UViTMlp(nn.Module):
    """Two linear maps with an exact GELU between."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class UViTBlock(nn.Module):
    """Attention and MLP, each with a norm before and a sum after; with `skip` a linear map joins earlier tokens."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        norm_layer: type[nn.Module],
        skip: bool,
        use_checkpoint: bool,
    ):
        super().__init__()
        self.norm1 = norm_layer(width)
        self.attn = UViTAttention(width, heads, qkv_bias, qk_scale)
        self.norm2 = norm_layer(width)
        self.mlp = UViTMlp(width, int(mlp_ratio * width))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Tokens [B, N, D] of tokens [B, N, D] and, on the way out, those of an earlier block."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))  # [B, N, D]
        x = x + checkpoint(self.attn, self.norm1(x), enabled=self.use_checkpoint)  # [B, N, D]
        return x + checkpoint(self.mlp, self.norm2(x), enabled=self.use_checkpoint)  # [B, N, D]


class UViT(nn.Module):
    """Transformer whose tokens are the label, the time and the patches, with skips from its first half to its second.

    `forward(x, t, y) == readout(features(x, condition(t, y)))`, in stages as `UNetModel`. U-ViT-H/2 for ImageNet at
    256 pixels has 500,832,016 parameters, the learned positions among them. Taps are `layer-0` .. `layer-{depth}`:
    tokens [B, N, D], the label and the time first.

    Source: Bao et al. 2023, sections 3 and 4; arguments, defaults and state-dict keys are the published ones. The
    released models have no MLP on the time and no last convolution, and the last row of their table is the null class.

    Raises:
        ValueError: if the image does not divide into patches, or the width into heads.
    """

    def __init__(
        self,
        img_size: ImageSize = 224,  # Height and width of x.
        patch_size: int = 16,
        in_chans: int = 3,  # Channels of x, and of the output.
        embed_dim: int = 768,  # Width D of tokens; of an odd one the last sinusoid of a time is 0.
        depth: int = 12,  # Blocks without the one in the middle; of an odd number one less, as published.
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,  # Of q k^T; None or 0: 1 / sqrt(d), as published.
        norm_layer: type[nn.Module] = nn.LayerNorm,
        mlp_time_embed: bool = False,  # Whether the sinusoids of the time pass two linear maps.
        num_classes: int = -1,  # Rows of the table of labels, the null class among them; -1: unconditional.
        use_checkpoint: bool = False,  # Recompute activations in the backward pass.
        conv: bool = True,  # Whether a 3x3 convolution ends the network.
        skip: bool = True,  # Whether blocks of the second half read those of the first.
        augment_dim: int = 0,  # Augmentation labels that it is told, in the token of the time.
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_chans, in_chans
        self.embed_dim, self.num_classes, self.augment_dim = embed_dim, num_classes, augment_dim
        self.patch_size = patch_size
        self.grid = count_patches(img_size, patch_size, "img_size")
        self.extras = 1 + (num_classes > 0)  # tokens before the patches
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + self.grid[0] * self.grid[1], embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.time_embed = nn.Identity() if not mlp_time_embed else make_time_mlp(embed_dim)
        if num_classes > 0:
            self.label_emb = nn.Embedding(num_classes, embed_dim)
        if augment_dim:
            self.augment_emb = AugmentEmbedding(augment_dim, embed_dim)
        kinds = (num_heads, mlp_ratio, qkv_bias, qk_scale, norm_layer)
        plain = [UViTBlock(embed_dim, *kinds, False, use_checkpoint) for _ in range(depth // 2 + 1)]
        self.in_blocks = nn.ModuleList(plain[:-1])
        self.mid_block = plain[-1]
        self.out_blocks = nn.ModuleList(UViTBlock(embed_dim, *kinds, skip, use_checkpoint) for _ in range(depth // 2))
        self.norm = norm_layer(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and not isinstance(module, AugmentEmbedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def taps(self) -> dict[str, str]:
        """Names of the layers that features are read from: {tap: submodule}, in the order of computation."""
        names = [f"in_blocks.{index}" for index in range(len(self.in_blocks))]
        names += ["mid_block", *(f"out_blocks.{index}" for index in range(len(self.out_blocks)))]
        return {f"layer-{index}": name for index, name in enumerate(names)}

    @property
    def parts(self) -> Parts:
        """Its parts by name; the last layer is the convolution at the end where there is one."""
        convolves = isinstance(self.final_layer, nn.Conv2d)
        time = ("time_embed.*",) if isinstance(self.time_embed, nn.Sequential) else ()
        labels = ("label_emb.*",) if self.num_classes > 0 else ()
        changes = ("augment_emb.*",) if self.augment_dim else ()
        return Parts(
            class_tables={"label_emb.weight": 0} if labels else {},
            time_embedding=time,
            condition=time + labels + changes,
            output=("decoder_pred.*", "final_layer.*") if convolves else ("decoder_pred.*",),
            last_layer="final_layer" if convolves else "decoder_pred",
            taps=self.taps,
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` of states `[B, C, H, W]`, times `[B]` and labels `[B]`; None: the null class.

        With augmentation labels y is `[B, 1 + A]`, the class first, or `[B, A]` without classes.
        """
        return self.readout(self.backbone(x, timesteps, y))

    def backbone(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The input `[B, N, D]` of `decoder_pred`, all tokens; arguments of `forward`."""
        return self.features(x, self.condition(timesteps, y))

    def condition(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Tokens `[B, 1, D]` of times `[B]`; of a network with labels y, see `forward`, `[B, 2, D]`, theirs first."""
        labels, changes = split_augmented(y, self.augment_dim, labelled=self.num_classes > 0)
        sinusoids = timestep_embedding(timesteps, self.embed_dim).to(self.pos_embed.dtype)
        time = self.time_embed(sinusoids)[:, None]  # [B, 1, D]
        if changes is not None:
            time = time + self.augment_emb(changes)[:, None]
        if self.num_classes < 1:
            if labels is not None:
                raise ValueError("this network is unconditional (num_classes: -1) and takes no labels y")
            return time
        if labels is None:
            labels = torch.full((len(timesteps),), self.num_classes - 1, device=timesteps.device)
        return torch.cat([self.label_emb(labels)[:, None], time], dim=1)  # [B, 2, D]

    def features(self, x: Tensor, emb: Tensor, context: None = None) -> Tensor:
        """The input `[B, N, D]` of `decoder_pred` for states and the tokens of `condition`."""
        expected = (self.in_channels, *(self.patch_size * side for side in self.grid))
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x must be [B, {', '.join(map(str, expected))}], got {list(x.shape)}")
        h = torch.cat([emb, self.patch_embed(x)], dim=1) + self.pos_embed  # [B, N, D]
        skips = []
        for block in self.in_blocks:
            h = block(h)  # [B, N, D]
            skips.append(h)
        h = self.mid_block(h)  # [B, N, D]
        for block in self.out_blocks:
            h = block(h, skips.pop())  # [B, N, D]
        return self.norm(h)

    def readout(self, h: Tensor) -> Tensor:
        """`[B, C, H, W]` of all tokens `[B, N, D]`."""
        patches = self.decoder_pred(h)[:, self.extras :].unflatten(1, self.grid)
        patches = patches.unflatten(3, (self.patch_size, self.patch_size, -1))  # [B, h, w, p, p, C]
        return self.final_layer(patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))


def make_time_mlp(width: int) -> nn.Sequential:
    """Two linear maps with a SiLU between, which embed the sinusoids [B, D] of a time."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
