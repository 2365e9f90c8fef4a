"""A loaded model as a reader of pictures that it may not know: states, conditions, and what there is beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.evaluation.classifier import signed
from ldm.evaluation.extraction import ImageSet
from ldm.evaluation.ood import Corruption, NetworkReader, Readings
from ldm.evaluation.recognition import nearest_images
from ldm.evaluation.taps import named_taps, resolve_taps
from ldm.laplace import LastLayerLaplace
from ldm.pipelines.branching import BranchingPipeline
from ldm.pipelines.model import ModelPipeline

# The condition that pictures get, beside the number of a class.
NEAREST, NULL = "nearest", "null"


@dataclass(frozen=True)
class PictureReader:
    """Reads pictures through a loaded model.

    Attributes:
        pipeline: the model, or an ensemble, whose base model is the backbone.
        reader: its network.
        condition: `nearest`: the class of the nearest reference picture; `null`; or the number of a class.
    """

    pipeline: ModelPipeline
    reader: NetworkReader
    condition: str

    @classmethod
    def make(
        cls,
        pipeline: ModelPipeline,
        laplace: LastLayerLaplace | None = None,
        layers: Sequence[str] = (),
        condition: str | None = None,
    ) -> PictureReader:
        """Return a reader of a model's network.

        Args:
            laplace: a posterior of its last layer.
            layers: places of snapshots; the network's middle where it names one, else none.
            condition: see the class; nearest of conditional models where None.

        Raises:
            ValueError: for a model of texts or pictures, a class that it does not have, or layers that it has not.
        """
        model = pipeline.model
        if pipeline.base_network.needs_choices or model.reads_text:
            raise ValueError("scores of unknown pictures need a model of class labels, or one without conditions")
        middle = ("mid",) if "mid" in named_taps(model.network) else ()
        taps = resolve_taps(model.network, layers or middle) if layers or middle else None
        members = pipeline.network if isinstance(pipeline, BranchingPipeline) else None
        reader = NetworkReader(
            model.network,
            model.schedule,
            model.target,
            model.learned_variance is not None,
            members,
            laplace,
            taps,
        )
        return cls(pipeline, reader, _check_condition(pipeline, condition))

    @property
    def members(self) -> int:
        """How many members there are."""
        return self.pipeline.members

    @torch.no_grad()
    def read(
        self,
        images: Tensor,
        corruption: Corruption,
        nearest: tuple[Tensor, Tensor] | None,
        batch_size: int,
        progress: Callable[[int], Any] = lambda count: None,
    ) -> Readings:
        """Read pictures [N, C, H, W] in [-1, 1]; picture i has the i-th noise.

        Args:
            nearest: reference pictures [K, C, H, W] and their classes [K], for the condition `nearest`.
            progress: called with the pictures that were read.
        """
        labels = self._labels(images, nearest)
        model, parts = self.pipeline.model, []
        for rows in torch.arange(len(images)).split(batch_size):
            own = images[rows].to(self.pipeline.device)
            z = model.get_first_stage_encoding(model.encode_first_stage(own))
            cond = None if labels is None else labels[rows].to(self.pipeline.device)
            parts.append(self.reader.read(z, cond, rows.tolist(), corruption))
            progress(len(rows))
        return Readings.join(parts)

    def _labels(self, images: Tensor, nearest: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """Return the class of each picture [N]; None of a model without conditions."""
        if not self.pipeline.conditional:
            return None
        if self.condition == NEAREST:
            if nearest is None:
                raise ValueError("the condition nearest needs reference pictures with classes: give --condition CLASS")
            places, _ = nearest_images(images.numpy(), nearest[0].numpy())
            return nearest[1][torch.from_numpy(np.asarray(places))]
        label = self.pipeline.null_class if self.condition == NULL else int(self.condition)
        assert label is not None  # checked by `make`
        return torch.full((len(images),), label)


def _check_condition(pipeline: ModelPipeline, condition: str | None) -> str:
    """Return the condition, or the default one.

    Raises:
        ValueError: for a null class or a class that the model does not have.
    """
    if not pipeline.conditional:
        if condition is not None:
            raise ValueError(f"--condition {condition}: this model has no classes")
        return NULL
    if condition is None or condition == NEAREST:
        return NEAREST
    if condition == NULL:
        if pipeline.null_class is None:
            raise ValueError("--condition null: this model has no null class; take nearest, or a class")
        return NULL
    if not condition.isdigit() or int(condition) >= pipeline.n_classes:
        raise ValueError(f"--condition takes nearest, null or a class 0 to {pipeline.n_classes - 1}, got '{condition}'")
    return condition


def read_picture_set(source: ImageSet, n: int | None, shape: Sequence[int]) -> Tensor:
    """Return the first n pictures of a set, all where None, [N, C, H, W] in [-1, 1].

    Raises:
        ValueError: if there are fewer, or they have another shape than the model's.
    """
    if n is not None and n > len(source):
        raise ValueError(f"--n {n}: there are {len(source)} pictures")
    images = signed(source.read(0, len(source) if n is None else n))
    if tuple(images.shape[1:]) != tuple(shape):
        raise ValueError(f"pictures of {tuple(images.shape[1:])} do not fit the model's, {tuple(shape)}")
    return images
