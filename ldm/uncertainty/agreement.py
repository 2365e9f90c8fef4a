"""How well one set of variance maps agrees with another: ranks within and between images, totals, distance."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ldm.stats import rank_correlation


@dataclass(frozen=True)
class Agreement:
    """`found` maps beside true ones, both [B, ...], in the same unit.

    Attributes:
        pixel: Spearman's correlation within each image, mean over images.
        image: Spearman's correlation of the images' sums.
        overall: Spearman's correlation of all values.
        total: sum of the found over the sum of the true.
        error: |found - true| / |true|, Euclidean.
        negative: share of found values below 0.
    """

    pixel: float
    image: float
    overall: float
    total: float
    error: float
    negative: float

    def row(self) -> dict[str, float]:
        """The numbers by name, for a table."""
        return asdict(self)


def agreement(found: Tensor, true: Tensor) -> Agreement:
    """Compare maps [B, ...]; a map (or a set of sums) without any difference correlates 0 with everything.

    Raises:
        ValueError: if shapes differ, there are fewer than two images, or a value is not finite.
    """
    if found.shape != true.shape or found.ndim < 2 or len(found) < 2:
        raise ValueError(f"expected maps [B >= 2, ...] of one shape, got {list(found.shape)} and {list(true.shape)}")
    a, b = (values.detach().double().cpu().flatten(1) for values in (found, true))
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("maps hold values that are not finite: did a trajectory diverge?")
    return Agreement(
        pixel=float(rank_correlation(a.numpy(), b.numpy()).mean()),
        image=float(rank_correlation(a.sum(1).numpy(), b.sum(1).numpy())),
        overall=float(rank_correlation(a.flatten().numpy(), b.flatten().numpy())),
        total=float(a.sum() / b.sum()),
        error=float((a - b).norm() / b.norm()),
        negative=float((a < 0).double().mean()),
    )
