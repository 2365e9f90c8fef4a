"""How UNets, DiT and U-ViT are told of the augmentation of their images: W a is added to the embedding of the time.

a [B, A] are the labels of `ldm.data.augmentation.NonLeaky`; sampling has none, which stands for zeros, so that what is
sampled are images that were left alone. Source: Karras et al. 2022 (arXiv 2206.00364, appendix F.2).
"""

from __future__ import annotations

from torch import Tensor, nn


class AugmentEmbedding(nn.Linear):
    """Linear map without a bias from augmentation labels [B, A] to embeddings [B, E], which starts at zero."""

    def __init__(self, augment_dim: int, width: int):
        super().__init__(augment_dim, width, bias=False)

    def reset_parameters(self) -> None:
        """Start at zero, and take no draw from what other layers start from."""
        nn.init.zeros_(self.weight)

    def forward(self, labels: Tensor) -> Tensor:
        """Embed labels [B, A] to [B, E]."""
        return super().forward(labels.to(self.weight.dtype))


def split_augmented(y: Tensor | None, augment_dim: int, labelled: bool) -> tuple[Tensor | None, Tensor | None]:
    """Split what a model passes as one condition into labels [B] and augmentation labels [B, A].

    Args:
        y: labels [B]; of a batch with augmentation labels [B, 1 + A], the label first, or [B, A] where there are no
            classes; None.
        augment_dim: number of augmentation labels A that the network takes; 0 for none.
        labelled: whether the network takes classes.

    Whether labels [B] are taken is the network's to say.

    Raises:
        ValueError: for augmentation labels that the network does not take, or of another number.
    """
    if y is None or y.ndim < 2:
        return y, None
    if not augment_dim:
        raise ValueError(
            f"this network takes no augmentation labels: set augment_dim, or leave them out; got y {list(y.shape)}"
        )
    expected = labelled + augment_dim
    if y.ndim != 2 or y.shape[1] != expected:
        what = "a label and augmentation labels" if labelled else "augmentation labels"
        raise ValueError(f"y must be {what} [B, {expected}], got {list(y.shape)}")
    return (y[:, 0].long(), y[:, 1:]) if labelled else (None, y)
