"""Encoders of conditions for a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ClassEmbedder(nn.Module):
    """Table of class embeddings; its last row is the null class of classifier-free guidance.

    Args:
        embed_dim: width D.
        n_classes: number of rows, the null class included.
        key: entry of a batch that holds the labels.
        ucg_rate: probability in [0, 1] of dropping a label in training (Ho & Salimans 2022, arXiv 2207.12598).
        lora: accepted for DECU's configs; only False.
    """

    def __init__(
        self, embed_dim: int, n_classes: int = 1000, key: str = "class", ucg_rate: float = 0.0, lora: bool = False
    ):
        super().__init__()
        if lora:
            raise ValueError("ClassEmbedder has no low-rank form; remove `lora` or set it to False")
        if not 0 <= ucg_rate <= 1:
            raise ValueError(f"ucg_rate must be a probability in [0, 1], got {ucg_rate}")
        self.key = key
        self.n_classes = n_classes
        self.ucg_rate = ucg_rate
        self.embedding = nn.Embedding(n_classes, embed_dim)

    @property
    def null_class(self) -> int:
        """The last row."""
        return self.n_classes - 1

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
        if drop is not None:
            labels = torch.where(drop, self.null_class, labels)  # [B]
        return self.embed(labels)

    def embed(self, labels: Tensor) -> Tensor:
        """Rows `[B, 1, D]` of labels `[B]`."""
        self._check(labels)
        return self.embedding(labels[:, None])  # [B, 1, D]

    def drop_labels(self, labels: Tensor, uniform: Tensor) -> Tensor:
        """Replace a label by the null class where its draw, in [0, 1), is below `ucg_rate`; all `[B]`.

        In evaluation mode labels come back unchanged. The caller draws, so that a resumed run drops the same labels.
        """
        if uniform.shape != labels.shape:
            raise ValueError(f"one draw for each label: labels {list(labels.shape)}, draws {list(uniform.shape)}")
        if not self.training:
            return labels
        return torch.where(uniform.to(labels.device) < self.ucg_rate, self.null_class, labels)  # [B]

    def _check(self, labels: Tensor) -> None:
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(f"labels must be whole numbers of shape [B], got {labels.dtype} {list(labels.shape)}")
        if labels.device.type != "cpu" or torch._C._functorch.is_batchedtensor(labels) or not labels.numel():
            return  # reading values would stall a device, and cannot be done under vmap
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.n_classes:
            raise ValueError(
                f"labels must lie in 0..{self.n_classes - 1} (null class {self.null_class}), got {low}..{high}"
            )
