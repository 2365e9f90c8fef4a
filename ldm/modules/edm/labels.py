"""What EDM's networks are told besides the noise: classes and augmentations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.modules.diffusionmodules.util import in_functorch
from ldm.modules.encoders.modules import ClassEmbedder


def class_weights(labels: Tensor, label_dim: int) -> Tensor:
    """Weights of the classes `[B, K]` for labels: whole numbers `[B]`, or weights `[B, K]` as they are.

    The label K is the null class: weights of zero, as label dropout leaves them.

    Raises:
        ValueError: for another shape or type, or for whole numbers out of 0 .. K on the CPU.
    """
    if labels.ndim == 1 and not labels.is_floating_point():
        if labels.device.type == "cpu" and not in_functorch() and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high > label_dim:
                raise ValueError(f"labels must lie in 0..{label_dim} ({label_dim}: the null class), got {low}..{high}")
        return (labels[:, None] == torch.arange(label_dim, device=labels.device)).float()
    if labels.ndim == 2 and labels.shape[1] == label_dim:
        return labels
    raise ValueError(
        f"class labels must be whole numbers [B] or weights [B, {label_dim}], got {labels.dtype} {list(labels.shape)}"
    )


def split_labels(y: Tensor | None, label_dim: int, augment_dim: int) -> tuple[Tensor | None, Tensor | None]:
    """Split what a model passes as one condition into class labels and augmentation labels.

    Args:
        y: class labels, see `class_weights`; augmentation labels `[B, A]` of a network without classes; or class
            weights followed by augmentation labels `[B, K + A]`.
        label_dim: number of classes K.
        augment_dim: number of augmentation labels A.
    """
    if y is None:
        return None, None
    if not label_dim:
        return None, y
    if augment_dim and y.ndim == 2 and y.shape[1] == label_dim + augment_dim:
        return y[:, :label_dim], y[:, label_dim:]
    return y, None


class ClassAndAugmentation(ClassEmbedder):
    """The condition of a network that knows the class of its images and how they were augmented.

    A condition is the label; in training on a batch with augmentation labels, both in one tensor, see `split_labels`.

    Args:
        augment_key: entry of a batch that holds the augmentation labels `[B, A]`.
        classes: arguments of `ClassEmbedder`.
    """

    def __init__(self, *, augment_key: str = "augment_labels", **classes: Any):
        super().__init__(**classes)
        self.augment_key = augment_key

    def join(self, labels: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Class weights and augmentation labels `[B, K + A]` for labels `[B]`; the labels for a batch without them."""
        augmented = batch.get(self.augment_key)
        if augmented is None:
            return labels
        count = self.n_classes if self.null_class is None else self.null_class
        return torch.cat([class_weights(labels, count).to(augmented), augmented], dim=1)
