"""What EDM's two UNets share: their levels, their embedding, and their stages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.edm.blocks import BlockStyle, EDMBlock
from ldm.modules.edm.labels import class_weights, split_labels
from ldm.modules.parts import Parts


class EDMNetwork(nn.Module):
    """A UNet of named blocks in stages: `condition`, `features`, `readout`.

    `forward(x, t, labels) == readout(features(x, condition(t, labels)))`. `enc` and `dec` hold the blocks by the size
    that they work at: `32x32_block0`.

    Attributes:
        label_dim, augment_dim: numbers of classes and of augmentation labels; 0 for none.
        out_names: the norm and the convolution of the readout, names below the network.
    """

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    map_noise: nn.Module
    map_layer0: nn.Linear
    map_layer1: nn.Linear
    out_names: tuple[str, str]
    # Whether the images of smaller levels are added to what the last convolution makes.
    adds_to_last = False

    def __init__(self, in_channels: int, label_dim: int, augment_dim: int, label_dropout: float, levels: int):
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must be a probability in [0, 1], got {label_dropout}")
        self.in_channels, self.size_multiple = in_channels, 2 ** (levels - 1)
        self.label_dim, self.augment_dim = label_dim, augment_dim
        self.label_dropout = label_dropout

    @property
    def taps(self) -> dict[str, str]:
        """Names of the blocks that features are read from, {tap: submodule}: in_1 .., mid, out_1 .."""
        down = [name for name, block in self.enc.items() if isinstance(block, EDMBlock) and "block" in name]
        up = [name for name, block in self.dec.items() if isinstance(block, EDMBlock) and "block" in name]
        (middle,) = (name for name in self.dec if name.endswith("_in1"))
        names = {f"in_{count}": f"enc.{name}" for count, name in enumerate(down, 1)}
        return names | {"mid": f"dec.{middle}"} | {f"out_{count}": f"dec.{name}" for count, name in enumerate(up, 1)}

    @property
    def parts(self) -> Parts:
        """Class table, time embedding, condition, output and taps."""
        norm, last = self.out_names
        return Parts(
            class_tables={"map_label.weight": 1} if self.label_dim else {},
            time_embedding=("map_layer0.*", "map_layer1.*"),
            condition=("map_*",),
            output=(f"{norm}.*", f"{last}.*"),
            last_layer=last,
            adds_to_last=self.adds_to_last,
            taps=self.taps,
        )

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """`[B, out_channels, H, W]` of scaled noisy images and what is known of them.

        Args:
            x: images `[B, in_channels, H, W]`.
            noise_labels: what the preconditioner makes of the noise level, `[B]`.
            class_labels: weights `[B, K]` or whole numbers `[B]`; None, and the label K: no class.
            augment_labels: `[B, A]`; None: the images were left alone.
            y: both in one tensor, see `split_labels`, in place of the two.
        """
        return self.readout(self.features(x, self.condition(noise_labels, y, class_labels, augment_labels)))

    def backbone(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The input of the readout; y holds class and augmentation labels, see `split_labels`."""
        return self.features(x, self.condition(timesteps, y))

    def condition(
        self,
        timesteps: Tensor,
        y: Tensor | None = None,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Embedding `[B, E]` of noise labels `[B]` and of labels, arguments of `forward`.

        Raises:
            ValueError: for labels that this network does not take.
        """
        if y is not None:
            class_labels, augment_labels = split_labels(y, self.label_dim, self.augment_dim)
        if class_labels is not None and not self.label_dim:
            raise ValueError("this network has no classes; set label_dim, or leave the class labels out")
        if augment_labels is not None:
            self._check_augmentation(augment_labels)
        timesteps = timesteps.to(torch.promote_types(timesteps.dtype, torch.float32))
        weights = self._class_weights(class_labels, timesteps)
        return self._embedding(timesteps, weights, augment_labels)

    def _check_augmentation(self, labels: Tensor) -> None:
        if not self.augment_dim:
            raise ValueError("this network has no augmentation labels; set augment_dim, or leave the labels out")
        if labels.ndim != 2 or labels.shape[1] != self.augment_dim:
            raise ValueError(f"augmentation labels must be [B, {self.augment_dim}], got {list(labels.shape)}")

    def _class_weights(self, labels: Tensor | None, timesteps: Tensor) -> Tensor | None:
        """Weights of the classes `[B, K]` after label dropout; None for a network without classes."""
        if not self.label_dim:
            return None
        if labels is None:
            return torch.zeros(len(timesteps), self.label_dim, device=timesteps.device)
        weights = class_weights(labels, self.label_dim)
        kept = F.dropout(torch.ones_like(weights[:, :1]), self.label_dropout, self.training)
        return weights * (kept > 0)

    def _embedding(self, t: Tensor, weights: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        raise NotImplementedError

    def features(self, x: Tensor, emb: Tensor, context: None = None) -> Tensor:
        raise NotImplementedError

    def readout(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_images(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels or any(size % self.size_multiple for size in x.shape[2:]):
            raise ValueError(
                f"x must be [B, {self.in_channels}, H, W] with H and W multiples of {self.size_multiple}, got "
                f"{list(x.shape)}"
            )


def bottom_blocks(channels: int, size: int, style: BlockStyle) -> Iterator[tuple[str, EDMBlock]]:
    """The two blocks at the lowest level, the first of which always attends."""
    yield f"{size}x{size}_in0", EDMBlock(channels, channels, style, attention=True)
    yield f"{size}x{size}_in1", EDMBlock(channels, channels, style)
