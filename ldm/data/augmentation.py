"""Non-leaky augmentation: geometric changes that a network is conditioned on, so that it does not generate them.

Source: Karras et al. 2022 (arXiv 2206.00364, appendix F.2); Karras et al. 2020 (arXiv 2006.06676) for the idea.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Pixels are sampled this many times in each direction, and averaged.
OVERSAMPLING = 2


def _scaling(x: float, y: float) -> Tensor:
    return torch.tensor([[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _rotation(angle: float) -> Tensor:
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _translation(x: float, y: float) -> Tensor:
    return torch.tensor([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]], dtype=torch.float64)


def transformed(image: Tensor, matrix: Tensor) -> Tensor:
    """An image [H, W, C] moved by a map [3, 3] of coordinates in which it spans [-1, 1] each way, x to the right.

    What comes from outside is the image's mirror image. Cubic interpolation, oversampled.
    """
    height, width, _ = image.shape
    inverse = torch.linalg.inv(matrix)[None, :2].to(image)
    size = [1, image.shape[2], OVERSAMPLING * height, OVERSAMPLING * width]
    grid = F.affine_grid(inverse, size, align_corners=False)
    planes = image.permute(2, 0, 1)[None]
    moved = F.grid_sample(planes, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(moved, OVERSAMPLING)[0].permute(1, 2, 0).clamp(-1, 1)


class NonLeaky:
    """Change an image [H, W, C] at random, and say how: (image, {"augment_labels": [9]}).

    Each of these happens with probability `probability`, but the mirroring left to right, which is always drawn:

        labels             draw                                        change
        w                  w of {0, 1}                                 mirror left to right
        w                  w of {0, 1}                                 mirror top to bottom
        w                  w ~ N(0, 1)                                 scale by 2^(0.2 w)
        cos a - 1, sin a   a uniform in [-pi, pi)                      rotate by a
        w cos a, w sin a   w ~ N(0, 1), a uniform in [-pi, pi)         scale by 2^(0.2 w) along a, by 2^(-0.2 w) across
        w_x, w_y           w ~ N(0, 1) each                            move by 0.125 w of the width and height

    Labels are zero where nothing happens: those of an image that was left alone are all zero.

    Args:
        probability: in [0, 1].
    """

    size = 9

    def __init__(self, probability: float = 0.12):
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], got {probability}")
        self.probability = probability

    def __call__(self, image: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        uniform = torch.rand(5, generator=generator).tolist()
        mirrors = torch.randint(0, 2, (2,), generator=generator).tolist()
        normal = torch.randn(4, generator=generator, dtype=torch.float64).tolist()
        angles = ((2 * torch.rand(2, generator=generator, dtype=torch.float64) - 1) * math.pi).tolist()
        happens = [draw < self.probability for draw in uniform]
        flip_x, flip_y = mirrors[0], mirrors[1] * happens[0]
        zoom, stretch = normal[0] * happens[1], normal[1] * happens[3]
        turn, axis = angles[0] * happens[2], angles[1]
        move_x, move_y = normal[2] * happens[4], normal[3] * happens[4]
        labels = [flip_x, flip_y, zoom, math.cos(turn) - 1, math.sin(turn)]
        labels += [stretch * math.cos(axis), stretch * math.sin(axis), move_x, move_y]
        image = image.flip([side for side, flip in ((1, flip_x), (0, flip_y)) if flip])
        if any(happens[1:]):
            factor, along = 2 ** (0.2 * zoom), 2 ** (0.2 * stretch)
            matrix = _rotation(turn) @ _scaling(factor, factor)
            matrix = _rotation(axis) @ _scaling(along, 1 / along) @ _rotation(-axis) @ matrix
            # The image is 2 wide in these coordinates.
            image = transformed(image, _translation(2 * 0.125 * move_x, 2 * 0.125 * move_y) @ matrix)
        return image, {"augment_labels": torch.tensor(labels, dtype=torch.float32)}


class PaddedCrop:
    """Move an image [H, W, C] by up to `pad` pixels each way, drawn uniformly, with `fill` around it."""

    def __init__(self, pad: int = 4, fill: float = -1.0):
        self.pad, self.fill = pad, fill

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        height, width, _ = image.shape
        padded = F.pad(image, (0, 0, self.pad, self.pad, self.pad, self.pad), value=self.fill)
        top, left = torch.randint(2 * self.pad + 1, (2,), generator=generator).tolist()
        return padded[top : top + height, left : left + width]
