"""Feature extractors: images of bytes [B, C, H, W] -> features [B, D], logits [B, K], spatial features [B, S].

`ldm.evaluation.extractors.make_extractor` knows them by name. An extractor is a torch module, so that torchmetrics
takes it as its `feature`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoint import load_into, load_state_dict, sha256, tensors_sha256
from ldm.evaluation.classifier import load_classifier, signed
from ldm.util import instantiate_as

# sFID looks at the first channels of a middle map (Nash et al. 2021: 7 of Inception's, 7 x 17 x 17 = 2,023 values).
SPATIAL_CHANNELS = 7


class Activations(NamedTuple):
    """What a network says of B images, float32: features [B, D], logits [B, K] and spatial features [B, S] or None."""

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class Extractor(nn.Module):
    """A frozen network that gives `activations` of uint8 images [B, C, H, W]; calling it gives the features alone.

    Attributes:
        name: what the features are called in tables and records.
        channels: channels that images must have; a grey image is repeated where 3 are wanted.
        num_features: D.
    """

    name: str
    channels: int
    num_features: int

    def activations(self, images: Tensor) -> Activations:
        """Features of uint8 images [B, C, H, W]."""
        raise NotImplementedError(f"{type(self).__name__} must define activations(images)")

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, D] of uint8 images [B, C, H, W]."""
        return self.activations(images).pooled

    def describe(self) -> dict[str, Any]:
        """What the features depend on, in plain values."""
        raise NotImplementedError(f"{type(self).__name__} must define describe()")

    def prepared(self, images: Tensor) -> Tensor:
        """The images with this network's channels.

        Raises:
            ValueError: if they are no bytes [B, 1 or 3, H, W], or colours come to a network for grey images.
        """
        if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
            raise ValueError(f"expected images uint8 [B, 1 or 3, H, W], got {images.dtype} {tuple(images.shape)}")
        if images.shape[1] > self.channels:
            raise ValueError(f"the features '{self.name}' are of grey images, got {images.shape[1]} channels")
        return images.expand(-1, self.channels, -1, -1)


class ClassifierFeatures(Extractor):
    """Penultimate layer, logits and first channels of the last map of what `decu evaluate classifier` trained."""

    name = "classifier"

    def __init__(self, weights: str | os.PathLike):
        super().__init__()
        self.network = load_classifier(weights)
        self.sizes = self.network.architecture
        self.channels, self.num_features = self.sizes.channels, self.sizes.num_features
        self.source = {"extractor": self.name, "weights": str(weights), "sha256": sha256(weights)}

    def activations(self, images: Tensor) -> Activations:
        """Features of uint8 images [B, C, side, side].

        Raises:
            ValueError: if the images have another side than those the classifier was trained on.
        """
        images = self.prepared(images)
        if images.shape[-2:] != (self.sizes.side, self.sizes.side):
            raise ValueError(
                f"this classifier knows images of {self.sizes.side} x {self.sizes.side} pixels, got "
                f"{images.shape[-2]} x {images.shape[-1]}; train one on such images (`decu evaluate classifier`), or "
                "give the data set another image_size"
            )
        maps, pooled, logits = self.network.activations(signed(images))
        return Activations(pooled, logits, maps[:, :SPATIAL_CHANNELS].flatten(1))

    def describe(self) -> dict[str, Any]:
        return self.source


class TargetFeatures(Extractor):
    """Any network by its dotted target: it gets floats [B, C, H, W] in [-1, 1] and returns features [B, D].

    It may return `Activations` instead. Maps [B, D, h, w] are averaged over their positions.

    Args:
        target: class or function that gives the network.
        params: its keywords.
        weights: state dict to load into it, strictly.
        channels: channels of the images it wants.
    """

    def __init__(
        self,
        target: str,
        params: Mapping[str, Any] | None = None,
        weights: str | os.PathLike | None = None,
        channels: int = 3,
    ):
        super().__init__()
        self.name, self.channels = target, channels
        try:
            self.network = instantiate_as(nn.Module, {"target": target, "params": params}, "features")
        except (TypeError, ValueError) as error:
            raise ValueError(f"features {target} cannot be made of {dict(params or {})}: {error}") from error
        if weights is not None:
            load_into(self.network, load_state_dict(weights), file=weights)
        self.network.eval().requires_grad_(False)
        self.source = {
            "extractor": target,
            "params": dict(params or {}),
            "channels": channels,
            "weights": None if weights is None else str(weights),
            "sha256": tensors_sha256(self.network.state_dict()),
        }

    def activations(self, images: Tensor) -> Activations:
        found = self.network(signed(self.prepared(images)))
        if isinstance(found, Activations):
            return found
        pooled = found.mean((2, 3)) if found.ndim == 4 else found
        if pooled.ndim != 2:
            raise ValueError(f"{self.name} must return features [B, D] or [B, D, h, w], got {tuple(found.shape)}")
        return Activations(pooled)

    def describe(self) -> dict[str, Any]:
        return self.source
