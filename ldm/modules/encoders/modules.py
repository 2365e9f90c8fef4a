"""Encoders of conditions for a diffusion model; those of texts are `ldm.modules.encoders.text`'s."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.encoders.text import BERTEmbedder, FrozenCLIPEmbedder, TransformerEmbedder
from ldm.modules.encoders.tokenizers import BERTTokenizer, WordTokenizer
from ldm.modules.parts import Parts

__all__ = [
    "AugmentationLabels",
    "BERTEmbedder",
    "BERTTokenizer",
    "ClassEmbedder",
    "FrozenCLIPEmbedder",
    "SpatialRescaler",
    "TransformerEmbedder",
    "WordTokenizer",
]
RESCALINGS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")


class ClassEmbedder(nn.Module):
    """Table of class embeddings; its last row is the null class of classifier-free guidance, if it has one.

    With `lora`, the row of class c is weight[c] + (B A)[:, c] (low-rank adaptation, Hu et al. 2022, arXiv 2106.09685;
    the shapes of DECU): `lora_A` [R, K] starts from N(0, 1), `lora_B` [D, R] at zero, and the table is frozen.

    Args:
        embed_dim: width D.
        n_classes: number of rows K, the null class included.
        key: entry of a batch that holds the labels.
        ucg_rate: probability in [0, 1] of dropping a label in training (Ho & Salimans 2022, arXiv 2207.12598).
        lora: train a low-rank correction of the table in its place.
        rank: R.
        null_class: whether the last row is the null class; without one every row is a class.
        ensemble_size: taken for DECU's configs; members live outside of the embedder.
    """

    def __init__(
        self,
        embed_dim: int,
        n_classes: int = 1000,
        key: str = "class",
        ucg_rate: float = 0.0,
        lora: bool = False,
        rank: int = 16,
        null_class: bool = True,
        ensemble_size: int = 0,
    ):
        super().__init__()
        if not 0 <= ucg_rate <= 1:
            raise ValueError(f"ucg_rate must be a probability in [0, 1], got {ucg_rate}")
        if ucg_rate and not null_class:
            raise ValueError(
                f"ucg_rate {ucg_rate} drops labels for the null class, and null_class is False: set it to 0"
            )
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.key = key
        self.n_classes = n_classes
        self.ucg_rate = ucg_rate
        self.null_class = n_classes - 1 if null_class else None
        self.embedding = nn.Embedding(n_classes, embed_dim)
        self.low_rank = lora
        if lora:
            self.embedding.requires_grad_(False)
            self.lora_A = nn.Parameter(nn.init.normal_(torch.empty(rank, n_classes)))
            self.lora_B = nn.Parameter(torch.zeros(embed_dim, rank))

    @property
    def parts(self) -> Parts:
        """The table, and the factor of its low-rank correction that has a column a class."""
        return Parts(class_tables={"embedding.weight": 0} | ({"lora_A": 1} if self.low_rank else {}))

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None, drop: Tensor | None = None) -> Tensor:
        """Embed the labels of a batch.

        Args:
            batch: holds labels `[B]` under `key`.
            key: another entry than the one of the constructor.
            drop: booleans `[B]`; True embeds the null class instead.

        Returns:
            `[B, 1, D]`.
        """
        key = self.key if key is None else key
        if key not in batch:
            raise ValueError(f"the batch has no '{key}' to embed; its keys are {sorted(batch)}")
        labels = batch[key]
        return self.embed(labels if drop is None else self.nullified(labels, drop))

    def embed(self, labels: Tensor) -> Tensor:
        """Rows `[B, 1, D]` of labels `[B]`."""
        self._check(labels)
        rows = self.embedding(labels[:, None])  # [B, 1, D]
        if not self.low_rank:
            return rows
        return rows + F.linear(F.embedding(labels[:, None], self.lora_A.T), self.lora_B)

    def drop_labels(self, labels: Tensor, uniform: Tensor) -> Tensor:
        """Replace a label by the null class where its draw, in [0, 1), is below `ucg_rate`; all `[B]`.

        In evaluation mode labels come back unchanged. The caller draws, so that a resumed run drops the same labels.
        """
        if uniform.shape != labels.shape:
            raise ValueError(f"one draw for each label: labels {list(labels.shape)}, draws {list(uniform.shape)}")
        if not self.training or self.null_class is None:
            return labels
        return self.nullified(labels, uniform.to(labels.device) < self.ucg_rate)

    def nullified(self, labels: Tensor, drop: Tensor) -> Tensor:
        """Replace labels [B] by the null class where `drop` [B] says so."""
        if self.null_class is None:
            raise ValueError("labels cannot be dropped: this embedder has no null class (null_class: false)")
        return torch.where(drop, self.null_class, labels)  # [B]

    def _check(self, labels: Tensor) -> None:
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(f"labels must be whole numbers of shape [B], got {labels.dtype} {list(labels.shape)}")
        if labels.device.type != "cpu" or torch._C._functorch.is_batchedtensor(labels) or not labels.numel():
            return  # reading values would stall a device, and cannot be done under vmap
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.n_classes:
            null = "no null class" if self.null_class is None else f"null class {self.null_class}"
            raise ValueError(f"labels must lie in 0..{self.n_classes - 1} ({null}), got {low}..{high}")


class SpatialRescaler(nn.Module):
    """A picture of the condition at the size of the latent: resized in stages, its channels mapped to others or not.

    Args:
        n_stages: how often it is resized by `multiplier`; a factor of 2^n is n stages of one half.
        method: of `torch.nn.functional.interpolate`: nearest, linear, bilinear, trilinear, bicubic or area.
        multiplier: of height and width.
        in_channels: channels of the picture: of a label map as many as it has labels.
        out_channels: channels after a 1x1 convolution `channel_mapper`; None: there is none.
        bias: of that convolution.

    Raises:
        ValueError: for an unknown method, or a negative number of stages.
    """

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if method not in RESCALINGS:
            raise ValueError(f"method must be one of {RESCALINGS}, got '{method}'")
        if n_stages < 0:
            raise ValueError(f"n_stages is a number of resizings, at least 0; got {n_stages}")
        self.n_stages = n_stages
        self.method = method
        self.multiplier = multiplier
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [B, out_channels, h, w] of pictures [B, in_channels, H, W]."""
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x) if hasattr(self, "channel_mapper") else x

    def encode(self, x: Tensor) -> Tensor:
        """As `forward`: what encodes a condition has this name in latent-diffusion."""
        return self(x)


class AugmentationLabels(nn.Module):
    """The condition of a network that knows how its images were augmented: labels [B, A] as they are.

    Batches without them, and sampling, have none, which stands for zeros: images that were left alone.

    Args:
        key: entry of a batch that holds the labels.
    """

    optional = True

    def __init__(self, key: str = "augment_labels"):
        super().__init__()
        self.key = key

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None) -> Tensor | None:
        """Labels `[B, A]` of a batch, or None."""
        return batch.get(self.key if key is None else key)

    def embed(self, labels: Tensor) -> Tensor:
        return labels
