"""From a map of uncertainty to one number an image: sums, order statistics, patches, masks, entropy of features.

Maps are [B, C, H, W] (variances) or [B, H, W]; channels are averaged first, as in the reproduction of BayesDiff
(cilevanmarken, `aggregation.py`), whose `sum`, `patch_max` and `segmentation` are among these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

# image [B, C, H, W] in [-1, 1] -> weights [B, H, W] in [0, 1]
Mask = Callable[[Tensor], Tensor]
FLOOR = 1e-3  # of a feature's variance, Jazbec et al. 2025


def flat_map(maps: Tensor) -> Tensor:
    """Maps [B, H, W] in float64, channels averaged.

    Raises:
        ValueError: for other shapes, or values that are not finite.
    """
    if maps.ndim not in (3, 4):
        raise ValueError(f"expected maps [B, C, H, W] or [B, H, W], got {list(maps.shape)}")
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("a map holds values that are not finite: did its trajectory diverge?")
    return maps.double().mean(1) if maps.ndim == 4 else maps.double()


def total(maps: Tensor) -> Tensor:
    """Sum over pixels [B] (BayesDiff's score)."""
    return flat_map(maps).sum((1, 2))


def mean(maps: Tensor) -> Tensor:
    """Mean over pixels [B]."""
    return flat_map(maps).mean((1, 2))


def variance(maps: Tensor) -> Tensor:
    """Variance over pixels [B]: how unevenly an image is unsure."""
    return flat_map(maps).flatten(1).var(1)


def percentile(maps: Tensor, share: float = 95.0) -> Tensor:
    """The value that `share` percent of the pixels do not exceed [B]."""
    return torch.quantile(flat_map(maps).flatten(1), share / 100, dim=1)


def patch_max(maps: Tensor, parts: int = 4) -> Tensor:
    """Greatest mean of a patch [B], the map cut into parts x parts patches (4 x 4: 16 pixels a side at 64)."""
    flat = flat_map(maps)
    if min(flat.shape[1:]) < parts:
        raise ValueError(f"maps of {list(flat.shape[1:])} pixels have no {parts} x {parts} patches")
    return F.adaptive_avg_pool2d(flat[:, None], parts).flatten(1).amax(1)


def window_max(maps: Tensor, window: int = 3) -> Tensor:
    """Greatest mean of a window of `window` pixels a side, wherever it lies [B]."""
    flat = flat_map(maps)
    if min(flat.shape[1:]) < window:
        raise ValueError(f"maps of {list(flat.shape[1:])} pixels have no window of {window} pixels a side")
    return F.avg_pool2d(flat[:, None], window, stride=1).flatten(1).amax(1)


def within(maps: Tensor, mask: Tensor) -> Tensor:
    """Mean over a mask [B, h, w] of weights in [0, 1], resized to the map: [B].

    Where the mask is empty the mean over the whole image stands in. (The reproduction divides by the image's size, so
    that its score grows with the object.)
    """
    flat = flat_map(maps)
    weights = F.interpolate(mask.to(flat)[:, None], flat.shape[1:], mode="area")[:, 0]
    size = weights.sum((1, 2))
    inside = (weights * flat).sum((1, 2)) / size.clamp(min=1e-12)
    return torch.where(size > 0, inside, flat.mean((1, 2)))


def threshold_mask(images: Tensor) -> Tensor:
    """The brighter of two groups of an image's pixels [B, H, W], split where their variance within is least.

    Source: Otsu 1979. Of a picture with a bright background take 1 - mask.
    """
    grey = images.double().mean(1).flatten(1)
    ordered = grey.sort(1).values  # a cut after k of N pixels
    count = torch.arange(1, ordered.shape[1], dtype=torch.float64, device=images.device)
    below = ordered.cumsum(1)[:, :-1]
    above = ordered.sum(1, keepdim=True) - below
    size = ordered.shape[1]
    between = count * (size - count) * (below / count - above / (size - count)).square()
    cut = ordered.gather(1, between.argmax(1, keepdim=True))
    return (grey > cut).double().unflatten(1, images.shape[-2:])


def saliency_mask(images: Tensor, smooth: int = 3) -> Tensor:
    """Where an image departs from the average of its log spectrum, scaled to [0, 1]: [B, H, W].

    Source: Hou and Zhang 2007 (spectral residual), which needs no weights.
    """
    spectrum = torch.fft.fft2(images.double().mean(1))
    size = spectrum.abs().clamp(min=1e-12).log()
    residual = size - _blurred(size, smooth)
    found = torch.fft.ifft2(torch.polar(residual.exp(), spectrum.angle())).abs().square()
    found = _blurred(found, smooth)
    low, high = found.amin((1, 2), keepdim=True), found.amax((1, 2), keepdim=True)
    return (found - low) / (high - low).clamp(min=1e-12)


def _blurred(maps: Tensor, window: int) -> Tensor:
    padded = F.pad(maps[:, None], [window // 2] * 4, mode="replicate")
    return F.avg_pool2d(padded, window, stride=1)[:, 0]


def model_mask(model: Callable[[Tensor], Tensor]) -> Mask:
    """A mask from a segmentation model: [B, H, W] in [0, 1], or logits [B, K, H, W] whose class 0 is background.

    Of a dictionary the entry `out` counts, as torchvision's segmentation models give it.
    """

    def mask(images: Tensor) -> Tensor:
        try:
            found = model(images)
        except TypeError as error:
            raise ValueError(f"the segmentation model takes no images [B, C, H, W]: {error}") from error
        found = found["out"] if isinstance(found, dict) and "out" in found else found
        if not isinstance(found, Tensor):
            raise ValueError(f"the segmentation model gave a {type(found).__name__}, expected a tensor")
        if found.ndim == 4 and found.shape[1] > 1:
            return (found.argmax(1) != 0).double()
        found = found[:, 0] if found.ndim == 4 else found
        if found.ndim != 3 or bool(((found < 0) | (found > 1)).any()):
            raise ValueError(
                f"a mask must be [B, H, W] in [0, 1] or logits [B, K, H, W], got {list(found.shape)} between "
                f"{float(found.min()):.3g} and {float(found.max()):.3g}"
            )
        return found.double()

    return mask


def feature_entropy(features: Tensor, floor: float = FLOOR) -> Tensor:
    """(1/2) sum_d ln(var_d + floor) over members' features [M, B, D]: [B], in nats up to a constant.

    Source: Jazbec et al. 2025 (generative uncertainty), with members of one noise.
    """
    if features.ndim != 3 or len(features) < 2:
        raise ValueError(f"expected features [M >= 2, B, D], got {list(features.shape)}")
    return 0.5 * (features.double().var(0) + floor).log().sum(-1)


# Scores of a map alone.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": total,
    "mean": mean,
    "variance": variance,
    "percentile": percentile,
    "patch_max": patch_max,
    "pooled": window_max,
}
# Masks that need no weights.
MASKS: dict[str, Mask] = {"threshold": threshold_mask, "saliency": saliency_mask}


def score_table(maps: Tensor, images: Tensor, masks: dict[str, Mask], share: float, parts: int) -> dict[str, Tensor]:
    """Every score of maps [B, ...] beside their images [B, C, H, W] in [-1, 1]: {name: [B]}."""
    chosen: dict[str, Callable[[Tensor], Tensor]] = {
        **SCORES,
        "percentile": partial(percentile, share=share),
        "patch_max": partial(patch_max, parts=parts),
    }
    found = {name: score(maps) for name, score in chosen.items()}
    return found | {f"segmentation_{name}": within(maps, mask(images).to(maps.device)) for name, mask in masks.items()}
