"""Samples of all members of an ensemble as one set of images, so that one call of the members serves them all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ldm.pipelines.ensemble import EnsemblePipeline
from ldm.pipelines.images import as_bytes


class MemberImages:
    """Images to be sampled by all members of an ensemble: number i M + m is image i of member m of M.

    Image i has the noise of (seed, i) for every member, and the classes in turn; members branch where the
    pipeline says.
    """

    def __init__(self, pipeline: EnsemblePipeline, count: int):
        self.pipeline, self.count = pipeline, count

    def __len__(self) -> int:
        return self.count * self.pipeline.members

    def read(self, start: int, stop: int) -> Tensor:
        """Images start .. stop - 1, sampled now."""
        members = self.pipeline.members
        first, last = start // members, -(-stop // members)
        numbers = list(range(first, last))
        labels = [number % self.pipeline.classes.count for number in numbers]
        latents = self.pipeline.member_latents(labels, numbers)[:, :, 0].transpose(0, 1)  # [B, M, c, h, w]
        images = as_bytes(self.pipeline.decode(latents.flatten(0, 1)), "samples")
        return images[start - first * members : stop - first * members]

    def describe(self) -> dict[str, Any]:
        return {"sampled": self.pipeline.describe(), "count": self.count, "order": "image by image, all members"}
