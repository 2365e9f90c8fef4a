"""A class embedder that also says how images were augmented, for every network of classes but EDM's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import zero_module
from ldm.modules.encoders.modules import ClassEmbedder


class AugmentedClassEmbedder(ClassEmbedder):
    """Embeds a label and augmentation labels a [A] as `row[label] + W a`, so that augmentations are not generated.

    Samples are conditioned on a = 0, images that were left alone, for which this is a `ClassEmbedder`: of the same
    table, null class and names. W starts at zero. In training on a batch with augmentation labels a condition is
    [B, 1 + A], the label first. A network that takes labels itself (`conditioning_key: adm`) reads it as it is, with
    its `augment_dim`; the embedder has the width 0 then, and no W.

    Source: Karras et al. 2022, appendix F.2, where the labels go into the embedding of the noise level.

    Args:
        embed_dim: width D.
        augment_dim: number of augmentation labels A; those of `ldm.data.augmentation.NonLeaky` are 9.
        augment_key: entry of a batch that holds them.
        classes: further arguments of `ClassEmbedder`.
    """

    def __init__(self, embed_dim: int, *, augment_dim: int = 9, augment_key: str = "augment_labels", **classes: Any):
        super().__init__(embed_dim, **classes)
        self.augment_key = augment_key
        self.augment_dim = augment_dim
        if embed_dim:
            self.augmentation = zero_module(nn.Linear(augment_dim, embed_dim, bias=False))

    def join(self, labels: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return labels [B] and the augmentation labels of a batch as [B, 1 + A]; without these the labels."""
        augmented = batch.get(self.augment_key)
        return labels if augmented is None else torch.cat([labels[:, None].to(augmented), augmented], dim=1)

    def embed(self, labels: Tensor) -> Tensor:
        """Embed labels [B], or what `join` returned, to [B, 1, D]."""
        if labels.ndim == 1:
            return super().embed(labels)
        return super().embed(labels[:, 0].long()) + self.augmentation(labels[:, None, 1:])
